"""The rows that a bank is made of, read a piece at a time, twice, so that they are in memory only once.

The first pass sees whether they are finite, and finds a hash of each, by which equal ones are known, their sum and the
largest norm. The second one puts each row that stands for others in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_VALUES = 2**25
"""Values that are worked on at a time where something is done to all rows once."""

KEPT = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
"""What rows are stored as: as they come."""


def piece(num_dims: int) -> int:
    """How many rows that is, of D values."""
    return max(1, min(8192, MAX_VALUES // num_dims))


@dataclass(frozen=True)
class RowReader:
    """N rows somewhere, which are read by their number.

    Attributes:
        shape: (N, ...).
        dtype: of the values.
        read: rows (M,) int64, in rising order, as (M, ...) of that dtype.
        device: where they come out.
        name_of: what a row is called in an error.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Tensor], Tensor]
    device: torch.device = torch.device("cpu")
    name_of: Callable[[int], str] = "row {} of x1".format

    @staticmethod
    def of(rows: Tensor | RowReader) -> RowReader:
        """Those of a tensor (N, ...)."""
        if isinstance(rows, RowReader):
            return rows
        rows = rows.detach()

        def read(index: Tensor) -> Tensor:
            first, last = int(index[0]), int(index[-1]) + 1
            whole = last - first == len(index)  # a view of neighbours, no copy of them
            return rows[first:last] if whole else rows[index.to(rows.device)]

        return RowReader(tuple(rows.shape), rows.dtype, read, rows.device)

    @property
    def num_dims(self) -> int:
        """D, the number of values of a row."""
        return torch.Size(self.shape[1:]).numel()

    @property
    def stored_dtype(self) -> torch.dtype:
        """What a bank keeps them as."""
        return self.dtype if self.dtype in KEPT else torch.float32

    def flat(self, index: Tensor) -> Tensor:
        """Rows (M,) as a bank keeps them: (M, D)."""
        return self.read(index).reshape(len(index), -1).to(self.stored_dtype)

    def pieces(self) -> Iterator[Tensor]:
        """All rows as `flat`, a piece at a time."""
        for index in torch.arange(self.shape[0]).split(piece(self.num_dims)):
            yield self.flat(index)


@dataclass
class Survey:
    """What one pass over rows finds.

    Attributes:
        digests: (N, 16) uint8, 128-bit hashes of rows, equal for equal values.
        total: (D,) float64, sum over the rows.
        norm: () float32, the largest of a row.
    """

    digests: Tensor
    total: Tensor
    norm: Tensor

    @staticmethod
    def of(rows: RowReader) -> Survey:
        """Read all rows once.

        Raises:
            ValueError: if a value is not finite.
        """
        digests = torch.empty(rows.shape[0], 16, dtype=torch.uint8)
        total = torch.zeros(rows.num_dims, dtype=torch.float64, device=rows.device)
        norm = torch.zeros((), device=rows.device)
        start = 0
        for values in rows.pieces():
            norms = values.float().norm(dim=1)  # finite, unless a value is not or their squares are too large
            if rows.dtype != torch.uint8 and not bool(norms.isfinite().all()):
                _check_finite(values, start, rows)
            digests[start : start + len(values)] = _digests(values)
            total += values.double().sum(0)
            norm = torch.maximum(norm, norms.max())
            start += len(values)
        return Survey(digests, total, norm)


def _check_finite(values: Tensor, start: int, rows: RowReader) -> None:
    finite = torch.isfinite(values).all(1)
    if not bool(finite.all()):
        row = start + int((~finite).nonzero()[0])
        raise ValueError(f"{rows.name_of(row)} holds NaN or infinity: find out what preprocessing made it")


def _digests(rows: Tensor) -> Tensor:
    """128-bit hashes of rows (C, D), equal for equal values: (C, 16) uint8, on the CPU."""
    same_zero = rows if rows.dtype == torch.uint8 else rows + 0.0  # makes -0.0 and 0.0 the same bytes
    data = same_zero.contiguous().view(torch.uint8).cpu().numpy()
    hashes = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in data)
    return torch.frombuffer(bytearray(hashes), dtype=torch.uint8).reshape(-1, 16)
