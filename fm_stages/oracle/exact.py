"""The exact posterior over the bank and the oracle velocity.

Shapes: B queries, D values per row.  a = alpha(t), s = sigma(t).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_stages.flow import Path, check_time, expand_time
from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.inputs import check_tensor
from fm_stages.oracle.kernels import factors, full_precision
from fm_stages.oracle.merge import Partial
from fm_stages.oracle.queries import check_queries, check_values
from fm_stages.oracle.rescoring import rescore
from fm_stages.oracle.selection import CPU_GROUP, GPU_GROUP, groups
from fm_stages.oracle.skipping import certified
from fm_stages.oracle.stream import Pairs, Stream, Sums

MAX_QUERIES = 1024
"""Queries per pass; more are taken in turn, so that working memory does not grow with the batch either."""

MAX_QUERY_VALUES = 2**22
"""Values of the queries in one pass, whose float64 copies take 32 MiB each."""

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


class Oracle:
    """The exact oracle velocity of a bank along a path.  Source: arXiv 2512.02826, Theorem 2.1.

    Not an `nn.Module`, and deep-copies to itself: it must never travel with a model. If the bank is sharded, every rank
    of its group makes the oracle and enters every call, with no queries if need be: queries are gathered, each rank
    sums over its rows, and the sums are merged.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.
        tolerance: share of a query's posterior mass that may be left out where that saves work (`stream`, `skipping`);
            0: none.

    Raises:
        TypeError: without a bank, or a path.
        ValueError: if the tolerance is not in [0, 1e-3].
    """

    takes: type = DataBank
    """The kind of bank."""

    approximate: str | None = None
    """What stands in for the oracle of the training set, in words, to be told wherever its numbers are; or None."""

    collapses = True
    """Whether the posterior ends on one row as t -> 1, so that the floor is 0 past the boundary."""

    query_dtype = torch.float32
    """What x_t is taken in."""

    def __init__(self, bank: DataBank, path: Path, tolerance: float = 1e-6) -> None:
        if not isinstance(bank, self.takes):
            kind = self.takes.__name__
            raise TypeError(f"{type(self).__name__} needs a {kind}, {kind}(...), got {type(bank).__name__}")
        if not isinstance(path, Path):
            raise TypeError(f"{type(self).__name__} needs the path of x_t, as LinearPath(), got {path!r:.80}")
        if not 0 <= tolerance <= 1e-3:
            raise ValueError(f"the tolerance is a share of the posterior mass in [0, 1e-3], got {tolerance}")
        self.bank = bank
        self.path = path
        self.tolerance = tolerance
        self._path = type(path).__name__  # what ranks compare: the path's name, and of a sharded bank what it does
        if bank.group is not None:
            early, late = path.alpha(torch.tensor([0.25, 0.75])).tolist()
            self._path += f" with alpha(0.25) = {early:.6g}, alpha(0.75) = {late:.6g}"

    @torch.no_grad()
    def posterior(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> Posterior:
        """Posterior over the bank given x_t, and its statistics.

        Args:
            x_t: (B, ...), in the units of the bank.
            t: (B,), in [0, 1]; where sigma(t) = 0 the answer is the limit, the nearest row.
            labels: (B,) int64; row b is conditioned on its class, or on the whole bank where labels is -1.
            index: (B,) int64; row of the bank that x_t was made from, by interpolation with fresh noise. Enables
                skipping whole queries; wrong for sampler states or held-out images, which have no such row.

        Returns:
            The posterior, computed in float32 or better whatever autocast says.

        Raises:
            ValueError: if shapes, devices or times do not fit, or a label has no row in the bank; on all ranks if on
                one.
        """
        with ranks.together(self.bank.group) as meeting:
            labels = self.check(meeting, x_t, t, labels, index)
        return self._posterior(x_t, t, labels, meeting.sizes, index)

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Oracle velocity u*(x_t, t): (B, ...), in the dtype of x_t. Arguments as in `posterior`.

        Raises:
            ValueError: also where sigma(t) = 0: u* is undefined there, so a solver's last step should start earlier.
        """
        with ranks.together(self.bank.group):
            check_values("queries", x_t, self.bank, self.query_dtype)
            check_tensor("times", t)
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
            x0: (B, ...) noise, fresh: independent of the bank.
            x1: (B, ...) rows of the bank, in the same bits: a rounded copy makes a floor where there is none.
            t: (B,), in [0, 1].
            labels: (B,) int64 as the network sees them, -1 = unconditional; see `posterior`.
            index: (B,) int64 rows of the training set, flips included; x1 is then read from the bank, and queries that
                have certainly collapsed on it are skipped.

        Returns:
            u* (B, ...), float32.
        """
        with ranks.together(self.bank.group) as meeting:
            if index is None:
                check_tensor("data", x1)
            labels = self.check(meeting, x0, t, labels, index, x1 if index is None else None)
        rows = None if index is None else self.bank.rows_of_all(index, meeting.sizes)
        x0, x1, t = x0.float(), (x1 if rows is None else rows).float(), t.float()
        mean = self._posterior(self.path.interpolate(x0, x1, t), t, labels, meeting.sizes, index, rows).mean
        return self.target_from_mean(mean, x0, x1, t)

    def target_from_mean(self, mean: Tensor, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """u* = u_cond + A_t (mean - x1): free of the cancellation that A_t mean + B_t x_t has near t = 1."""
        away = mean.double() - x1
        # A_t is infinite at t = 1; where the posterior has collapsed on x1 there is nothing to scale
        scale = expand_time(self.path.mean_coefficient(t.double()), x1)
        return self.path.velocity(x0, x1, t) + torch.where(away == 0, 0.0, scale * away).float()

    def __deepcopy__(self, memo: dict[int, Any]) -> Oracle:
        return self

    def check(
        self,
        meeting: ranks.Meeting,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None,
        index: Tensor | None,
        x1: Tensor | None = None,
    ) -> Tensor:
        """Labels of the queries, once all that was given fits this bank; ``x_t`` may also be the noise for ``x1``."""
        check_tensor("queries", x_t)
        meeting.size = len(x_t)
        meeting.alike = {
            "the tolerance": self.tolerance,
            "the path": self._path,
            "giving an index": index is not None,
            "skipping queries": self._may_skip(),
        }
        check_queries(self.bank, x_t, t, labels, index, x1, self.query_dtype)
        return torch.full((len(x_t),), -1, device=x_t.device) if labels is None else labels.to(x_t.device)

    def _may_skip(self) -> bool:
        """Whether whole queries may be certified: distances are there, and weights are those of the bank's rows."""
        return self.tolerance > 0 and self.bank.nearest is not None

    def _posterior(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor,
        sizes: list[int],
        index: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Posterior:
        """`posterior` of checked queries, of which the ranks have ``sizes``; ``rows`` are those of the index, if known.

        Whatever decides on a collective here is the same on all ranks: `check` sees to it.
        """
        flat = x_t.to(self.query_dtype).reshape(len(x_t), self.bank.num_dims)
        with full_precision(x_t.device):
            if index is None or not self._may_skip():
                part = self._gathered(flat, t, labels, sizes)
            else:
                rows = self.bank.rows_of_all(index, sizes) if rows is None else rows
                rows = rows.reshape(flat.shape)
                certain = certified(self.bank, flat, rows, *self.coefficients(t), index, self.tolerance)
                # of another class than its own row's nothing is known
                certain &= (labels == -1) | (labels == self.bank.labels_of_all(index, sizes))
                part = Partial.certain(rows)
                sizes = ranks.sizes_of(int((~certain).sum()), self.bank.group)
                part[~certain] = self._gathered(flat[~certain], t[~certain], labels[~certain], sizes)
        return self._finish(part, x_t)

    def _gathered(self, x_t: Tensor, t: Tensor, labels: Tensor, sizes: list[int]) -> Partial:
        """The posterior of queries (B, D) float32 over the bank, of all ranks together."""
        group = self.bank.group
        if not any(sizes):  # all are skipped
            return Partial.empty(x_t)
        if group is None:
            return self._partial(x_t, t, labels)
        x_t = ranks.gather(x_t, sizes, group)
        t, labels = ranks.gather(torch.stack([t.double(), labels.double()], 1), sizes, group).unbind(1)
        merged = self._partial(x_t, t, labels.long()).merge_ranks(group)
        start = sum(sizes[: ranks.rank_of(group)])
        return merged[start : start + sizes[ranks.rank_of(group)]]

    def _partial(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Partial:
        """The posterior of queries (B, D) over the rows of this rank."""
        size = max(1, min(MAX_QUERIES, MAX_QUERY_VALUES // self.bank.num_dims))
        if 0 < len(x_t) <= size and bool((labels == labels[0]).all()):
            return self._of_sorted(x_t, t, labels)
        part = Partial.empty(x_t)
        for queries in torch.argsort(labels, stable=True).split(size):
            part[queries] = self._of_sorted(x_t[queries], t[queries], labels[queries])
        return part

    def _of_sorted(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Partial:
        """The posterior of queries (B, D) float32 in the order of their labels, over the rows of this rank."""
        a, s = self.coefficients(t)
        column = count_columns(labels)
        query, offset = factors(self.bank, x_t, a, s, column)
        sizes = groups(labels, CPU_GROUP if labels.device.type == "cpu" else GPU_GROUP)
        together = zip(*(x.split(sizes) for x in (query, labels, (a >= s)[:, 0])), strict=True)
        streams = [Stream(self.bank, own, label, self.tolerance, late) for own, label, late in together]
        sums = Sums.cat([stream.sums for stream in streams])
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        pairs = Pairs.cat([stream.pairs for stream in streams], first, x_t.device)
        part = sums.partial(self.bank, x_t, a, s, column, offset)
        few, place = pairs.query.unique(return_inverse=True)
        part[few] = part[few].merge(rescore(self.bank, x_t[few], a[few], s[few], column[few], place, pairs.row))
        return part

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma (B, 1) of the weights in float64, from the times as they were given."""
        wide = t.double()
        return self.path.alpha(wide)[:, None], self.path.sigma(wide).clamp(min=SMALLEST_SIGMA)[:, None]

    def _finish(self, part: Partial, x_t: Tensor) -> Posterior:
        """Statistics of the whole posterior. Where all mass is on one row the mean has its bits."""
        step = part.moment / part.weight[:, None]
        return Posterior(
            mean=(part.best + step).to(x_t.dtype).reshape(x_t.shape),
            top1=(1 / part.weight).float(),
            ess=(part.weight.square() / part.square).float(),
            entropy=(part.weight.log() - part.depth / part.weight).clamp(min=0).float(),
            variance=(part.spread / part.weight - step.square().sum(1)).clamp(min=0).float(),
        )
