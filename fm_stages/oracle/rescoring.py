"""Posterior weights of single rows from direct differences in float64.

Near t = 1 the logits are of the size of a ||x||^2 / s^2, and their float32 rounding decides between rows that are
closer to each other than some 1e-4 of their norm. Few rows are in question then: they are scored again, and what they
add is exact. The same is the cheapest way for any query that few rows matter to.

Shapes: B queries, P pairs of a query and a row, D values per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.oracle.bank import DataBank
from fm_stages.oracle.merge import Partial

MAX_VALUES = 2**20
"""Values that are gathered at a time."""


def rescore(
    bank: DataBank, x_t: Tensor, alpha: Tensor, sigma: Tensor, column: Tensor, queries: Tensor, rows: Tensor
) -> Partial:
    """The posterior over pairs of a query and a row.

    Args:
        bank: the training set.
        x_t: (B, D) float32 queries.
        alpha: (B, 1) float64, of the path.
        sigma: (B, 1) float64, positive.
        column: (B,) which of the bank's extra columns holds the log counts that apply.
        queries: (P,) places of the queries.
        rows: (P,) places of the rows.

    Returns:
        The sums; empty for queries without a pair.
    """
    num, num_dims = x_t.shape
    part = Partial.empty(x_t)
    if not len(queries):
        return part
    pieces = torch.arange(len(queries), device=x_t.device).split(max(1, MAX_VALUES // num_dims))

    logits = bank.log_count(rows, column[queries]).double()  # (P,)
    for piece in pieces:
        q = queries[piece]
        away = x_t[q] - alpha[q] * bank.stored(rows[piece])  # float64
        logits[piece] -= away.square().sum(1) / (2 * sigma[q, 0] ** 2)
    part.peak.scatter_reduce_(0, queries, logits, "amax")
    depth = logits - part.peak[queries]
    weights = torch.exp(depth)
    # the first pair at the peak stands for the best row
    order = torch.arange(len(queries), device=x_t.device)
    first = torch.full((num,), len(queries), device=x_t.device)
    first.scatter_reduce_(0, queries, torch.where(depth == 0, order, len(queries)), "amin")
    used = (first < len(queries)).nonzero()[:, 0]
    part.best[used] = bank.stored(rows[first[used]]).double()

    part.weight.index_add_(0, queries, weights)
    part.square.index_add_(0, queries, weights.square())
    part.depth.index_add_(0, queries, weights * depth)
    others = (order != first[queries]).nonzero()[:, 0]
    for piece in others.split(max(1, MAX_VALUES // num_dims)):
        q = queries[piece]
        away = bank.stored(rows[piece]) - part.best[q]
        part.moment.index_add_(0, q, weights[piece, None] * away)
        part.spread.index_add_(0, q, weights[piece] * away.square().sum(1))
    return part
