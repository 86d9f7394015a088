"""The bank: the training set as the oracle sees it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NUM_EXTRA = 4
"""Columns kept behind each row's pixels: what lets one matrix product yield logits and sums at once."""

_NEVER = -1e4
"""Log of a zero count: finite, because the products multiply it by 0 for the queries that it does not concern, and
small enough to vanish beside the e^-40 that the least weight is."""


def count_column(label: int) -> int:
    """Which of the extra columns holds the log count that applies to a query with this label."""
    return 3 if label == -1 else 2


class DataBank:
    """The training set, point by point, in the form that the oracle's two matrix products want.

    Equal rows are stored once with their count, so that k copies of an image weigh k times without capping top1 at
    1/k. Rows are sorted by label, so that a class is a slice. A plain object that deep-copies to itself: neither a
    copied module nor a checkpoint may carry the training set.

    Args:
        x1: (N, ...) floating point, the training rows exactly as the network sees them (same normalisation; flips as
            rows of their own). float16 and bfloat16 rows are widened, float64 rows rounded, to float32.
        labels: (N,) int64, 0 or larger, or None for an unlabelled set.

    Raises:
        ValueError: if there is no row, the labels do not match, or a value is not finite.
    """

    def __init__(self, x1: Tensor, labels: Tensor | None = None) -> None:
        x1, labels = x1.detach(), None if labels is None else labels.detach().to(x1.device)
        _check(x1, labels)
        self.num_rows = x1.shape[0]
        self.shape = tuple(x1.shape[1:])
        self.num_dims = x1[0].numel()
        flat = x1.reshape(self.num_rows, -1).float().contiguous()

        self.max_norm = max(float(piece.norm(dim=1).max()) for piece in flat.split(8192))
        unique = _distinct_rows(flat, labels)
        # (D,) over all N rows; by pieces, like all that is done in float64, which never holds a second bank
        self.mean = torch.stack([piece.double().sum(0) for piece in flat.split(8192)]).sum(0) / self.num_rows
        self._row_of = unique.row_of.to(x1.device)  # (N,), data set index -> stored row
        self._labels = None if labels is None else labels[unique.first].contiguous()  # (M,), sorted
        self._slices = _slices(self._labels)
        self._table = self._build_table(flat, unique)  # (M, D + NUM_EXTRA)
        self.max_spread = float(self._table[:, self.num_dims].max())  # largest squared distance to the mean

    def _build_table(self, flat: Tensor, unique: _Distinct) -> Tensor:
        """Rows [x, ||x - mean||^2, 1, log count in the class, log count in the whole bank], one per distinct row."""
        dims = self.num_dims
        table = torch.empty(len(unique.first), dims + NUM_EXTRA, device=flat.device)
        for start in range(0, len(table), 8192):
            piece = flat[unique.first[start : start + 8192].to(flat.device)]
            table[start : start + 8192, :dims] = piece
            table[start : start + 8192, dims] = (piece.double() - self.mean).square().sum(1).float()
        table[:, dims + 1] = 1
        table[:, dims + 2] = unique.class_count.log().to(table)
        table[:, dims + 3] = unique.total_count.log().clamp(min=_NEVER).to(table)
        return table

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._table.device

    @property
    def num_distinct(self) -> int:
        """Number of stored rows: distinct images, counted once per label that they carry."""
        return self._table.shape[0]

    @property
    def has_labels(self) -> bool:
        """Whether the rows carry labels."""
        return self._labels is not None

    @property
    def classes(self) -> list[int]:
        """The labels that occur, in order; empty without labels."""
        return list(self._slices)

    @property
    def label_counts(self) -> dict[int, int]:
        """Number of training rows of each label, in order; empty without labels."""
        counts = self._table[:, self.num_dims + 2].exp().round().long()
        return {label: int(counts[rows].sum()) for label, rows in self._slices.items()}

    @property
    def num_bytes(self) -> int:
        """Memory that the rows take."""
        return self._table.nbytes

    @property
    def rms_norm(self) -> float:
        """Root mean square norm of the rows, the unit in which errors of the posterior mean are stated."""
        spread = self._table[:, self.num_dims].double() * self._table[:, self.num_dims + 2].double().exp()
        return float(torch.sqrt(spread.sum() / self.num_rows + self.mean.square().sum()))

    def slice_of(self, label: int) -> slice:
        """The stored rows of a label; -1 stands for all of them.

        Raises:
            ValueError: if no row has the label.
        """
        if label == -1:
            return slice(0, self.num_distinct)
        if not self.has_labels:
            raise ValueError(f"label {label} was asked for, but the bank has no labels: build it with labels=")
        if label not in self._slices:
            known = self.classes
            raise ValueError(
                f"no row of the bank has label {label} (labels run from {known[0]} to {known[-1]}); "
                "an unconditional row is marked by -1, not by a null class's number"
            )
        return self._slices[label]

    def chunks(self, rows: slice, size: int) -> Iterator[tuple[int, Tensor]]:
        """Pieces of at most ``size`` stored rows, with the number of their first row: (size, D + NUM_EXTRA) views."""
        for start in range(rows.start, rows.stop, size):
            yield start, self._table[start : min(start + size, rows.stop)]

    def stored(self, rows: Tensor) -> Tensor:
        """Stored rows by their place in the table (B,): (B, D)."""
        return self._table[rows, : self.num_dims]

    def log_count(self, rows: Tensor, label: int) -> Tensor:
        """Log of how often stored rows (B,) occur: in their class, or in the whole bank for label -1: (B,) float32."""
        return self._table[rows, self.num_dims + count_column(label)]

    def rows(self, index: Tensor) -> Tensor:
        """Training rows by their index in the data set (B,), flips included: (B, ...), bit for bit as given."""
        return self.stored(self._row_of[index.to(self.device)]).reshape(-1, *self.shape)

    def labels_of(self, index: Tensor) -> Tensor:
        """Labels of training rows by their index in the data set (B,): (B,) int64; -1 without labels."""
        if self._labels is None:
            return torch.full_like(index, -1, device=self.device)
        return self._labels[self._row_of[index.to(self.device)]]

    def covariance(self) -> Tensor:
        """Covariance of the training rows: (D, D) float64."""
        total = torch.zeros(self.num_dims, self.num_dims, dtype=torch.float64, device=self.device)
        for _, piece in self.chunks(self.slice_of(-1), 8192):
            centred = piece[:, : self.num_dims].double() - self.mean
            total += (centred * piece[:, self.num_dims + 2, None].double().exp()).T @ centred
        return total / self.num_rows

    def to(self, device: torch.device | str) -> DataBank:
        """Move the bank, in place as `nn.Module.to` does, so that all who hold it share one copy; returns itself."""
        self._table = self._table.to(device)
        self._row_of = self._row_of.to(device)
        self.mean = self.mean.to(device)
        if self._labels is not None:
            self._labels = self._labels.to(device)
        return self

    def __len__(self) -> int:
        return self.num_rows

    def __deepcopy__(self, memo: dict) -> DataBank:
        return self

    def __repr__(self) -> str:
        labels = f"{len(self._slices)} labels" if self.has_labels else "no labels"
        return f"DataBank({self.num_rows} rows, {self.num_distinct} distinct, shape {self.shape}, {labels})"


def _check(x1: Tensor, labels: Tensor | None) -> None:
    if x1.ndim < 2 or x1.shape[0] == 0 or x1[0].numel() == 0:
        raise ValueError(f"a bank needs at least one row of at least one value, got x1 of shape {tuple(x1.shape)}")
    if not x1.is_floating_point():
        raise ValueError(f"the bank holds what the network sees, as floating point; x1 is {x1.dtype}: preprocess it")
    for start in range(0, x1.shape[0], 8192):
        finite = torch.isfinite(x1[start : start + 8192].float()).flatten(1).all(1)
        if not bool(finite.all()):
            row = start + int((~finite).nonzero()[0])
            raise ValueError(f"row {row} of the bank holds NaN or infinity: find out what preprocessing made it")
    if labels is None:
        return
    if labels.shape != (x1.shape[0],) or labels.is_floating_point():
        raise ValueError(
            f"need one integer label per row: x1 has {x1.shape[0]} rows, labels are {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels of bank rows are 0 or larger, got {int(labels.min())}; -1 marks queries only")


class _Distinct:
    """Which rows are equal: within their label, and over the whole bank."""

    def __init__(self, first: Tensor, row_of: Tensor, class_count: Tensor, total_count: Tensor) -> None:
        self.first = first  # (M,) data set index of each stored row, sorted by label
        self.row_of = row_of  # (N,) stored row of each data set index
        self.class_count = class_count  # (M,) float64, copies with the same label
        self.total_count = total_count  # (M,) float64, copies whatever their label; 0 on all but the first of them


def _distinct_rows(flat: Tensor, labels: Tensor | None) -> _Distinct:
    """Group equal rows (by value) of ``flat`` (N, D); the first of each group stands for it."""
    num_rows = flat.shape[0]
    image = np.empty(num_rows, dtype=np.int64)  # (N,) the first row with the same values
    seen: dict[bytes, int] = {}
    for start in range(0, num_rows, 8192):
        piece = (flat[start : start + 8192] + 0.0).cpu().numpy()  # + 0.0 makes -0.0 and 0.0 the same bytes
        for i, row in enumerate(piece, start):
            # 128 bits of hash stand for the row: the rows themselves as keys would be a second bank
            image[i] = seen.setdefault(hashlib.blake2b(row, digest_size=16).digest(), i)
    label = np.zeros(num_rows, dtype=np.int64) if labels is None else labels.cpu().numpy()
    pairs, first, row_of, class_count = np.unique(
        np.stack([label, image], 1), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    images, first_pair = np.unique(pairs[:, 1], return_index=True)
    total_count = np.zeros(len(pairs))
    total_count[first_pair] = np.bincount(image, minlength=num_rows)[images]
    return _Distinct(
        torch.from_numpy(first),
        torch.from_numpy(row_of.reshape(-1)),
        torch.from_numpy(class_count).double(),
        torch.from_numpy(total_count),
    )


def _slices(labels: Tensor | None) -> dict[int, slice]:
    if labels is None:
        return {}
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return {v: slice(end - n, end) for v, n, end in zip(values.tolist(), counts.tolist(), ends, strict=True)}
