"""Parts of a posterior become the whole, in whatever order and grouping; the parts are made by their definition."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fm_stages.oracle import merge
from fm_stages.oracle.merge import Partial

NUM, DIMS = 5, 3
FIELDS = ["peak", "best", "weight", "square", "depth", "moment", "spread"]


def part_of(rows: Tensor, logits: Tensor) -> Partial:
    """Sums over rows (R, D) with logits (B, R), one by one; none where a logit is -inf."""
    peak, place = logits.max(1)
    best = rows[place].double()
    weight = torch.where(logits.isneginf(), 0.0, (logits - peak[:, None]).exp())
    depth = torch.where(weight > 0, weight * (logits - peak[:, None]), 0.0)
    away = rows.double() - best[:, None]  # (B, R, D)
    nothing = peak.isneginf()
    return Partial(
        peak=peak,
        best=torch.where(nothing[:, None], 0.0, best),
        weight=torch.where(nothing, 0.0, weight.sum(1)),
        square=torch.where(nothing, 0.0, weight.square().sum(1)),
        depth=torch.where(nothing, 0.0, depth.sum(1)),
        moment=torch.where(nothing[:, None], 0.0, (weight[:, :, None] * away).sum(1)),
        spread=torch.where(nothing, 0.0, (weight * away.square().sum(2)).sum(1)),
    )


def assert_equal(one: Partial, other: Partial, tol: float = 1e-12) -> None:
    for name in FIELDS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tol, atol=tol)


@pytest.fixture
def rows(generator) -> Tensor:
    return torch.randn(24, DIMS, generator=generator, dtype=torch.float64)


@pytest.fixture
def logits(generator) -> Tensor:
    """From flat to certain, with a large constant that differs from query to query."""
    spread = torch.tensor([0.1, 1.0, 10.0, 100.0, 1000.0])[:, None]
    constant = torch.tensor([0.0, -5000.0, 300.0, 7.0, -1.0])[:, None]
    return (torch.randn(NUM, 24, generator=generator) * spread + constant).double()


@pytest.fixture
def parts(rows, logits) -> list[Partial]:
    return [part_of(rows[i : i + 6], logits[:, i : i + 6]) for i in range(0, 24, 6)]


class TestMerge:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::3], ids=str)
    def test_in_any_order(self, order, parts, rows, logits):
        assert_equal(reduce(Partial.merge, [parts[i] for i in order]), part_of(rows, logits))

    def test_in_any_grouping(self, parts, rows, logits):
        a, b, c, d = parts
        whole = part_of(rows, logits)
        for merged in (a.merge(b).merge(c.merge(d)), a.merge(b.merge(c.merge(d))), a.merge(b.merge(c)).merge(d)):
            assert_equal(merged, whole)

    def test_row_by_row(self, rows, logits):
        single = [part_of(rows[i : i + 1], logits[:, i : i + 1]) for i in range(24)]
        assert_equal(reduce(Partial.merge, single), part_of(rows, logits))

    def test_leaves_its_parts_alone(self, parts):
        before = [getattr(parts[0], name).clone() for name in FIELDS]
        parts[0].merge(parts[1])
        assert all(torch.equal(getattr(parts[0], name), b) for name, b in zip(FIELDS, before, strict=True))

    def test_of_nothing_changes_no_bit(self, parts):
        nothing = Partial.empty(parts[0].best)
        for merged in (parts[0].merge(nothing), nothing.merge(parts[0])):
            assert_equal(merged, parts[0], tol=0)

    def test_of_nothing_and_nothing_is_nothing(self):
        nothing = Partial.empty(torch.ones(NUM, DIMS))
        merged = nothing.merge(nothing)
        assert merged.peak.tolist() == [-torch.inf] * NUM
        assert all(bool((getattr(merged, name) == 0).all()) for name in FIELDS[1:])

    def test_where_some_queries_have_nothing(self, rows, logits):
        """As rows of one class, of which another part holds none."""
        gone = logits.clone()
        gone[1, :12], gone[2, 12:], gone[3] = -torch.inf, -torch.inf, -torch.inf
        one, two = part_of(rows[:12], gone[:, :12]), part_of(rows[12:], gone[:, 12:])
        for merged in (one.merge(two), two.merge(one)):
            assert_equal(merged, part_of(rows, gone))

    def test_other_rows_without_mass_leave_exact_zeros(self, generator):
        """However far away: A_t times the moment must not see them."""
        rows = 1e6 * torch.randn(9, DIMS, generator=generator).double()
        logits = torch.full((NUM, 9), -1e5, dtype=torch.float64)
        logits[:, 4] = 3.0
        merged = part_of(rows[:3], logits[:, :3]).merge(part_of(rows[3:], logits[:, 3:]))
        assert torch.equal(merged.best, rows[4].expand(NUM, DIMS))
        assert merged.weight.tolist() == merged.square.tolist() == [1] * NUM
        assert not merged.moment.any()
        assert not merged.spread.any()
        assert not merged.depth.any()

    def test_equal_peaks_are_the_first_ones(self, rows):
        same = torch.zeros(NUM, 1, dtype=torch.float64)
        one, two = part_of(rows[:1], same), part_of(rows[1:2], same)
        merged = one.merge(two)
        assert torch.equal(merged.best, one.best)
        assert merged.weight.tolist() == merged.square.tolist() == [2] * NUM
        torch.testing.assert_close(merged.moment, (rows[1] - rows[0]).expand(NUM, DIMS))
        torch.testing.assert_close(merged.spread, (rows[1] - rows[0]).square().sum().expand(NUM))


class TestSeenFrom:
    def test_another_row(self, rows, logits):
        """By the definition of the sums, about a row and a peak that are not among them."""
        part = part_of(rows[:12], logits[:, :12])
        place = torch.tensor([13, 20, 15, 23, 12])
        peak = torch.maximum(part.peak, logits[torch.arange(NUM), place]) + 0.5
        seen = part.seen_from(peak, rows[place])
        depth = logits[:, :12] - peak[:, None]
        weight, away = depth.exp(), rows[:12] - rows[place][:, None]
        assert torch.equal(seen.peak, peak)
        assert torch.equal(seen.best, rows[place])
        truth = {
            "weight": weight.sum(1),
            "square": weight.square().sum(1),
            "depth": (weight * depth).sum(1),
            "moment": (weight[:, :, None] * away).sum(1),
            "spread": (weight * away.square().sum(2)).sum(1),
        }
        for name, value in truth.items():
            torch.testing.assert_close(getattr(seen, name), value, rtol=1e-12, atol=1e-12)

    def test_itself_changes_no_bit(self, parts):
        assert_equal(parts[0].seen_from(parts[0].peak, parts[0].best), parts[0], tol=0)

    def test_nothing_stays_nothing(self, rows):
        seen = Partial.empty(torch.ones(NUM, DIMS)).seen_from(torch.zeros(NUM).double(), rows[:NUM])
        for name in FIELDS[2:]:
            assert not getattr(seen, name).any()

    def test_nothing_seen_from_nothing(self):
        part = Partial.empty(torch.ones(NUM, DIMS))
        seen = part.seen_from(part.peak, part.best)
        for name in FIELDS[2:]:
            assert not getattr(seen, name).any()


class TestParts:
    def test_certain_is_one_row(self, rows):
        assert_equal(Partial.certain(rows[:NUM].float()), part_of_each(rows[:NUM].float()))

    def test_of_some_queries(self, parts):
        part = Partial.empty(parts[0].best)
        chosen = torch.tensor([3, 1])
        part[chosen] = parts[0][chosen]
        assert part.peak.isneginf().tolist() == [True, False, True, False, True]
        assert_equal(part[chosen], parts[0][chosen], tol=0)
        assert not part.weight[[0, 2, 4]].any()

    def test_one_rank_has_all(self, parts):
        assert parts[0].merge_ranks(None) is parts[0]

    def test_is_float64(self):
        for part in (Partial.empty(torch.ones(2, 3)), Partial.certain(torch.ones(2, 3))):
            assert all(getattr(part, name).dtype == torch.float64 for name in FIELDS)

    def test_does_not_share_memory(self):
        part = Partial.empty(torch.ones(2, 3))
        part.weight += 1
        part.moment += 1
        assert not part.square.any()
        assert not part.best.any()


class TestAnyPartition:
    """Whatever the rows and logits, and however they are shared out: what a posterior is made of, by its definition."""

    @given(data=st.data())
    def test_parts_in_any_order_and_grouping(self, data):
        rows, logits = data.draw(problems())
        parts = data.draw(partitions(rows, logits))
        while len(parts) > 1:  # a random tree
            i, j = data.draw(st.permutations(range(len(parts))))[:2]
            merged = parts[i].merge(parts[j])
            parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [merged]
        assert_posterior(parts[0], rows, logits)

    @given(data=st.data())
    def test_either_way_round(self, data):
        rows, logits = data.draw(problems())
        one, two = data.draw(partitions(rows, logits, num=2))
        assert_posterior(one.merge(two), rows, logits)
        assert_posterior(two.merge(one), rows, logits)

    @settings(max_examples=40)
    @given(data=st.data())
    def test_over_ranks(self, data):
        """The same on each, also where some have no row of a query."""
        rows, logits = data.draw(problems())
        parts = data.draw(partitions(rows, logits))
        found = Ranks(len(parts)).merge(parts)
        for own in found:
            assert_posterior(own, rows, logits)
            for name in FIELDS:
                assert torch.equal(getattr(own, name), getattr(found[0], name))


@st.composite
def problems(draw) -> tuple[Tensor, Tensor]:
    """Rows (R, D), some of them the same and some rounded to bfloat16, and logits (B, R), from flat to 1e4 apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num, dims, queries = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = torch.randn(num, dims, generator=generator) * draw(st.sampled_from([1e-3, 1.0, 100.0]))
    if draw(st.booleans()):
        rows = rows[torch.randint(num, (num,), generator=generator)]
    if draw(st.booleans()):
        rows = rows.bfloat16().float()
    spread = torch.tensor(draw(st.lists(st.sampled_from([0.0, 1.0, 30.0, 1e4]), min_size=queries, max_size=queries)))
    logits = torch.randn(queries, num, generator=generator) * spread[:, None] + draw(st.floats(-1e4, 1e4))
    gone = torch.rand(queries, num, generator=generator) < draw(st.sampled_from([0.0, 0.5]))  # rows of other classes
    gone[torch.arange(queries), torch.randint(num, (queries,), generator=generator)] = False
    return rows.double(), logits.double().masked_fill(gone, -torch.inf)


@st.composite
def partitions(draw, rows: Tensor, logits: Tensor, num: int | None = None) -> list[Partial]:
    """Parts of the rows, some of which may be empty, or without mass for a query."""
    num = num or draw(st.integers(1, 5))
    owner = torch.tensor(draw(st.lists(st.integers(0, num - 1), min_size=len(rows), max_size=len(rows))))
    return [
        part_of(rows[owner == i], logits[:, owner == i])
        if (owner == i).any()
        else Partial.empty(torch.zeros(len(logits), rows.shape[1]))
        for i in range(num)
    ]


def assert_posterior(part: Partial, rows: Tensor, logits: Tensor) -> None:
    """Mean, variance, log of the sum, top1, ess and entropy, as of the softmax over all rows."""
    weights = torch.softmax(logits, 1)
    mean = weights @ rows
    size = rows.abs().max() + 1e-30
    total = part.weight
    torch.testing.assert_close(part.peak + total.log(), torch.logsumexp(logits, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(1 / total, weights.max(1).values, rtol=1e-11, atol=0)
    torch.testing.assert_close(total.square() / part.square, 1 / weights.square().sum(1), rtol=1e-11, atol=0)
    entropy = -torch.special.xlogy(weights, weights).sum(1)
    torch.testing.assert_close(total.log() - part.depth / total, entropy, rtol=1e-9, atol=1e-9)
    found = part.best + part.moment / total[:, None]
    torch.testing.assert_close(found / size, mean / size, rtol=0, atol=1e-11)
    away = (rows - mean[:, None]).square().sum(2)
    variance = part.spread / total - (part.moment / total[:, None]).square().sum(1)
    torch.testing.assert_close(variance / size**2, (weights * away).sum(1) / size**2, rtol=0, atol=1e-10)


class Ranks:
    """Threads in the place of ranks, which meet in `fm_stages.oracle.ranks`'s two collectives."""

    def __init__(self, num: int) -> None:
        self.num, self.own = num, threading.local()
        self.barrier, self.given = threading.Barrier(num, timeout=60), [torch.empty(0)] * num

    def merge(self, parts: list[Partial]) -> list[Partial]:
        """`Partial.merge_ranks` on each."""

        def on_rank(rank: int) -> Partial:
            self.own.rank = rank
            return parts[rank].merge_ranks(self)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(self.num) as threads:
            patch.setattr(merge, "ranks", self)
            return list(threads.map(on_rank, range(self.num)))

    def num_ranks(self, group: object) -> int:
        return self.num

    def rank_of(self, group: object) -> int:
        return self.own.rank

    def gather(self, x: Tensor, sizes: list[int], group: object) -> Tensor:
        return torch.cat(self._exchange(x))

    def reduce(self, x: Tensor, group: object) -> Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self.given[self.own.rank] = x
        self.barrier.wait()
        seen = list(self.given)
        self.barrier.wait()
        return seen


def part_of_each(rows: Tensor) -> Partial:
    parts = [part_of(row[None], torch.zeros(1, 1, dtype=torch.float64)) for row in rows]
    return Partial(*(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS))
