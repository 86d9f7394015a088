"""What the oracle is compared with: other ways to the posterior mean or the target, and the truth in float64.

Shapes: B queries, N rows, D values per row.  a = alpha(t), s = sigma(t).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from banks import PATH, PIECE
from torch import Tensor

from fm_stages.flow import keyed_generator
from fm_stages.oracle import DataBank


def two_products(x_t: Tensor, rows: Tensor, allocate: bool = False) -> Callable[[], None]:
    """The two float32 products of queries (B, D) with rows (N, D).

    Into memory that is there already, which is less than a caller would pay who writes x_t @ rows.T; with ``allocate``
    as that caller would write them.
    """
    device = rows.device
    logits = torch.empty(len(x_t), len(rows), device=device)  # (B, N)
    generator = keyed_generator("benchmark weights", device=device)
    weights = torch.rand(len(x_t), len(rows), generator=generator, device=device)  # (B, N)
    mean = torch.empty_like(x_t)

    def work() -> None:
        torch.mm(x_t, rows.T, out=logits)
        torch.mm(weights, rows, out=mean)

    def as_written() -> None:
        x_t @ rows.T
        weights @ rows

    return as_written if allocate else work


def full_softmax(x_t: Tensor, t: Tensor, rows: Tensor, square: Tensor) -> Tensor:
    """The posterior mean (B, D) as one would write it at first; ``square`` (N,) are the rows' squared norms.

    The products are in the dtype of the rows, the softmax in float32, as under autocast.
    """
    a, s = PATH.alpha(t)[:, None], PATH.sigma(t)[:, None]  # (B, 1)
    products = (x_t.to(rows.dtype) @ rows.T).float()
    logits = (a / s**2) * products - (a**2 / (2 * s**2)) * square  # (B, N)
    return torch.softmax(logits, 1).to(rows.dtype) @ rows


def multi_sample_target(x_t: Tensor, t: Tensor, rows: Tensor, chunk: int) -> Tensor:
    """Self-normalised average of the conditional velocities of ``rows``, by broadcasting (B, chunk, D) tensors: (B, D).

    The formula of Stable Target Field (arXiv 2302.00670) and Stable Velocity (arXiv 2602.05435), written down as it
    stands: weights w_i = p(x_t | x_i) / sum_j p(x_t | x_j), target sum_i w_i u(x_t | x_i) with
    u(x_t | x_i) = (a' - a s' / s) x_i + s' / s x_t.
    """
    a, s, da, ds = (f(t)[:, None, None] for f in (PATH.alpha, PATH.sigma, PATH.d_alpha, PATH.d_sigma))  # (B, 1, 1)
    queries = x_t[:, None]  # (B, 1, D)
    logits = [(queries - a * part).square().sum(2) / (-2 * s[:, 0] ** 2) for part in rows.split(chunk)]
    weights = torch.softmax(torch.cat(logits, 1), 1)  # (B, N)
    target = torch.zeros_like(x_t)
    for weight, part in zip(weights.split(chunk, 1), rows.split(chunk), strict=True):
        velocity = (da - a * ds / s) * part + ds / s * queries  # (B, C, D)
        target += (weight[:, :, None] * velocity).sum(1)
    return target


def exact_mean(x_t: Tensor, t: Tensor, bank: DataBank) -> Tensor:
    """Posterior mean (B, D) in float64, from the rows themselves in pieces."""
    a, s = PATH.alpha(t.double())[:, None], PATH.sigma(t.double())[:, None]  # (B, 1)
    wide = x_t.double().flatten(1)
    pieces = torch.arange(bank.num_rows).split(4096)
    logits = []
    for piece in pieces:
        rows = bank.rows(piece).double().flatten(1)
        logits.append(a / s**2 * (wide @ rows.T) - a**2 / (2 * s**2) * rows.square().sum(1))
    weights = torch.softmax(torch.cat(logits, 1), 1)  # (B, N)
    mean = torch.zeros_like(wide)
    for part, piece in zip(weights.split(4096, 1), pieces, strict=True):
        mean += part @ bank.rows(piece).double().flatten(1)
    return mean


def error(mean: Tensor, truth: Tensor, bank: DataBank) -> float:
    """||m - m_64|| over the root mean square norm of the rows, largest of the queries."""
    return float((mean.flatten(1).double() - truth).norm(dim=1).max() / bank.rms_norm)


def measure_nearest_of(bank: DataBank, index: Tensor) -> None:
    """Put into ``bank.nearest`` what `measure_nearest` would for training rows (B,), and 0, which skips nothing, for
    all others: a batch needs no more, and the whole table takes N / B times as long."""
    own, place = bank.rows(index).flatten(1).double(), bank.place_of(index)
    nearest = torch.full((len(own),), torch.inf, dtype=torch.float64, device=bank.device)
    for piece in torch.arange(bank.num_rows).split(PIECE):
        rows = bank.rows(piece).flatten(1).double()
        squares = own.square().sum(1)[:, None] - 2 * own @ rows.T + rows.square().sum(1)  # (B, C)
        squares[place[:, None] == bank.place_of(piece)] = torch.inf
        nearest = torch.minimum(nearest, squares.amin(1))
    bank.nearest = torch.zeros(bank.num_rows, device=bank.device)
    bank.nearest[index.to(bank.device)] = nearest.clamp(min=0).sqrt().float()
