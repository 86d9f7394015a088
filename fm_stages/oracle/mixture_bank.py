"""Banks whose rows are Gaussians: a training set that is stored as VAE moments and sampled anew at every step.

Shapes: N rows, C of them, D values per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.stored_rows import RowReader

ROWS = 4096
"""Rows at a time where something is done to all of them once."""


class GaussianMixtureBank:
    """The training set as a mixture of N diagonal Gaussians, whole or this rank's shard of it.

    What the network sees of row i is ``scale * z + shift`` with z ~ N(mean[i], diag std[i]^2), drawn anew each time.
    Rows with equal mean and std are stored once with their count. A plain object that deep-copies to itself. With a
    process group the bank is sharded as a `DataBank` is.

    Args:
        mean: (N, ...) floating point, of each row; of this rank, if there is a group.
        std: (N, ...) floating point, 0 or larger; where it is 0 the row is a point.
        labels: (N,) int64, 0 or larger, or None for an unlabelled set.
        scale: the latent multiplier: number, or tensor that broadcasts to a row. The std scales by its absolute value.
        shift: likewise, what is added then.
        group: process group over which the bank is sharded; None: it is all here.

    Raises:
        ValueError: if there is no row, shapes, dtypes or labels do not fit, a std is negative, or a value not finite.
    """

    nearest = None
    """Distances to other rows, of a `DataBank`: of distributions there are none, so no query can be skipped."""

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        labels: Tensor | None = None,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        with ranks.together(group):
            _check(mean, std)
        moments = RowReader.of(torch.stack([mean, std], 1))
        self._set_up(moments, labels, *moments_affine(scale, shift, moments.shape[2:]), group)

    @classmethod
    def of_moments(
        cls,
        moments: RowReader,
        labels: Tensor | None = None,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> GaussianMixtureBank:
        """The bank of moments (N, 2, ...), means and stds, that are read a piece at a time; see `moments_affine`."""

        def read(index: Tensor) -> Tensor:
            values = moments.read(index)
            _check_std(values[:, 1], index, moments.name_of)
            return values

        bank = cls.__new__(cls)
        bank._set_up(replace(moments, read=read), labels, scale, shift, group)
        return bank

    def _set_up(
        self,
        moments: RowReader,
        labels: Tensor | None,
        scale: float | Tensor,
        shift: float | Tensor,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.shape = tuple(moments.shape[2:])
        self._components = DataBank(moments, labels, scale, shift, group)
        self.group = group
        self.dtype = self._components.dtype
        self.num_dims = moments.num_dims // 2
        self.num_rows = self._components.num_rows
        self.num_distinct = self._components.num_distinct
        self.num_stored = self._components.num_stored
        self.num_bytes = self._components.num_bytes
        self.label_counts = self._components.label_counts
        self.classes = self._components.classes
        self.has_labels = self._components.has_labels
        self.rms_norm = self._components.rms_norm
        """Root mean square norm of what the network sees: E||x||^2 = ||mean||^2 + ||std||^2, as of a row of moments."""

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._components.device

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture: (D,) float64."""
        return self._components.mean[: self.num_dims]

    def slice_of(self, label: int) -> slice:
        """The stored rows of a label; see `DataBank.slice_of`."""
        return self._components.slice_of(label)

    def moments(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of stored rows, by their place on this rank (C,): each (C, D) float64."""
        mean, std = self._components.stored(place).double().split(self.num_dims, 1)
        return mean, std.square()

    def log_count(self, place: Tensor, column: Tensor) -> Tensor:
        """See `DataBank.log_count`."""
        return self._components.log_count(place, column)

    def rows(self, index: Tensor) -> NoReturn:
        """There are none: raises ValueError."""
        raise ValueError(
            "a row of a GaussianMixtureBank is a distribution and no point, so x1 cannot be read from it by index: "
            "pass the x1 that was drawn, and no index"
        )

    def labels_of(self, index: Tensor) -> Tensor:
        """Labels of training rows (B,), by their index in the data set: (B,) int64; -1 without labels."""
        return self._components.labels_of(index)

    def moments_of(self, index: Tensor) -> Tensor:
        """Mean and std of what the network sees of training rows (B,): (B, 2, ...) float32. See `DataBank.rows`."""
        return self._components.rows(index)

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A new draw of x_1 from each of the training rows (B,), with noise from a CPU generator: (B, ...) float32."""
        mean, std = self.moments_of(index).unbind(1)
        return mean + std * torch.randn(mean.shape, generator=generator).to(mean)

    def covariance(self) -> Tensor:
        """Covariance of the mixture, within the rows and between them: (D, D) float64, the same on all ranks."""
        total = torch.zeros(self.num_dims, self.num_dims, dtype=torch.float64, device=self.device)
        for place in torch.arange(self.num_stored, device=self.device).split(ROWS):
            mean, variance = self.moments(place)
            count = self.log_count(place, count_columns(torch.zeros_like(place))).double().exp()[:, None]
            total += ((mean - self.mean) * count).T @ (mean - self.mean)
            total.diagonal().add_((count * variance).sum(0))
        return ranks.reduce(total, self.group) / self.num_rows

    def to(self, device: torch.device | str) -> GaussianMixtureBank:
        """Move the bank, in place, so that all who hold it share one copy; returns itself."""
        self._components.to(device)
        return self

    def __len__(self) -> int:
        return self.num_rows

    def __deepcopy__(self, memo: dict[int, Any]) -> GaussianMixtureBank:
        return self

    def __repr__(self) -> str:
        labels = f"{len(self.classes)} labels" if self.has_labels else "no labels"
        return f"GaussianMixtureBank({self.num_rows} rows, {self.num_distinct} distinct, shape {self.shape}, {labels})"


def _check(mean: Tensor, std: Tensor) -> None:
    if mean.ndim < 2 or mean.shape != std.shape:
        raise ValueError(
            f"a row has a mean and a std for each of its values: mean is {tuple(mean.shape)}, std {tuple(std.shape)}"
        )
    if not (mean.is_floating_point() and std.is_floating_point()):
        raise ValueError(f"moments are floating point: mean is {mean.dtype}, std {std.dtype}")
    _check_std(std, torch.arange(len(std)))


def _check_std(std: Tensor, index: Tensor, name_of: Callable[[int], str] = "row {}".format) -> None:
    """Raise ValueError if the std of a row is none; ``index`` are the rows' numbers, and `RowReader` names them."""
    valid = (std >= 0).flatten(1).all(1)  # NaN is not
    if not bool(valid.all()):
        row = name_of(int(index[int((~valid).nonzero()[0])]))
        raise ValueError(f"{row} has a negative std or NaN: stored log variances become std = exp(logvar / 2)")


def moments_affine(scale: float | Tensor, shift: float | Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and shift of moments (2, ...), mean and std, from those of values of this shape."""
    factor, offset = (torch.as_tensor(x, dtype=torch.float32).expand(shape) for x in (scale, shift))
    return torch.stack([factor, factor.abs()]), torch.stack([offset, torch.zeros_like(offset)])
