"""Posterior weights from direct differences in float64, for queries whose logits float32 products cannot resolve.

Near t = 1 the products are of the size of a ||x||^2 / s^2, and their rounding decides between rows that are closer to
each other than some 1e-4 of their norm. Few rows are in question then: those are scored again.

Shapes: B queries, P pairs of a query and a row in question, D values per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.oracle.bank import DataBank

MAX_VALUES = 2**22
"""Values that are gathered at a time."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Rounding error of a logit, over the norms of its two factors: more than is seen at D = 1, where nothing averages."""

MAX_CANDIDATES = 1024
"""Rows in question, of one piece, beyond which a query is left as it is."""

COARSE = 1e-3
"""Rounding error of a logit from which on a query is scored again."""


def rounding_error(query: Tensor, bank: DataBank) -> Tensor:
    """Bound (B, 1) on the rounding error of the logits that the factors ``query`` (B, D + extra) give."""
    products = query[:, : bank.num_dims].norm(dim=1, keepdim=True) * bank.max_norm
    return ROUNDING * (products + query[:, bank.num_dims, None].abs() * bank.max_spread)


def rescore(
    bank: DataBank, x_t: Tensor, alpha: Tensor, sigma: Tensor, label: int, pairs: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The posterior over the rows in question.

    Args:
        bank: the training set.
        x_t: (B, D) float32 queries.
        alpha: (B, 1) float64, of the path.
        sigma: (B, 1) float64, positive.
        label: of the queries, -1 = unconditional.
        pairs: (P,) places of queries and (P,) stored rows; each query has its most likely row among them.

    Returns:
        mean (B, D), and top1, ess, entropy and variance (B,), float32; garbage for queries without a pair.
    """
    queries, rows = pairs
    pieces = torch.arange(len(queries), device=x_t.device).split(max(1, MAX_VALUES // bank.num_dims))
    zeros = torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)

    logits = bank.log_count(rows, label).double()  # (P,)
    for piece in pieces:
        q = queries[piece]
        away = x_t[q].double() - alpha[q] * bank.stored(rows[piece]).double()
        logits[piece] -= away.square().sum(1) / (2 * sigma[q, 0] ** 2)
    peak = torch.full_like(zeros, -torch.inf).scatter_reduce(0, queries, logits, "amax")
    weights = torch.exp(logits - peak[queries])
    weights /= zeros.index_add(0, queries, weights)[queries]

    mean = torch.zeros(x_t.shape, dtype=torch.float64, device=x_t.device)
    for piece in pieces:
        mean.index_add_(0, queries[piece], weights[piece, None] * bank.stored(rows[piece]).double())
    variance = zeros.clone()
    for piece in pieces:
        q = queries[piece]
        spread = (bank.stored(rows[piece]).double() - mean[q]).square().sum(1)
        variance.index_add_(0, q, weights[piece] * spread)
    found = {
        "mean": mean,
        "top1": zeros.scatter_reduce(0, queries, weights, "amax"),
        "ess": 1 / zeros.index_add(0, queries, weights.square()),
        "entropy": zeros.index_add(0, queries, torch.special.entr(weights)),
        "variance": variance,
    }
    return {name: value.float() for name, value in found.items()}
