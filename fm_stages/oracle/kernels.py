"""The two matrix products of the oracle, accurate as float32 whatever the rows are stored as.

On a CPU they are float32 products. Tensor cores multiply halves exactly and add up in float32, so on CUDA each float32
operand is split into two float16 terms, x = 2^-k (high + 2^-11 low), which hold 22 bits; 8-bit, float16 and (scaled by
a power of two) bfloat16 rows are one term. Two or three products of halves then do what one in float32 would, and the
term that is left out, low x low, is 2^-22 of the result.  Source of the scheme: Ootomo and Yokota, arXiv 2203.03341.

Shapes: B queries, C rows of a piece, D values per row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fm_stages.oracle.bank import NUM_EXTRA, DataBank

LOW = 2.0**-11
"""Of a split number's low term: float16 has 11 bits."""

WIDENED = 1024
"""Rows that are widened to float32, or gathered, at a time on a CPU."""

SPLIT_VALUES = 2**25
"""Values of rows that are split into terms at a time, which takes some 0.5 GB."""

WEIGHT_SCALE = 2.0**15
"""Makes of a weight of 1 nearly the largest float16, so that small weights keep their bits."""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products added up in float32: no autocast, no TF32, bf16 or float16 in disguise. Restores what it found."""
    # torch has an older setting and newer ones by backend; products on CUDA fail while the two contradict each other
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # someone has set the newer ones only
        older = None
    half_sums = backends[0].allow_fp16_accumulation  # of tensor cores too, whatever dtype they return
    torch.set_float32_matmul_precision("highest")  # the newer ones follow
    backends[0].allow_fp16_accumulation = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        backends[0].allow_fp16_accumulation = half_sums
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, newer, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def factors(bank: DataBank, x_t: Tensor, a: Tensor, s: Tensor, column: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The factor whose product with stored rows gives logits -||x_t - a x_i||^2 / (2 s^2), and what these leave out.

    With r = x_t - a mean and y = x - mean, log g_i = (a / s^2) r . y_i - a^2 / (2 s^2) ||y_i||^2 + log count_i
    - ||r||^2 / (2 s^2). The last term is the same for all rows, and so is what r . y differs by from the product of
    r with stored values. Taking the mean out of the query is exact and shrinks the terms that are subtracted:
    rounding errors fall several-fold.

    Args:
        bank: the training set.
        x_t: (B, D) queries.
        a: (B, 1) float64, alpha of the weights.
        s: (B, 1) float64, positive.
        column: (B,) which of the bank's extra columns holds the log counts to add; None: none are added.

    Returns:
        The factor (B, D + NUM_EXTRA) float32, and (B,) float64 to be added to the logits.
    """
    away = x_t - a * bank.mean  # float64
    query = torch.zeros(len(x_t), bank.num_dims + NUM_EXTRA, dtype=torch.float32, device=x_t.device)
    query[:, : bank.num_dims] = bank.affine.to_query(a / s**2 * away).float()
    query[:, bank.num_dims] = (-(a**2) / (2 * s**2))[:, 0].float()
    if column is not None:
        query.scatter_(1, bank.num_dims + column[:, None], 1.0)
    across = away @ (bank.affine.shift - bank.mean)
    offset = (a / s**2)[:, 0] * across - torch.linalg.vector_norm(away, dim=1).square() / (2 * s[:, 0] ** 2)
    return query, offset


def products(bank: DataBank, query: Tensor) -> Products:
    """The way to multiply that suits the device of the bank."""
    return SplitProducts(bank, query) if query.device.type == "cuda" else PlainProducts(bank, query)


class Products(ABC):
    """Products of stored rows with queries (B, D + extra) and with weights."""

    def __init__(self, bank: DataBank, query: Tensor) -> None:
        self.bank = bank
        self.query = query

    @abstractmethod
    def logits(self, rows: slice | Tensor, out: Tensor) -> None:
        """Write query @ rows.T (B, C) into ``out``."""

    @abstractmethod
    def accumulate(self, total: Tensor, weights: Tensor, rows: slice | Tensor) -> None:
        """Add weights (b, C) in [0, 1] @ rows with their extra columns to ``total`` (b, D + extra) float32."""

    def add_weighted(self, total: Tensor, queries: Tensor | slice, weights: Tensor, rows: slice | Tensor) -> None:
        """Accumulate the sums of some queries (b,) in those of all, (B, D + extra)."""
        own = total[queries]
        self.accumulate(own, weights, rows)
        if isinstance(queries, Tensor):  # of a slice they are the same memory
            total[queries] = own


class PlainProducts(Products):
    """Float32 products. Rows that must be copied for them are copied a few at a time, to stay in the caches."""

    def logits(self, rows: slice | Tensor, out: Tensor) -> None:
        """See `Products`."""
        for part, columns in self._parts(rows, out):
            torch.mm(self.query, self.bank.table(part).T, out=columns)

    def accumulate(self, total: Tensor, weights: Tensor, rows: slice | Tensor) -> None:
        """See `Products`."""
        for part, columns in self._parts(rows, weights):
            # parts are summed by themselves: many small terms added to a large one would all be rounded the same way
            total += columns @ self.bank.table(part)

    def _parts(self, rows: slice | Tensor, columns: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
        if isinstance(rows, slice) and self.bank.dtype == torch.float32:
            return iter([(rows, columns)])
        return in_parts(rows, columns, WIDENED)


class SplitProducts(Products):
    """Products of float16 terms that are added up in float32.

    Args:
        bank: the training set.
        query: (B, D + extra) float32 factors of the logits.
    """

    def __init__(self, bank: DataBank, query: Tensor) -> None:
        super().__init__(bank, query)
        self._most_rows = max(1, SPLIT_VALUES // bank.num_dims)
        direction, self._extra = query.split([bank.num_dims, query.shape[1] - bank.num_dims], 1)
        # powers of two, so that scaling is exact: rows stay below 2^15, queries below 2
        self._row_scale = 2.0 ** (14 - math.frexp(bank.max_norm)[1])
        # of queries below 2^-100, as at t = 1e-40, it would be infinite
        exponent = torch.frexp(direction.abs().amax(1, keepdim=True)).exponent.clamp(min=-100)
        self._query_scale = torch.exp2(-exponent.float())
        self._terms = torch.cat(split(direction * self._query_scale))  # (2 B, D) float16

    def logits(self, rows: slice | Tensor, out: Tensor) -> None:
        """See `Products`."""
        for part, columns in in_parts(rows, out, self._most_rows):
            stored, extra = self.bank.parts(part)
            high, *low = self._split(stored)
            torch.add(*_halves(multiply(self._terms, high.T)), alpha=LOW, out=columns)
            for term in low:
                columns.add_(multiply(self._terms[: len(out)], term.T), alpha=LOW)
            columns.div_(self._query_scale * self._row_scale)
            columns.addmm_(self._extra, extra.T)

    def accumulate(self, total: Tensor, weights: Tensor, rows: slice | Tensor) -> None:
        """See `Products`."""
        for part, columns in in_parts(rows, weights, self._most_rows):
            stored, extra = self.bank.parts(part)
            high, *low = self._split(stored)
            terms = torch.cat(split(columns * WEIGHT_SCALE))  # (2 b, C) float16
            values = torch.add(*_halves(multiply(terms, high)), alpha=LOW)
            for term in low:
                values.add_(multiply(terms[: len(weights)], term), alpha=LOW)
            total += torch.cat([values.div_(WEIGHT_SCALE * self._row_scale), columns @ extra], 1)

    def _split(self, stored: Tensor) -> tuple[Tensor, ...]:
        """The terms of rows, each (C, D) float16: two of float32 rows, one of any other."""
        if stored.dtype == torch.float32:
            return split(stored * self._row_scale)
        if stored.dtype == torch.uint8:
            return (stored.half() * self._row_scale,)
        return ((stored * self._row_scale).half(),)


def in_parts(rows: slice | Tensor, columns: Tensor, size: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Rows, by slice or index (C,), and what goes with them, (B, C), a few at a time."""
    parts: Sequence[slice | Tensor]
    if isinstance(rows, slice):
        parts = [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
    else:
        parts = rows.split(size)
    return zip(parts, columns.split(size, 1), strict=True)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two float16 terms of a float32 tensor: x = high + LOW * low to 22 bits, for |x| < 65504."""
    high = x.half()
    return high, ((x - high.float()) / LOW).half()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of float16 matrices, added up and returned in float32."""
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()  # products of halves are exact in float32: the plain twin


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    upper, lower = x.chunk(2)
    return upper, lower
