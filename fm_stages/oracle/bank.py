"""The bank: the training set as the oracle sees it, whole or this rank's shard of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.oracle import ranks
from fm_stages.oracle.affine import Affine
from fm_stages.oracle.distinct import Shard, distinct_rows
from fm_stages.oracle.inputs import check_index, check_rows
from fm_stages.oracle.stored_rows import RowReader, Survey, piece

NUM_EXTRA = 4
"""Columns kept behind each row's values: what lets one matrix product yield logits and sums at once."""

LARGEST_SPREAD = torch.finfo(torch.float32).max / 2**10
"""Of a row's squared distance to the mean: sums and differences of such products have to be finite, too."""

_NEVER = -1e4
"""Log of a zero count: finite, because the products multiply it by 0 for the queries that it does not concern, and
small enough to vanish beside any weight that counts."""


def count_columns(labels: Tensor) -> Tensor:
    """Which of the extra columns hold the log counts that apply to queries with these labels (B,): (B,) int64."""
    return torch.where(labels == -1, 3, 2)


class DataBank:
    """The training set, point by point, in the form that the oracle's two matrix products want.

    What the network sees of row i is ``scale * x1[i] + shift`` in float32; stored is x1 in its own dtype, so that a
    bank of 8-bit pixels takes a byte per value. Equal rows are stored once with their count, so that k copies of an
    image weigh k times without capping top1 at 1/k. Rows are sorted by label, so that a class is a slice. A plain
    object that deep-copies to itself: neither a copied module nor a checkpoint may carry the training set.

    With a process group the bank is *sharded*: each rank brings its rows, and the bank is all of them, in the order of
    the ranks. Then every rank makes the bank, and enters every call of `rows`, `labels_of`, `covariance` and of the
    oracle, with no queries if need be; these wait for one another.

    Args:
        x1: (N, ...) the training rows (same normalisation as in training; flips as rows of their own): uint8 with a
            scale, float16, bfloat16 or float32; float64 rows are rounded to float32. Of this rank, if there is a group.
            A `RowReader` in place of a tensor reads them twice, a piece at a time, and they are in memory only once.
        labels: (N,) int64, 0 or larger, or None for an unlabelled set.
        scale: number, or tensor that broadcasts to a row, by which stored values are multiplied.
        shift: likewise, what is added then.
        group: process group over which the bank is sharded; None: it is all here.

    Raises:
        TypeError: if x1 or labels are no tensors.
        ValueError: if there is no row, the labels do not match, a value is not finite, or the ranks' parts differ in
            kind; on every rank.
    """

    def __init__(
        self,
        x1: Tensor | RowReader,
        labels: Tensor | None = None,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.group = group
        with ranks.together(group) as meeting:
            for name, value, kinds in (("x1", x1, Tensor | RowReader), ("labels", labels, Tensor | None)):
                if not isinstance(value, kinds):
                    remedy = f"torch.as_tensor({name}) makes one"
                    raise TypeError(f"{name} is a tensor, got {type(value).__name__}: {remedy}")
            rows, labels = RowReader.of(x1), None if labels is None else labels.detach()
            check_rows(rows, labels, scale, shift)
            self.shape, self.num_dims, self.dtype = tuple(rows.shape[1:]), rows.num_dims, rows.stored_dtype
            self.affine = Affine(scale, shift, self.shape, rows.device)
            scale_in_short, shift_in_short = self.affine.in_short
            meeting.alike = {
                "the shape of a row": self.shape,
                "the dtype of rows": self.dtype,
                "having labels": labels is not None,
                "the scale": scale_in_short,
                "the shift": shift_in_short,
            }
        with ranks.together(group):
            survey = Survey.of(rows)

        unique = distinct_rows(survey.digests, labels, group)
        self.num_rows = len(unique.stored)
        self.num_distinct = len(unique.label)
        self.label_counts = {} if labels is None else unique.label_counts()
        own = unique.of(unique.offset, unique.offset + rows.shape[0])
        self._row_of = own.place.to(rows.device)  # (N,) int32, data set index -> stored row here, or -1
        self._slices = {} if labels is None else _slices(own.label)

        self.mean = self.affine(ranks.reduce(survey.total, group) / self.num_rows)  # (D,) float64, over all N rows
        self.nearest: Tensor | None = None
        """Distance of each training row (N,) to the nearest other image, or a little less, if it was measured."""
        self._table: Tensor | None = None
        with ranks.together(group):
            self._store(rows, own)
        spread = self._extra[:, 0].amax(0) if len(self._extra) else torch.zeros_like(survey.norm)
        most = ranks.reduce(torch.stack([survey.norm, spread]).double(), group, "max")
        self.max_norm, self.max_spread = most.tolist()  # of a row as stored; largest squared distance to the mean
        total = ranks.reduce((self._extra[:, 0].double() * own.class_count.to(rows.device)).sum(), group)
        self.rms_norm = float(torch.sqrt(total / self.num_rows + self.mean.square().sum()))
        """Root mean square norm of what the network sees, the unit of errors of the posterior mean."""
        largest = max(self.max_spread, self.max_norm**2)  # the same on all ranks
        if not largest <= LARGEST_SPREAD or not math.isfinite(self.rms_norm):
            raise ValueError(
                f"rows are too large: their squared norms leave float32's range (a stored row has the norm "
                f"{self.max_norm:.3g}); choose scale and shift so that values are of the size of 1, the noise's"
            )

    def _store(self, rows: RowReader, own: Shard) -> None:
        """Stored rows (M, D), and beside them [||x - mean||^2, 1, log count in the class, log count in the bank].

        Float32 rows and these columns are one table, which products take as it is.
        """
        dims, num, device = self.num_dims, len(own.first), rows.device
        if self.dtype == torch.float32:
            self._table = torch.empty(num, dims + NUM_EXTRA, dtype=torch.float32, device=device)
            self._rows, self._extra = self._table[:, :dims], self._table[:, dims:]
        else:
            self._rows = torch.empty(num, dims, dtype=self.dtype, device=device)
            self._extra = torch.empty(num, NUM_EXTRA, dtype=torch.float32, device=device)
        # in the order that the rows lie in; all of a rank's rows may be stored elsewhere
        for place in own.first.argsort().split(piece(dims)) if num else ():
            values = rows.flat(own.first[place])
            self._rows[place.to(device)] = values
            distance = (self.affine(values.double()) - self.mean).square().sum(1)
            self._extra[place.to(device), 0] = distance.float()
        self._extra[:, 1] = 1
        self._extra[:, 2] = own.class_count.log().to(self._extra)
        self._extra[:, 3] = own.total_count.log().clamp(min=_NEVER).to(self._extra)

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self._rows.device

    @property
    def num_stored(self) -> int:
        """Number of rows that this rank holds."""
        return len(self._rows)

    @property
    def has_labels(self) -> bool:
        """Whether the rows carry labels."""
        return bool(self.label_counts)

    @property
    def classes(self) -> list[int]:
        """The labels that occur, in order; empty without labels."""
        return list(self.label_counts)

    @property
    def num_bytes(self) -> int:
        """Memory that the rows take, on this rank."""
        return self._rows.nbytes + self._extra.nbytes

    def slice_of(self, label: int) -> slice:
        """The stored rows of a label, possibly none on this rank; -1 stands for all of them.

        Raises:
            ValueError: if no row of the bank has the label.
        """
        if label == -1:
            return slice(0, self.num_stored)
        if not self.has_labels:
            raise ValueError(f"label {label} was asked for, but the bank has no labels: build it with labels=")
        if label not in self.label_counts:
            known = self.classes
            raise ValueError(
                f"no row of the bank has label {label} (labels run from {known[0]} to {known[-1]}); "
                "an unconditional row is marked by -1, not by a null class's number"
            )
        return self._slices.get(label, slice(0, 0))

    def count_of(self, label: int) -> int:
        """Training rows of a label, on all ranks; -1 stands for all labels."""
        return self.label_counts.get(label, self.num_rows)

    def table(self, rows: slice | Tensor) -> Tensor:
        """Stored rows with their extra columns, (C, D + NUM_EXTRA) float32: of a slice of float32 a view."""
        if self._table is not None:
            return self._table[rows]
        values, extra = self.parts(rows)
        table = extra.new_empty(len(values), self.num_dims + NUM_EXTRA)
        table[:, : self.num_dims], table[:, self.num_dims :] = values, extra
        return table

    def parts(self, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Stored rows (C, D) in their dtype, and their extra columns (C, NUM_EXTRA) float32: of a slice views."""
        return self._rows[rows], self._extra[rows]

    def stored(self, rows: Tensor) -> Tensor:
        """What the network sees of stored rows, by their place on this rank (B,): (B, D) float32."""
        return self.affine(self._rows[rows].float())

    def log_count(self, rows: Tensor, column: Tensor) -> Tensor:
        """Log of how often stored rows (B,) occur, from the extra columns (B,) of `count_columns`: (B,) float32."""
        return self._extra[rows, column]

    def place_of(self, index: Tensor) -> Tensor:
        """Which of this rank's stored rows stands for training rows (B,): (B,) int64; -1 where it is another rank's."""
        return self._row_of[index.to(self.device)].long()

    def rows(self, index: Tensor) -> Tensor:
        """What the network sees of training rows (B,), flips included: (B, ...) float32, with the bits of its batches.

        Of a sharded bank the rows come from the ranks that hold them: every rank calls this, with its own index.
        """
        return self.rows_of_all(index, self._meet(index))

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """x_1 of training rows (B,), as `rows`: a point has only itself to draw."""
        return self.rows(index)

    def subset(self, index: Tensor, labels: bool = True) -> DataBank:
        """A bank of some of the training rows (B,), stored as they are here, with or without their labels.

        Raises:
            ValueError: if the bank is sharded, or an index lies outside it.
        """
        if self.group is not None:
            raise ValueError(
                "a part of a sharded bank lies on several ranks: take it from the rows before you share them"
            )
        check_index(index, self.num_rows)
        rows = self._rows[self.place_of(index)].reshape(len(index), *self.shape)
        own = self.labels_of(index) if self.has_labels and labels else None
        return DataBank(rows, own, *self.affine.of_row)

    def rows_of_all(self, index: Tensor, sizes: list[int]) -> Tensor:
        """`rows` of a checked index, once every rank knows how many the ranks ask for."""
        return self._look_up(index, sizes, self.stored).reshape(len(index), *self.shape)

    def labels_of(self, index: Tensor) -> Tensor:
        """Labels of training rows (B,), by their index in the data set: (B,) int64; -1 without labels. See `rows`."""
        return self.labels_of_all(index, self._meet(index))

    def labels_of_all(self, index: Tensor, sizes: list[int]) -> Tensor:
        """`labels_of` a checked index, once every rank knows how many the ranks ask for."""
        if not self.has_labels:
            return torch.full_like(index, -1, dtype=torch.int64, device=self.device)
        # a rank may hold no row at all
        labels = torch.tensor(list(self._slices), dtype=torch.int64, device=self.device)
        ends = torch.tensor([rows.stop for rows in self._slices.values()], dtype=torch.int64, device=self.device)
        return self._look_up(index, sizes, lambda place: labels[torch.searchsorted(ends, place, right=True)])

    def _meet(self, index: Tensor) -> list[int]:
        """Check what training rows (B,) are asked for; how many each rank asks for."""
        with ranks.together(self.group) as meeting:
            check_index(index, self.num_rows)
            meeting.size = len(index)
        return meeting.sizes

    def _look_up(self, index: Tensor, sizes: list[int], value_of: Callable[[Tensor], Tensor]) -> Tensor:
        """A value for each training row (B,), from whichever rank holds it."""
        if self.group is None:
            return value_of(self.place_of(index))
        place = self.place_of(ranks.gather(index.to(self.device).long(), sizes, self.group))
        here = place >= 0
        own = value_of(place[here])
        values = own.new_zeros(len(place), *own.shape[1:])
        values[here] = own
        values = ranks.reduce(values, self.group)
        return values.split(sizes)[ranks.rank_of(self.group)]

    def covariance(self) -> Tensor:
        """Covariance of the training rows: (D, D) float64, the same on all ranks."""
        total = torch.zeros(self.num_dims, self.num_dims, dtype=torch.float64, device=self.device)
        for place in torch.arange(self.num_stored, device=self.device).split(piece(self.num_dims)):
            centred = self.affine(self._rows[place].double()) - self.mean
            total += (centred * self._extra[place, 2, None].double().exp()).T @ centred
        return ranks.reduce(total, self.group) / self.num_rows

    def to(self, device: torch.device | str) -> DataBank:
        """Move the bank, in place as `nn.Module.to` does, so that all who hold it share one copy; returns itself."""
        if self._table is not None:
            self._table = self._table.to(device)
            self._rows, self._extra = self._table[:, : self.num_dims], self._table[:, self.num_dims :]
        else:
            self._rows, self._extra = self._rows.to(device), self._extra.to(device)
        self._row_of, self.mean = self._row_of.to(device), self.mean.to(device)
        self.affine.to(device)
        self.nearest = None if self.nearest is None else self.nearest.to(device)
        return self

    def __len__(self) -> int:
        return self.num_rows

    def __deepcopy__(self, memo: dict[int, Any]) -> DataBank:
        return self

    def __repr__(self) -> str:
        labels = f"{len(self.classes)} labels" if self.has_labels else "no labels"
        shard = "" if self.group is None else f", {self.num_stored} of them on this rank"
        return f"DataBank({self.num_rows} rows, {self.num_distinct} distinct{shard}, shape {self.shape}, {labels})"


def _slices(labels: Tensor) -> dict[int, slice]:
    """Where each label's rows are, in rows sorted by label (M,)."""
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return {v: slice(end - n, end) for v, n, end in zip(values.tolist(), counts.tolist(), ends, strict=True)}
