"""Queries that need no pass over the bank, because the row they were made from certainly holds the posterior.

A training query is x_t = a x_i + s x_0, with a row i that is known and noise x_0 that knows nothing of the bank. Of
another row j at the distance d_j, the log weight relative to row i is

    l_j - l_i = -a^2 d_j^2 / (2 s^2) + (a / s) x_0 . (x_j - x_i)

and all that must be bounded is the last product, <= z d_j for some z:

* x_0 . (x_j - x_i) is normal with standard deviation d_j, so it exceeds z d_j with probability Q(z) <= exp(-z^2/2) / 2.
  By the union bound over N rows, z = sqrt(2 log(N / (2 p))) fails for any of them with a probability of at most p:
  this certificate is **probabilistic**, p = 1e-9 per query (`FAILURE`).
* By Cauchy-Schwarz z = ||x_0|| never fails. It is the smaller one in few dimensions, and then the certificate is
  **deterministic**.

With e = a d / s, the sum over all rows is at most N exp(-e^2/2 + z e) at the distance d of the nearest one, for that
falls in e where e > z. So the other rows hold less than the tolerance where

    e >= z + sqrt(z^2 + 2 log(N / tolerance)).

The same e bounds the error of the velocity: on the linear path A_t sum_j g_j d_j <= tolerance e / t, a few 1e-5 against
norms of sqrt(D), falling from there. On Fashion-MNIST the deterministic certificate alone would start at t = 0.89, the
probabilistic one starts at 0.73, and the posterior has collapsed (median) at 0.48.

Source: derived here, from the posterior of arXiv 2512.02826, Theorem 2.1.

It is void, and must not be used, for states of a sampler (whose noise has seen the bank), held-out queries (no row is
theirs), banks of mixtures (a row is no point) and tempered posteriors.

Shapes: B queries, N rows, D values per row.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank
from fm_stages.oracle.kernels import factors, full_precision, products
from fm_stages.oracle.stream import rounding_error

FAILURE = 1e-9
"""Probability, per query, with which a certificate may be wrong."""

QUERIES, ROWS = 1024, 4096
"""Rows whose neighbours are looked for at a time, and rows among which."""


def certified(
    bank: DataBank, x_t: Tensor, rows: Tensor, alpha: Tensor, sigma: Tensor, index: Tensor, tolerance: float
) -> Tensor:
    """Which queries (B,) leave less than the tolerance of their mass to other rows than their own.

    Args:
        bank: with `measure_nearest` done.
        x_t: (B, D) queries.
        rows: (B, D) the rows that they were made from.
        alpha: (B, 1) float64, of the path.
        sigma: (B, 1) float64.
        index: (B,) int64, of these rows in the data set.
        tolerance: of posterior mass, positive.
    """
    assert bank.nearest is not None
    scale = (alpha / sigma)[:, 0]
    noise = ((x_t - alpha * rows) / sigma).norm(dim=1)
    chance = math.sqrt(2 * math.log(bank.num_rows / (2 * FAILURE)))
    z = noise.clamp(max=chance)
    threshold = z + torch.sqrt(z**2 + 2 * math.log(bank.num_rows / tolerance))
    return scale * bank.nearest[index.to(bank.device)] >= threshold


@torch.no_grad()
def measure_nearest(bank: DataBank) -> None:
    """Measure how far each training row is from the nearest other image, and keep it as ``bank.nearest`` (N,).

    Once, with a progress bar: N^2 D multiplications. Labels play no part, so the numbers hold for the whole bank and
    for each class; an image that occurs under two labels has 0. They are lower bounds: rounding errors are taken off.
    Every rank of a sharded bank calls this.
    """
    squares = torch.zeros(bank.num_rows, dtype=torch.float64, device=bank.device)
    quiet = dist.is_available() and dist.is_initialized() and dist.get_rank() != 0
    with tqdm(total=bank.num_rows, desc="Nearest neighbours", unit="row", disable=quiet) as bar:
        for index in torch.arange(bank.num_rows, device=bank.device).split(QUERIES):
            squares[index] = _nearest_squares(bank, index)
            bar.update(len(index))
    bank.nearest = ranks.reduce(squares, bank.group, "min").clamp(min=0).sqrt().float()


def _nearest_squares(bank: DataBank, index: Tensor) -> Tensor:
    """Lower bounds (B,) on the squared distance of training rows to the other rows that this rank holds."""
    one = torch.ones(len(index), 1, dtype=torch.float64, device=bank.device)
    query, offset = factors(bank, bank.rows(index).flatten(1), one, one)  # logits are -||x_i - x_j||^2 / 2
    own = bank.place_of(index)
    with full_precision(bank.device):
        rows_by_query = products(bank, query)
        largest = torch.full_like(query[:, 0], -torch.inf)
        for start in range(0, bank.num_stored, ROWS):
            rows = slice(start, min(start + ROWS, bank.num_stored))
            found = torch.empty(len(index), rows.stop - start, dtype=torch.float32, device=bank.device)
            rows_by_query.logits(rows, found)
            here = ((own >= start) & (own < rows.stop)).nonzero()[:, 0]
            found[here, own[here] - start] = -torch.inf
            largest = torch.maximum(largest, found.amax(1))
    squares = -2 * (largest.double() + offset)
    return squares - 2 * rounding_error(query, bank)
