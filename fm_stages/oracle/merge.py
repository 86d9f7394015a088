"""The posterior over a part of the bank, and how parts become one: pieces of a stream, or shards on several ranks.

Weights p_i = exp(l_i - peak) are relative to the part's own largest logit, and moments to that row, so that nothing
large is ever subtracted: where the best row has all the mass, moment and spread are exactly zero. Merging is
associative and commutative up to rounding, in float64.

Shapes: B queries, D values per row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.oracle import ranks


@dataclass
class Partial:
    """Sums over some rows for each query, float64. A part without mass has peak -inf and zeros.

    Attributes:
        peak: (B,) largest log weight, with one constant per query for all parts.
        best: (B, D) the row that has it.
        weight: (B,) sum of p_i.
        square: (B,) sum of p_i^2.
        depth: (B,) sum of p_i (l_i - peak).
        moment: (B, D) sum of p_i (x_i - best).
        spread: (B,) sum of p_i ||x_i - best||^2.
    """

    peak: Tensor
    best: Tensor
    weight: Tensor
    square: Tensor
    depth: Tensor
    moment: Tensor
    spread: Tensor

    @classmethod
    def empty(cls, queries: Tensor) -> Partial:
        """No rows yet, for queries (B, D)."""
        number, vector = (torch.zeros_like(x, dtype=torch.float64) for x in (queries[:, 0], queries))
        return cls(
            peak=number - torch.inf,
            best=vector,
            weight=number.clone(),
            square=number.clone(),
            depth=number.clone(),
            moment=vector.clone(),
            spread=number.clone(),
        )

    @classmethod
    def certain(cls, rows: Tensor) -> Partial:
        """All mass on one row (B, D) for each query, as good as alone."""
        part = cls.empty(rows)
        part.peak.zero_()
        part.best, part.weight, part.square = rows.double(), part.weight + 1, part.square + 1
        return part

    def __getitem__(self, queries: Tensor | slice) -> Partial:
        return Partial(*(getattr(self, f.name)[queries] for f in fields(self)))

    def __setitem__(self, queries: Tensor, part: Partial) -> None:
        for f in fields(self):
            getattr(self, f.name)[queries] = getattr(part, f.name)

    def seen_from(self, peak: Tensor, best: Tensor) -> Partial:
        """The same sums relative to another, not smaller peak (B,) and the row (B, D) that has it."""
        rise = torch.where(torch.isneginf(self.peak), 0.0, self.peak - peak)
        shrink = torch.exp(rise)
        step = self.best - best
        along = (step * self.moment).sum(1)
        return Partial(
            peak=peak,
            best=best,
            weight=shrink * self.weight,
            square=shrink.square() * self.square,
            depth=shrink * (self.depth + rise * self.weight),
            moment=shrink[:, None] * (self.moment + self.weight[:, None] * step),
            spread=shrink * (self.spread + 2 * along + self.weight * step.square().sum(1)),
        )

    def merge(self, other: Partial) -> Partial:
        """Both parts as one; equal peaks are this one's."""
        first = self.peak >= other.peak
        peak = torch.maximum(self.peak, other.peak)
        best = torch.where(first[:, None], self.best, other.best)
        one, two = self.seen_from(peak, best), other.seen_from(peak, best)
        sums = {name: getattr(one, name) + getattr(two, name) for name in _SUMS}
        return Partial(peak=peak, best=best, **sums)

    def merge_ranks(self, group: dist.ProcessGroup | None) -> Partial:
        """The parts of all ranks as one, the same on each: a gather and two all-reduces, of the queries' size."""
        if group is None:
            return self
        peak, winner = ranks.gather(self.peak[None], [1] * ranks.num_ranks(group), group).max(0)
        own_wins = winner == ranks.rank_of(group)
        # of rows float32 loses nothing; of a mixture's means it only chooses what sums are relative to
        best = ranks.reduce(torch.where(own_wins[:, None], self.best, 0.0).float(), group).double()
        own = self.seen_from(peak, best)
        columns = [getattr(own, name).reshape(len(peak), -1) for name in _SUMS]
        total = ranks.reduce(torch.cat(columns, 1), group).split([column.shape[1] for column in columns], 1)
        sums = {name: x.reshape(getattr(own, name).shape) for name, x in zip(_SUMS, total, strict=True)}
        return Partial(peak=peak, best=best, **sums)


_SUMS = ("weight", "square", "depth", "moment", "spread")
