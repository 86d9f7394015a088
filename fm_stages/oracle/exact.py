"""The exact posterior over the bank and the oracle velocity, in one streaming pass.

With log g_i = -||x_t - a x_i||^2 / (2 s^2) + const, all that depends on the row i is linear in the stored row
[x_i, ||x_i - mean||^2, ...]: one matrix product gives a piece's logits, a second one all weighted sums. Pieces are
merged by an online log-sum-exp, so memory does not grow with the bank.

Shapes: B queries, C rows of a piece, D values per row.  a = alpha(t), s = sigma(t).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fm_stages.flow import Path, check_time, expand_time
from fm_stages.oracle.bank import NUM_EXTRA, DataBank, count_column
from fm_stages.oracle.rescoring import COARSE, MAX_CANDIDATES, rescore, rounding_error

MAX_QUERIES = 1024
"""Queries per pass; more are taken in turn, so that working memory does not grow with the batch either."""

MAX_QUERY_VALUES = 2**22
"""Values of the queries in one pass, whose float64 copies take 32 MiB each."""

LEAST_LOGIT = -40.0
"""Floor of a logit relative to the peak. Weights below e^-40 = 4e-18 would be lost in float32 sums anyway, and a
product with denormal numbers is 200 times slower on a CPU."""

SMALLEST_SIGMA = 1e-8
"""Stands for sigma = 0, where the posterior is its limit: the nearest row."""


@dataclass
class Posterior:
    """What the bank says about the data behind x_t. ``mean`` is (B, ...), the others are (B,) float32.

    Attributes:
        mean: sum_i g_i x_i, in the dtype of x_t.
        top1: largest weight of a distinct row, in (0, 1].
        ess: effective number of distinct rows, 1 / sum_i g_i^2.
        entropy: of the weights of the distinct rows, in nats.
        variance: sum_i g_i ||x_i - mean||^2, over all D values.
    """

    mean: Tensor
    top1: Tensor
    ess: Tensor
    entropy: Tensor
    variance: Tensor


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: no autocast, no TF32 or bf16 in disguise. Restores what it found."""
    # torch has an older setting and newer ones by backend; products on CUDA fail while the two contradict each other
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    newer = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # someone has set the newer ones only
        older = None
    torch.set_float32_matmul_precision("highest")  # the newer ones follow
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, newer, strict=True):
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


class Oracle:
    """The exact oracle velocity of a bank along a path.  Source: arXiv 2512.02826, Theorem 2.1.

    Not an `nn.Module`, and deep-copies to itself: it must never travel with a model.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.
    """

    def __init__(self, bank: DataBank, path: Path) -> None:
        if not isinstance(bank, DataBank):
            raise TypeError(f"the oracle needs a DataBank (DataBank(x1, labels)), got {type(bank).__name__}")
        self.bank = bank
        self.path = path

    @torch.no_grad()
    def posterior(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Posterior:
        """Posterior over the bank given x_t, and its statistics.

        Args:
            x_t: (B, ...), in the units of the bank.
            t: (B,), in [0, 1]; where sigma(t) = 0 the answer is the limit, the nearest row.
            labels: (B,) int64; row b is conditioned on its class, or on the whole bank where labels is -1.

        Returns:
            The posterior, computed in float32 whatever autocast says.

        Raises:
            ValueError: if shapes, devices or times do not fit, or a label has no row in the bank.
        """
        labels = self._check(x_t, t, labels)
        parts = []
        with full_precision(x_t.device):
            size = max(1, min(MAX_QUERIES, MAX_QUERY_VALUES // self.bank.num_dims))
            for block in torch.arange(len(x_t), device=x_t.device).split(size):
                for label in torch.unique(labels[block]).tolist():
                    query = block[labels[block] == label]
                    parts.append((query, self._posterior(x_t[query].float().flatten(1), t[query], label)))
        order = torch.argsort(torch.cat([query for query, _ in parts]))
        joined = {f.name: torch.cat([getattr(part, f.name) for _, part in parts])[order] for f in fields(Posterior)}
        joined["mean"] = joined["mean"].reshape(x_t.shape).to(x_t.dtype)
        return Posterior(**joined)

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Oracle velocity u*(x_t, t): (B, ...), in the dtype of x_t. Arguments as in `posterior`.

        Raises:
            ValueError: also where sigma(t) = 0: u* is undefined there, so a solver's last step should start earlier.
        """
        check_time(t)
        wide, t = x_t.float(), t.float()
        if bool((self.path.sigma(t) == 0).any()):
            raise ValueError("the oracle velocity is undefined at t = 1: let the time grid end with an Euler step")
        return self.path.velocity_from_mean(self.posterior(wide, t, labels).mean, wide, t).to(x_t.dtype)

    @torch.no_grad()
    def target(
        self, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Oracle velocity at x_t = interpolate(x0, x1, t), finite and accurate up to t -> 1.

        Args:
            x0: (B, ...) noise.
            x1: (B, ...) rows of the bank, in the same bits: a rounded copy makes a floor where there is none.
            t: (B,), in [0, 1].
            labels: (B,) int64 as the network sees them, -1 = unconditional; see `posterior`.
            index: (B,) int64 rows of the training set, flips included; x1 is then read from the bank.

        Returns:
            u* (B, ...), float32.
        """
        if index is not None:
            x1 = self.bank.rows(index)
        x0, x1, t = x0.float(), x1.float(), t.float()
        mean = self.posterior(self.path.interpolate(x0, x1, t), t, labels).mean
        return self.target_from_mean(mean, x0, x1, t)

    def target_from_mean(self, mean: Tensor, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """u* = u_cond + A_t (mean - x1): free of the cancellation that A_t mean + B_t x_t has near t = 1."""
        away = mean.double() - x1
        # A_t is infinite at t = 1; where the posterior has collapsed on x1 there is nothing to scale
        scale = expand_time(self.path.mean_coefficient(t.double()), x1)
        return self.path.velocity(x0, x1, t) + torch.where(away == 0, 0.0, scale * away).float()

    def __deepcopy__(self, memo: dict) -> Oracle:
        return self

    def _check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if tuple(x_t.shape[1:]) != self.bank.shape or len(x_t) == 0:
            raise ValueError(
                f"queries are (B, ...) = (B, *{self.bank.shape}) like the bank's rows, got {tuple(x_t.shape)}"
            )
        if x_t.device != self.bank.device:
            raise ValueError(
                f"the bank is on {self.bank.device}, the queries on {x_t.device}: move it with bank.to(...)"
            )
        expand_time(t, x_t)
        check_time(t)
        if labels is None:
            return torch.full((len(x_t),), -1, device=x_t.device)
        if labels.shape != t.shape or labels.is_floating_point():
            raise ValueError(
                f"need one integer label per query, -1 for unconditional: got {labels.dtype} of shape "
                f"{tuple(labels.shape)} for {len(x_t)} queries"
            )
        return labels

    def _posterior(self, x_t: Tensor, t: Tensor, label: int) -> Posterior:
        """Posterior of queries (B, D) float32 that share a label."""
        query = self._queries(x_t, t, label)
        sums, in_question = _stream(query, self.bank, self.bank.slice_of(label), rounding_error(query, self.bank))
        mean = sums.rows / sums.weight
        posterior = Posterior(
            mean=mean,
            top1=1 / sums.weight[:, 0],
            ess=sums.weight[:, 0].square() / sums.square,
            entropy=(sums.weight[:, 0].log() - sums.depth / sums.weight[:, 0]).clamp(min=0),
            variance=self._variance(sums, mean, x_t, t, label).float().clamp(min=0),
        )
        if in_question is not None and len(in_question[0]):
            again = in_question[0].unique()
            better = rescore(self.bank, x_t, *self._coefficients(t), label, in_question)
            for name, value in better.items():
                getattr(posterior, name)[again] = value[again]
        return posterior

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1) in float64, from the times as they were given."""
        wide = t.double()
        return self.path.alpha(wide)[:, None], self.path.sigma(wide).clamp(min=SMALLEST_SIGMA)[:, None]

    def _queries(self, x_t: Tensor, t: Tensor, label: int) -> Tensor:
        """The factor (B, D + NUM_EXTRA) whose product with stored rows gives logits.

        log g_i = (a / s^2) (x_t - a mean) . x_i - a^2 / (2 s^2) ||x_i - mean||^2 + log count_i + const. Taking the
        mean out of the query is exact and shrinks the terms that are subtracted: rounding errors fall several-fold.
        """
        a, s = self._coefficients(t)
        query = torch.zeros(len(x_t), self.bank.num_dims + NUM_EXTRA, device=x_t.device)
        query[:, : self.bank.num_dims] = (a / s**2 * (x_t - a * self.bank.mean)).float()
        query[:, self.bank.num_dims] = (-(a**2) / (2 * s**2))[:, 0].float()
        query[:, self.bank.num_dims + count_column(label)] = 1
        return query

    def _variance(self, sums: _Sums, mean: Tensor, x_t: Tensor, t: Tensor, label: int) -> Tensor:
        """Sum of g_i ||x_i - m||^2: (B,) float64, without subtracting numbers much larger than the result.

        Centred at the bank's mean while a < s; from there on at the best row r, with l the logits and
        ||x_i - x_r||^2 = 2 (s/a)^2 (l_r - l_i) + (2/a) (x_t - a x_r) . (x_i - x_r): every term vanishes with the other
        rows' weights, as it must where A_t^2 multiplies the variance.
        """
        a, s = self._coefficients(t)
        mean, weight = mean.double(), sums.weight.double()
        centre = self.bank.mean
        early = sums.extra[:, :1] / weight - (mean - centre).square().sum(1, keepdim=True)

        best = self.bank.stored(sums.best).double()
        count = count_column(label)
        log_count = self.bank.log_count(sums.best, label)[:, None] - sums.extra[:, count : count + 1] / weight
        depth = -sums.depth[:, None] / weight - log_count  # l_r minus the mean of l, copies left out
        across = ((x_t - a * best) * (mean - best)).sum(1, keepdim=True)
        late = 2 * (s / a) ** 2 * depth + 2 / a * across - (mean - best).square().sum(1, keepdim=True)
        return torch.where(a < s, early, late)[:, 0]


@dataclass
class _Sums:
    """Sums over bank rows with weights p_i = exp(l_i - peak)."""

    peak: Tensor  # (B, 1) largest logit so far
    best: Tensor  # (B,) its stored row
    total: Tensor  # (B, D + NUM_EXTRA) sum of p_i times the stored row
    depth: Tensor  # (B,) sum of p_i (l_i - peak)
    square: Tensor  # (B,) sum of p_i^2

    @property
    def rows(self) -> Tensor:
        return self.total[:, :-NUM_EXTRA]

    @property
    def extra(self) -> Tensor:
        return self.total[:, -NUM_EXTRA:]

    @property
    def weight(self) -> Tensor:  # (B, 1) sum of p_i
        return self.total[:, -NUM_EXTRA + 1, None]

    def raise_peak(self, peak: Tensor) -> None:
        """Express the sums relative to a new, larger peak (B, 1)."""
        rise = self.peak - peak
        shrink = torch.where(rise < 2 * LEAST_LOGIT, 0.0, torch.exp(rise))
        self.depth = shrink[:, 0] * (self.depth + (rise * self.weight)[:, 0])
        self.square = shrink[:, 0].square() * self.square
        self.total *= shrink
        self.peak = peak

    def add(self, queries: Tensor | slice, logits: Tensor, piece: Tensor) -> None:
        """Add a piece (C, D + NUM_EXTRA) with logits (B, C), which are overwritten, for some of the queries."""
        logits.sub_(self.peak[queries]).clamp_(min=LEAST_LOGIT)
        weights = torch.exp(logits)
        self.depth[queries] += torch.linalg.vecdot(weights, logits)
        self.square[queries] += torch.linalg.vecdot(weights, weights)
        if isinstance(queries, slice):
            self.total.addmm_(weights, piece)
        else:
            self.total[queries] += weights @ piece


def _stream(query: Tensor, bank: DataBank, rows: slice, error: Tensor) -> tuple[_Sums, tuple[Tensor, Tensor] | None]:
    """One pass over the bank's rows: logits, online softmax and weighted sums, for queries (B, D + NUM_EXTRA).

    Where the rounding ``error`` (B, 1) of a query's logits matters, the rows that may hold some of its mass come back
    as pairs (P,), (P,) of query and stored row.
    """
    num = len(query)
    sums = _Sums(
        peak=torch.full((num, 1), -1e38, device=query.device),
        best=torch.zeros(num, dtype=torch.int64, device=query.device),
        total=torch.zeros_like(query),
        depth=torch.zeros(num, device=query.device),
        square=torch.zeros(num, device=query.device),
    )
    # a piece whose best weight is this far below the peak adds less than e^-18 in all, under float32 rounding
    negligible = math.log(rows.stop - rows.start) + 18
    # about the size of the caches: the logits of a piece are read several times
    elements = 2**20 if query.device.type == "cpu" else 2**25
    margin = negligible + 2 * error
    coarse = (error > COARSE)[:, 0]
    in_question = []
    for start, piece in bank.chunks(rows, max(512, elements // num)):
        logits = query @ piece.T  # (B, C)
        peak = logits.amax(1, keepdim=True)
        better = (peak > sums.peak)[:, 0].nonzero()[:, 0]
        if len(better):
            sums.best[better] = start + logits[better].argmax(1)
            sums.raise_peak(torch.maximum(sums.peak, peak))
        active = (peak >= sums.peak - margin)[:, 0].nonzero()[:, 0]
        if len(doubtful := active[coarse[active]]):
            candidates = logits[doubtful] >= (sums.peak - margin)[doubtful]
            coarse[doubtful[candidates.sum(1) > MAX_CANDIDATES]] = False  # a broad posterior averages its errors out
            near = candidates.nonzero()
            in_question.append((doubtful[near[:, 0]], near[:, 1] + start))
        if len(active) == num:
            sums.add(slice(None), logits, piece)
        elif len(active):
            sums.add(active, logits[active], piece)
    if not in_question:
        return sums, None
    queries, stored = (torch.cat(column) for column in zip(*in_question, strict=True))
    kept = coarse[queries]
    return sums, (queries[kept], stored[kept])
