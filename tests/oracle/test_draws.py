"""The times that are measured, and the statistics of draws, against what is written here."""

import math

import numpy as np
import pytest
import torch

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, Oracle, StageProfile
from fm_stages.oracle.draws import first_reaching, measure_draws, weighted_median


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def cloud(num: int, dims: int) -> torch.Tensor:
    return torch.randn(num, dims, generator=torch.Generator().manual_seed(0))


def measure(rows: torch.Tensor, path: Path | None = None, num_queries: int = 64, **kwargs) -> StageProfile:
    return StageProfile.measure(Oracle(DataBank(rows), path or LinearPath()), num_queries=num_queries, **kwargs)


class TestWeightedMedian:
    def test_counts_are_repetitions(self, generator):
        values = torch.randn(5, 3, 20, generator=generator, dtype=torch.float64)
        counts = torch.randint(0, 4, (7, 20), generator=generator)
        found = weighted_median(values, counts.double())
        assert found.shape == (7, 5, 3)
        for r in range(7):
            repeated = np.sort(np.repeat(values.numpy(), counts[r].numpy(), axis=-1), -1)
            expected = repeated[..., (repeated.shape[-1] - 1) // 2]  # of an even number the lower of the two
            assert np.array_equal(found[r].numpy(), expected)

    def test_of_equal_weights_is_the_median(self, generator):
        values = torch.randn(4, 21, generator=generator, dtype=torch.float64)
        assert torch.equal(weighted_median(values, torch.ones(1, 21).double())[0], values.median(1).values)

    def test_no_weight_no_say(self):
        values = torch.tensor([[1.0, 2.0, 3.0, 90.0, 95.0]]).double()
        weight = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0.1, 0.1], [0.1, 0.1, 0.1, 0, 2.0], [0, 0, 0, 0, 1]]).double()
        assert weighted_median(values, weight)[:, 0].tolist() == [2, 90, 95, 95]


class TestFirstReaching:
    T = torch.tensor([0.0, 0.1, 0.3, 0.9]).double()

    @pytest.mark.parametrize(
        ("median", "expected"),
        [
            ([0.0, 0.4, 0.6, 1.0], 0.2),  # between times linear
            ([0.0, 0.5, 0.6, 1.0], 0.1),
            ([0.0, 0.0, 0.0, 1.0], 0.6),
            ([0.2, 0.7, 0.3, 1.0], 0.06),  # the first time
            ([0.5, 0.2, 0.3, 1.0], 0.0),  # from the start
            ([1.0, 1.0, 1.0, 1.0], 0.0),
            ([0.1, 0.2, 0.3, 0.4], 1.0),  # not by the last time
            ([0.3, 0.3, 0.3, 0.3], 1.0),
        ],
    )
    def test_by_hand(self, median, expected):
        both = torch.tensor([median, [0.0, 0.4, 0.6, 1.0]]).double()
        assert first_reaching(0.5, self.T, both).tolist() == pytest.approx([expected, 0.2])


class TestTimes:
    """At what times is measured."""

    @staticmethod
    def assert_in_order(profile: StageProfile) -> None:
        assert profile.t[0] == 0
        assert all(a < b for a, b in zip(profile.t, profile.t[1:], strict=False))
        assert profile.t[-1] < 1
        assert torch.equal(torch.tensor(profile.t), torch.tensor(profile.t).double())  # exact in float32

    @pytest.mark.parametrize("num_times", [3, 4, 7, 12, 32, 50])
    def test_number(self, num_times, path):
        profile = measure(cloud(40, 5), path, num_times=num_times)
        self.assert_in_order(profile)
        assert len(profile.t) == num_times

    def test_lie_where_top1_changes(self):
        profile = measure(cloud(200, 30), num_queries=128)
        places = np.array([logit(t) for t in profile.t[1:]])
        changing = (places > logit(profile.navigation_end)) & (places < logit(profile.refinement_complete))
        span = logit(profile.refinement_complete) - logit(profile.navigation_end)
        assert changing.sum() / span > 4 * (~changing).sum() / (places[-1] - places[0] - span)
        steps = np.diff(profile.top1_median)
        assert steps.max() < 0.13
        assert np.diff(places).min() > 0.02 / 2 - 1e-4

    def test_more_of_them_are_a_finer_grid_of_the_same_curve(self):
        coarse, fine = (measure(cloud(200, 30), num_queries=128, num_times=num) for num in (33, 80))
        assert set(coarse.t) < set(fine.t)
        assert [fine.top1[fine.t.index(t)] for t in coarse.t] == coarse.top1
        assert coarse.boundary == pytest.approx(fine.boundary, abs=0.1 * coarse.time_sem["boundary"])
        floor, error = coarse.expected_floor()
        assert floor == pytest.approx(fine.expected_floor()[0], abs=error)

    def test_a_steep_transition(self):
        """In 4096 dimensions top1 rises from 0.1 to 0.9 within a few thousandths of t."""
        profile = measure(cloud(1000, 4096), num_queries=128)
        self.assert_in_order(profile)
        # one row has all weight about where D / 2 log(1 + (a / s)^2) = log N
        ratio = math.sqrt(math.exp(2 * math.log(1000) / 4096) - 1)
        assert profile.boundary == pytest.approx(ratio / (1 + ratio), rel=0.15)
        inside = [t for t in profile.t if profile.navigation_end < t < profile.refinement_complete]
        assert profile.refinement_complete - profile.navigation_end < 0.03
        assert len(inside) >= 6
        after = next(i for i, median in enumerate(profile.top1_median) if median >= 0.5)
        # between its neighbours a boundary cannot be wrong by more than they lie apart
        assert logit(profile.t[after]) - logit(profile.t[after - 1]) < 0.1
        assert 0 < profile.time_sem["boundary"] < 0.002

    @pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=lambda path: type(path).__name__)
    @pytest.mark.parametrize("unit", [1e-3, 1e-4, 2e-5, 5e-6, 1e-7, 1e-12])
    @pytest.mark.timeout(60)
    def test_rows_that_are_told_apart_near_the_end_only(self, unit, path):
        """The grid is carried on until the median has collapsed, or to the last time, and comes to an end."""
        profile = measure(torch.arange(4.0)[:, None] * unit, path, num_times=64)
        self.assert_in_order(profile)
        last = torch.tensor(profile.t[-1]).double()
        if profile.refinement_complete < 1:
            assert profile.top1_median[-1] >= 0.9
            # noise of the size of a row's distance to the next, give or take
            assert 1.5 < unit * float(path.alpha(last) / path.sigma(last)) < 200
        else:
            assert last == torch.tensor(min(path.max_time, 1 - 2**-20)).double()
            assert profile.top1_median[-1] < 0.9
            assert unit * float(path.alpha(last) / path.sigma(last)) < 6
        assert np.isfinite([getattr(profile, name) for name in ("top1", "ess", "entropy", "own", "floor")]).all()

    def test_the_floor_next_to_the_end(self):
        """Of many rows far closer than the noise the floor is that of a normal distribution, in rows that are one."""
        rows = torch.linspace(0, 1, 2001)[:, None]
        profile = measure(rows, num_queries=300)
        inside = [i for i, t in enumerate(profile.t) if 0.98 < t < 0.998]
        assert inside
        for i in inside:
            # x_1 given x_t has the standard deviation s / a: floor = A^2 (s / a)^2 = 1 / t^2, but for the ends
            assert profile.floor[i] == pytest.approx(profile.t[i] ** -2, rel=0.06)

    @pytest.mark.parametrize("rows", [torch.ones(1, 3), torch.ones(9, 3)], ids=["one row", "equal rows"])
    def test_where_nothing_changes_the_grid_stays_even(self, rows):
        profile = measure(rows)
        self.assert_in_order(profile)
        assert len(profile.t) == 11

    @pytest.mark.parametrize("unit", [1e2, 1e4, 1e6, 1e12])
    def test_rows_far_apart(self, unit):
        """They are told apart at once; below t = 1e-4 the intervals are not halved any more."""
        profile = measure(cloud(50, 4) * unit, num_queries=128)
        self.assert_in_order(profile)
        assert profile.navigation_end <= profile.boundary <= profile.refinement_complete < max(10 / unit, 1.1e-4)


class TestDraws:
    def test_are_common_to_all_times_and_kinds(self, generator):
        """A query that is one row's at some t stays so: its own noise shrinks. And a chunk is no other draw."""
        rows, labels = cloud(30, 8), torch.arange(30) % 3
        index = torch.randint(30, (100,), generator=generator)
        kinds = {"unconditional": torch.full((100,), -1), "conditional": labels[index]}
        oracle = Oracle(DataBank(rows, labels), LinearPath())
        draws = measure_draws(oracle, kinds, index, 0, 20, False)
        for kind in kinds:
            top1 = draws.values[kind]["top1"]
            assert top1.shape == (20, 100)
            neighbours = torch.stack([torch.corrcoef(top1[i : i + 2])[0, 1] for i in range(3, 8)])
            assert (neighbours > 0.5).all()
        alone = measure_draws(oracle, {"conditional": labels[index]}, index, 0, 20, False)
        assert alone.guidance is None
        for t in set(alone.t) & set(draws.t):
            i, j = alone.t.index(t), draws.t.index(t)
            for name, values in alone.values["conditional"].items():
                torch.testing.assert_close(values[i], draws.values["conditional"][name][j], rtol=1e-5, atol=1e-6)

    def test_calls_are_small(self, monkeypatch):
        from fm_stages.oracle import draws as module

        rows, sizes = cloud(30, 8), []
        oracle = Oracle(DataBank(rows), LinearPath())
        whole = StageProfile.measure(oracle, num_queries=50, num_times=4)
        posterior = Oracle.posterior

        def watched(self, x_t, *args):
            sizes.append(len(x_t))
            return posterior(self, x_t, *args)

        monkeypatch.setattr(module, "CHUNK", 8 * 12)
        monkeypatch.setattr(Oracle, "posterior", watched)
        parts = StageProfile.measure(oracle, num_queries=50, num_times=4)
        assert max(sizes) <= 12
        assert sum(sizes) == 4 * 50
        assert parts.t == whole.t
        assert parts.top1 == pytest.approx(whole.top1, rel=1e-6)

    def test_other_seeds_are_other_noise(self):
        oracle, index = Oracle(DataBank(cloud(30, 8)), LinearPath()), torch.zeros(10, dtype=torch.int64)
        labels = {"mix": torch.full((10,), -1)}
        one, same, other = (measure_draws(oracle, labels, index, seed, 4, False) for seed in (0, 0, 1))
        assert torch.equal(one.values["mix"]["top1"], same.values["mix"]["top1"])
        assert not torch.equal(one.values["mix"]["top1"][1], other.values["mix"]["top1"][1])
        assert len(one.values["mix"]["top1"][1].unique()) == 10  # of one row, but each with noise of its own
