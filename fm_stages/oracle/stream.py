"""One pass over a bank's rows: logits, and of the rows that matter their weighted sums.

With log g_i = -||x_t - a x_i||^2 / (2 s^2) + const, all that depends on the row i is linear in the stored row
[x_i, ||x_i - mean||^2, ...]: one matrix product gives the logits, a second one all weighted sums. The bank goes by in
pieces, so memory does not grow with it.

**What is left out.** After the first product the logits are known, so rows can be dropped whose mass is known to be
small: with the peak l_max, of rows below l_max - log(N / tolerance) all N together hold less than the tolerance. Of a
query with few rows above, those are summed one by one in float64 (`rescoring`); for others, pieces without any are
passed over. Early pieces are compared with the largest logit until then, which can only keep more.

Shapes: B queries, S rows of a piece, D values per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fm_stages.oracle.bank import NUM_EXTRA, DataBank
from fm_stages.oracle.kernels import Products, products
from fm_stages.oracle.merge import Partial
from fm_stages.oracle.selection import Selection

LEAST_LOGIT = -40.0
"""Floor of a logit relative to the peak. Weights below e^-40 = 4e-18 would be lost in float32 sums anyway, and a
product with denormal numbers is 200 times slower on a CPU."""

ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Rounding error of a logit, over the norms of its two factors: more than is seen at D = 1, where nothing averages."""

COARSE = 1e-3
"""Rounding error of a logit from which on a query is scored again if at all possible."""

MAX_CANDIDATES = 1024
"""Rows above the threshold, in one piece, up to which such a query is scored again."""

FEW = 8
"""The same for other queries: summing this many rows one by one is cheaper than the second product."""

CPU_VALUES, GPU_VALUES = 2**22, 2**27
"""Logits of a piece. On a CPU they should stay in its caches, where they are read several times."""

CPU_PART, GPU_PART = 2**20, 8192
"""Weights of a part of a piece, which the second product takes or leaves, on a CPU, where they stay in its caches; and
rows of one on a GPU, whose tensor cores round towards 0 as they add more."""

BLOCK = 64
"""Rows whose largest logit is found first."""


@dataclass
class Pairs:
    """Queries and rows that matter to them, with their logits: (P,) each."""

    query: Tensor
    row: Tensor
    logit: Tensor

    def __getitem__(self, chosen: Tensor) -> Pairs:
        return Pairs(self.query[chosen], self.row[chosen], self.logit[chosen])

    @classmethod
    def cat(cls, parts: list[Pairs], first: list[int], device: torch.device) -> Pairs:
        """Several as one; ``first`` is what each one's queries count from."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(
            torch.cat([nothing, *(part.query + start for part, start in zip(parts, first, strict=True))]),
            torch.cat([nothing, *(part.row for part in parts)]),
            torch.cat([nothing.float(), *(part.logit for part in parts)]),
        )


class Stream:
    """The pass over the rows of a label, for queries that share it, or of several labels, which are masked.

    Args:
        bank: the training set.
        query: (B, D + NUM_EXTRA) float32, the factor whose product with stored rows gives logits.
        labels: (B,) of the queries, sorted; -1 = unconditional, for all of them.
        tolerance: share of a query's mass that may be left out; 0 = nothing is.
        late: (B,) bool, where a >= s: there the spread needs the depth from the logits themselves.

    Attributes:
        sums: over the rows of pieces that matter to queries with many rows.
        pairs: the rows that matter to queries with few, which are not in the sums.
    """

    def __init__(self, bank: DataBank, query: Tensor, labels: Tensor, tolerance: float, late: Tensor) -> None:
        num, device = len(query), query.device
        self._products: Products = products(bank, query)
        self._rows, self._labels = Selection(bank, labels), labels
        error = rounding_error(query, bank)  # (B,)
        # with tolerance 0 only the queries that are scored again leave out what float32 sums would lose
        num_rows = sum(bank.count_of(label) for label in self._rows.labels.tolist())
        self._margin = (math.log(num_rows / (tolerance or 1e-8)) + 2 * error)[:, None]  # (B, 1)
        self._most = torch.where(error > COARSE, MAX_CANDIDATES, FEW if tolerance else -1)  # (B,)
        self._skips, self._late = tolerance > 0, late
        self._peak = torch.full((num, 1), -torch.inf, dtype=torch.float32, device=device)  # largest logit so far
        self.sums = Sums.zeros(num, query.shape[1], device)

        values, part = (CPU_VALUES, CPU_PART // num) if device.type == "cpu" else (GPU_VALUES, GPU_PART)
        size = min(max(values // num // BLOCK, 1), -(-len(self._rows) // BLOCK)) * BLOCK
        self._part = min(max(-(-part // BLOCK), 1) * BLOCK, size)
        self._logits = torch.empty(num, size, dtype=torch.float32, device=device)
        self._weights = torch.empty(num * self._part, dtype=torch.float32, device=device)
        found = [self._add(first, min(first + size, len(self._rows))) for first in range(0, len(self._rows), size or 1)]
        self.sums.depth = torch.where(late, self.sums.depth, self.sums.linear_depth(query))
        pairs = Pairs.cat(found, [0] * len(found), device)
        # the threshold has risen since
        self.pairs = pairs[pairs.logit >= (self._peak - self._margin)[pairs.query, 0]]
        del self._logits, self._weights  # the next stream has its own, and all are kept until the last is done

    def _add(self, first: int, last: int) -> Pairs:
        """Take in the rows from first to last; returns those that are not summed."""
        size = last - first
        padded = self._logits[:, : -(-size // BLOCK) * BLOCK]
        padded[:, size:] = -torch.inf
        logits = padded[:, :size]
        blocks = padded.unflatten(1, (-1, BLOCK))
        tops = padded.new_empty(blocks.shape[:2])  # (B, S / BLOCK)
        for start in range(0, size, self._part):  # the largest are found while a part is in the caches
            stop = min(start + self._part, size)
            own = logits[:, start:stop]
            self._products.logits(self._rows.part(first + start, first + stop), own)
            self._rows.mask(self._labels, first + start, first + stop, own)
            part = slice(start // BLOCK, -(-stop // BLOCK))
            torch.amax(blocks[:, part], 2, out=tops[:, part])
        peak, top = tops.max(1, keepdim=True)
        self._peak = torch.maximum(self._peak, peak)
        threshold = self._peak - self._margin
        near = (tops >= threshold) & (tops > -torch.inf)  # a query may have no row here
        many, pairs = self._put_aside(blocks, near, threshold, first)
        better = (many & (peak > self.sums.peak)[:, 0]).nonzero()[:, 0]
        if len(better):
            block = top[better, 0]
            inside = blocks[better, block].argmax(1)
            self.sums.raise_peak(better, peak[better], self._rows.stored(first + block * BLOCK + inside))
        many &= self.sums.peak[:, 0] > -torch.inf
        ends = [(start, min(start + self._part, size)) for start in range(0, size, self._part)]
        parts = [near[:, start // BLOCK : -(-stop // BLOCK)].any(1) if self._skips else many for start, stop in ends]
        active = torch.stack(parts) & many  # (parts, B)
        # found for all parts at once: a GPU would run dry while each of them waits for its own
        chosen, late = _places(active), _places(active & self._late)
        for (start, stop), mask, queries, own_late in zip(ends, active, chosen, late, strict=True):
            rows = self._rows.part(first + start, first + stop)
            self._sum(mask, queries, own_late, logits[:, start:stop], rows)
        return pairs

    def _put_aside(self, blocks: Tensor, near: Tensor, threshold: Tensor, first: int) -> tuple[Tensor, Pairs]:
        """Which queries (B,) have many rows above the threshold, and the rows of those that have few."""
        few = near.sum(1) <= self._most
        query, block = (near & few[:, None]).nonzero(as_tuple=True)
        logits = blocks[query, block]  # (P, BLOCK)
        above = logits >= threshold[query]
        num = torch.zeros_like(self._most).index_add_(0, query, above.sum(1))
        few &= num <= self._most
        which, column = (above & few[query, None]).nonzero(as_tuple=True)
        rows = self._rows.stored(first + block[which] * BLOCK + column)
        return ~few, Pairs(query[which], rows, logits[which, column])

    def _sum(self, active: Tensor, queries: Tensor, late: Tensor, logits: Tensor, rows: slice | Tensor) -> None:
        """Add rows with logits (B, C) to the sums of the queries (b,) that are active (B,), some of which are late."""
        sums, num = self.sums, len(logits)
        if not len(queries):
            return
        everyone = len(queries) > 0.9 * num  # to leave a few out is more work than to give them no weight
        if everyone:
            weights = self._weights[: logits.numel()].view(logits.shape)
            torch.sub(logits, sums.peak, out=weights)
        else:
            weights = self._weights[: len(queries) * logits.shape[1]].view(len(queries), -1)
            torch.index_select(logits, 0, queries, out=weights).sub_(sums.peak[queries])
        weights.clamp_(LEAST_LOGIT, 0).exp_()
        if everyone and len(queries) < num:
            weights[~active] = 0  # also what their peak of -inf has made
        chosen = slice(0, num) if everyone else queries
        sums.square[chosen] += torch.linalg.vector_norm(weights, dim=1).square()
        if len(late):
            own = late if everyone else torch.searchsorted(queries, late)
            relative = (logits[late] - sums.peak[late]).clamp_(min=LEAST_LOGIT)
            sums.depth[late] += (relative * weights[own]).sum(1).double()
        self._products.add_weighted(sums.total, chosen, weights, rows)


def _places(mask: Tensor) -> list[Tensor]:
    """Where each row of a mask (R, C) is true, in order."""
    return list(mask.nonzero()[:, 1].split(mask.sum(1).tolist()))


@dataclass
class Sums:
    """Float32 sums over rows with weights p_i = exp(l_i - peak)."""

    peak: Tensor  # (B, 1) largest logit among the rows that are summed
    best: Tensor  # (B,) its row
    total: Tensor  # (B, D + NUM_EXTRA) sum of p_i times the stored row
    square: Tensor  # (B,) sum of p_i^2
    depth: Tensor  # (B,) float64, sum of p_i (l_i - peak), at the end

    @classmethod
    def zeros(cls, num: int, columns: int, device: torch.device) -> Sums:
        """No rows yet: any logit is larger than the peak."""
        return cls(
            peak=torch.full((num, 1), -torch.inf, dtype=torch.float32, device=device),
            best=torch.zeros(num, dtype=torch.int64, device=device),
            total=torch.zeros(num, columns, dtype=torch.float32, device=device),
            square=torch.zeros(num, dtype=torch.float32, device=device),
            depth=torch.zeros(num, dtype=torch.float64, device=device),
        )

    @classmethod
    def cat(cls, parts: list[Sums]) -> Sums:
        """The sums of several groups of queries, one after the other."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def __getitem__(self, queries: Tensor) -> Sums:
        return Sums(*(getattr(self, f.name)[queries] for f in fields(self)))

    @property
    def weight(self) -> Tensor:
        """Sum of p_i: (B,)."""
        return self.total[:, -NUM_EXTRA + 1]

    def raise_peak(self, queries: Tensor, peak: Tensor, best: Tensor) -> None:
        """Express the sums of some queries (b,) relative to a new, larger peak (b, 1), that of the row ``best``."""
        rise = torch.nan_to_num(self.peak[queries] - peak, neginf=2 * LEAST_LOGIT)
        shrink = torch.where(rise < 2 * LEAST_LOGIT, 0.0, torch.exp(rise))
        self.depth[queries] = shrink[:, 0] * (self.depth[queries] + rise[:, 0] * self.weight[queries])
        self.square[queries] *= shrink[:, 0].square()
        self.total[queries] *= shrink
        self.peak[queries] = peak
        self.best[queries] = best

    def linear_depth(self, query: Tensor) -> Tensor:
        """The depth from the other sums, (B,): it is linear in them, as logits are in rows; with their rounding."""
        logits = torch.linalg.vecdot(query.double(), self.total.double())
        return torch.where(self.weight > 0, logits - self.peak[:, 0].double() * self.weight, 0.0).clamp(max=0)

    def partial(self, bank: DataBank, x_t: Tensor, a: Tensor, s: Tensor, column: Tensor, offset: Tensor) -> Partial:
        """The sums in the form that merges.

        The spread ||x_i - best||^2 about the best row r comes from the bank's mean while a u < s, for rows that reach u
        (at most 1) from it in each value. From there on, with logits l without counts, from
        ||x_i - r||^2 = 2 (s/a)^2 (l_r - l_i) + (2/a) (x_t - a r) . (x_i - r): every term vanishes with the other rows'
        weights, as it must where A_t^2 multiplies the spread.

        Args:
            bank: the training set.
            x_t: (B, D) float32 queries.
            a: (B, 1) float64, of the weights.
            s: (B, 1) float64.
            column: (B,) which of the extra columns holds the log counts that are in the logits.
            offset: (B,) float64, what makes of a logit -||x_t - a x||^2 / (2 s^2) + log count.
        """
        used = (self.weight > 0).nonzero()[:, 0]
        if len(used) == len(x_t):
            return self._partial(bank, x_t, a, s, column, offset)
        part = Partial.empty(x_t)
        if len(used):
            part[used] = self[used]._partial(bank, x_t[used], a[used], s[used], column[used], offset[used])
        return part

    def _partial(self, bank: DataBank, x_t: Tensor, a: Tensor, s: Tensor, column: Tensor, offset: Tensor) -> Partial:
        weight = self.weight.double()
        total, extra = self.total.double().split([bank.num_dims, NUM_EXTRA], 1)
        best = bank.stored(self.best).double()
        moment = bank.affine.from_sums(total, weight[:, None]) - weight[:, None] * best

        from_mean = best - bank.mean
        spread = extra[:, 0] - 2 * (moment * from_mean).sum(1) - weight * from_mean.square().sum(1)
        # what follows is rounded as a multiple of (s / a)^2, which small rows would vanish in
        late = (a * min(1.0, math.sqrt(bank.max_spread / bank.num_dims)) >= s).nonzero()[:, 0]
        if len(late):
            log_counts = extra.gather(1, column[:, None])[:, 0] - weight * bank.log_count(self.best, column)
            across = ((x_t[late] - a[late] * best[late]) * moment[late]).sum(1, keepdim=True)
            depth = (log_counts - self.depth)[late, None]
            spread[late] = (2 / a[late] * across + 2 * (s / a)[late] ** 2 * depth)[:, 0]
        return Partial(
            peak=self.peak[:, 0].double() + offset,
            best=best,
            weight=weight,
            square=self.square.double(),
            depth=self.depth,
            moment=moment,
            spread=spread.clamp(min=0),
        )


def rounding_error(query: Tensor, bank: DataBank) -> Tensor:
    """Bound (B,) float64 on the rounding error of the logits that the factors ``query`` (B, D + NUM_EXTRA) give."""
    # in float64, for at t = 1 squares of factors leave float32's range where rows have norms of 1000
    products = torch.linalg.vector_norm(query[:, : bank.num_dims], dim=1, dtype=torch.float64) * bank.max_norm
    return ROUNDING * (products + query[:, bank.num_dims].abs() * bank.max_spread)
