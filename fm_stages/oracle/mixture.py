"""Banks whose rows are Gaussians: a training set that is stored as VAE moments and sampled anew at every step.

What the network sees of row i is x_1 ~ N(m_i, diag d_i^2). Along x_t = a x_1 + s x_0, value by value,

    v_i = s^2 + a^2 d_i^2                                               variance of x_t given row i
    log w_i = -1/2 sum [(x_t - a m_i)^2 / v_i + log v_i] + log count    the determinant belongs to the weights
    mu_i = m_i + a d_i^2 (x_t - a m_i) / v_i                            mean of x_1 given x_t and row i
    s^2 d_i^2 / v_i                                                     its variance

so the posterior is a mixture of N(mu_i, .) with weights w_i: its mean is sum w_i mu_i, its variance that within the
rows plus that between them. Source: Bayes' rule for Gaussians; with d = 0 it is arXiv 2512.02826, Theorem 2.1.

Past the boundary one row holds the posterior, but a row is no point: the floor does not vanish there.

Shapes: B queries, N rows, C rows of a piece, D values per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.flow import Path, expand_time
from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.exact import Oracle, check_tensor
from fm_stages.oracle.merge import Partial
from fm_stages.oracle.stored_rows import RowReader

CPU_VALUES, GPU_VALUES = 2**18, 2**21
"""Values of pairs of a query and a row at a time, some six float64 copies of which are held: on a CPU in its caches."""

QUERIES = 16
"""Queries per such block, or more of them where that many take all rows at once."""

ROWS = 4096
"""Rows at a time where something is done to all of them once."""

LEAST_LOGIT = -80.0
"""Rows this far below the largest are not summed: 10^15 of them would not change a float64 sum."""

LAST_TIME = 1 - 1e-8
"""Stands for t = 1 in targets, which then are their limit."""


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

    def __deepcopy__(self, memo: dict) -> GaussianMixtureBank:
        return self

    def __repr__(self) -> str:
        labels = f"{len(self.classes)} labels" if self.has_labels else "no labels"
        return f"GaussianMixtureBank({self.num_rows} rows, {self.num_distinct} distinct, shape {self.shape}, {labels})"


class MixtureOracle(Oracle):
    """The exact oracle of a `GaussianMixtureBank`: every pair of a query and a row, in float64, nothing left out.

    Its cost is that of B N D logarithms: 60,000 rows of 784 values take 0.4 to 0.9 s per query and CPU core. ``top1``,
    ``ess`` and ``entropy`` are those of the rows' weights, which no longer say that the posterior is a point; the floor
    does. Indices of own rows are of no use to it, and `target` and `decompose` refuse them.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.
    """

    collapses = False
    takes = GaussianMixtureBank
    query_dtype = torch.float64
    bank: GaussianMixtureBank  # type: ignore[assignment]

    def __init__(self, bank: GaussianMixtureBank, path: Path) -> None:
        super().__init__(bank, path, tolerance=0.0)  # type: ignore[arg-type]

    @torch.no_grad()
    def target(
        self, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Oracle.target`. In float64 throughout, for the posterior mean never has the bits of x1 here."""
        with ranks.together(self.bank.group) as meeting:
            if index is not None:
                self.bank.rows(index)  # raises
            check_tensor("data", x1)
            self.check(meeting, x0, t, labels, None, x1)
        wide, x0, x1 = t.double().clamp(max=LAST_TIME), x0.double(), x1.double()
        mean = self.posterior(self.path.interpolate(x0, x1, wide), wide, labels).mean
        scale = expand_time(self.path.mean_coefficient(wide), x1)
        return (self.path.velocity(x0, x1, wide) + scale * (mean - x1)).float()

    def _may_skip(self) -> bool:
        return False  # a row is no point, so that no query collapses on it

    def _partial(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Partial:
        """The posterior of queries (B, D) over the rows of this rank."""
        part = Partial.empty(x_t)
        a, s = self.coefficients(t)
        pairs = (CPU_VALUES if x_t.device.type == "cpu" else GPU_VALUES) // self.bank.num_dims
        for label in labels.unique().tolist():
            rows = self.bank.slice_of(label)
            places = torch.arange(rows.start, rows.stop, device=x_t.device)
            for queries in (labels == label).nonzero()[:, 0].split(max(QUERIES, pairs // max(len(places), 1))):
                own = part[queries]
                for place in places.split(max(1, pairs // len(queries))) if len(places) else ():
                    log_count = self.bank.log_count(place, count_columns(torch.full_like(place, label)))
                    own = own.merge(
                        _of_block(x_t[queries], a[queries], s[queries], *self.bank.moments(place), log_count, own.peak)
                    )
                part[queries] = own
        return part


def _of_block(
    x_t: Tensor, a: Tensor, s: Tensor, mean: Tensor, variance: Tensor, log_count: Tensor, peak: Tensor
) -> Partial:
    """The posterior of queries (B, D) over rows with moments (C, D); ``peak`` (B,) is the largest logit elsewhere."""
    alpha, noise = a[:, :, None], s[:, :, None].square()
    away = x_t[:, None] - alpha * mean  # (B, C, D), like all with three axes
    total = noise + alpha.square() * variance
    pull = away / total
    logits = log_count - 0.5 * (away.mul_(pull) + total.log()).sum(2)
    top = logits.amax(1)

    used = (logits >= torch.maximum(top, peak)[:, None] + LEAST_LOGIT).any(0).nonzero()[:, 0]
    if not len(used):
        return Partial.empty(x_t)
    logits, mean, variance = logits[:, used], mean[used], variance[used]
    means = mean + alpha * variance * pull[:, used]
    within = (noise * variance / total[:, used]).sum(2)
    top, first = logits.max(1)
    depth = logits - top[:, None]
    weights = depth.exp()
    best = means[torch.arange(len(means), device=first.device), first]
    away = means - best[:, None]
    return Partial(
        peak=top,
        best=best,
        weight=weights.sum(1),
        square=weights.square().sum(1),
        depth=(weights * depth).sum(1),
        moment=(weights[:, None] @ away)[:, 0],
        spread=(weights * (away.square().sum(2) + within)).sum(1),
    )


def oracle_of(bank: DataBank | GaussianMixtureBank, path: Path) -> Oracle:
    """The oracle that suits a bank: of points, or of distributions."""
    return MixtureOracle(bank, path) if isinstance(bank, GaussianMixtureBank) else Oracle(bank, path)


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
