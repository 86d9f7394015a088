"""Stage profiles against closed forms, numeric integration, and draws made without the package; in float64."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from fm_stages.flow import (
    CosinePath,
    LinearPath,
    LogitNormalTimesteps,
    Path,
    ShiftedTimesteps,
    VPPath,
    keyed_generator,
    keyed_normal,
)
from fm_stages.oracle import DataBank, Oracle, StageProfile

MEANS = ("top1", "entropy", "own", "floor")
MEDIANS = ("top1_median", "ess")

NUM = 2000
"""Queries of two points."""

NORMAL = np.linspace(-9, 9, 9001)
DENSITY = scipy.stats.norm.pdf(NORMAL) * (NORMAL[1] - NORMAL[0])
"""Sums over these are expectations of one standard normal number."""


def measure(bank: DataBank, path: Path | None = None, *args, **kwargs) -> StageProfile:
    return StageProfile.measure(Oracle(bank, path or LinearPath()), *args, **kwargs)


def name_of(path: object) -> str:
    return type(path).__name__


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def median_of(values: np.ndarray, weight: np.ndarray) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(weight[order].cumsum(), 0.5 * weight.sum())])


def entropy_of(weight: np.ndarray) -> np.ndarray:
    return -scipy.special.xlogy(weight, weight).sum(-1)


@pytest.fixture(scope="session")
def at(path_coefficients):
    """alpha / sigma and A of a path at one time, written again."""

    def numbers(path: Path, t: float) -> tuple[float, float]:
        a, s, scale, _ = path_coefficients(path, torch.tensor([t], dtype=torch.float64))
        return float(a / s), float(scale)

    return numbers


def two_points(half: float, dims: int = 3) -> DataBank:
    x = torch.zeros(2, dims)
    x[:, 0] = torch.tensor([half, -half])
    return DataBank(x)


def of_two_points(k: float, scale: float, half: float, dims: int = 3) -> dict[str, np.ndarray]:
    """Statistics by the normal number e: the log odds of the own row over the other are 2 k^2 + 2 k e, k = a c / s."""
    own = scipy.special.expit(2 * k**2 + 2 * k * NORMAL)
    both = own * scipy.special.expit(-2 * k**2 - 2 * k * NORMAL)  # own (1 - own)
    top1 = np.maximum(own, 1 - own)
    return {
        "top1": top1,
        "top1_median": top1,
        "ess": 1 / (1 - 2 * both),
        "entropy": entropy_of(np.stack([own, 1 - own], -1)),
        "own": own,
        "sum of squares": 1 - 2 * both,
        "floor": scale**2 * 4 * half**2 * both / dims,
    }


class TestTwoPoints:
    @pytest.fixture(scope="class", params=[LinearPath(), CosinePath(), VPPath()], ids=name_of)
    @classmethod
    def measured(cls, request) -> tuple[Path, StageProfile]:
        return request.param, measure(two_points(0.7), request.param, num_queries=NUM)

    def test_curves_within_their_reported_errors(self, measured, at):
        path, profile = measured
        checked = dict.fromkeys((*MEANS, *MEDIANS), 0)
        for i, t in enumerate(profile.t):
            truth = of_two_points(at(path, t)[0] * 0.7, at(path, t)[1], 0.7)
            for name in MEANS:
                mean = DENSITY @ truth[name]
                spread = math.sqrt(DENSITY @ (truth[name] - mean) ** 2)
                if name == "own":  # measured by what has the same mean, and less spread
                    other = truth["sum of squares"]
                    assert DENSITY @ other == pytest.approx(mean, abs=1e-9)
                    spread = math.sqrt(DENSITY @ (other - mean) ** 2)
                    truth[name] = other
                error, reported = spread / math.sqrt(NUM), profile.sem[name][i]
                fourth = DENSITY @ (truth[name] - mean) ** 4 / max(spread, 1e-300) ** 4
                small = 2e-6 * max(1.0, at(path, t)[1] ** 2 if name == "floor" else 1.0)
                assert abs(getattr(profile, name)[i] - mean) < 5 * error + small, (name, t)
                if fourth < 60 and error > 20 * small:  # else it is made by rare draws, which may all have been missed
                    assert abs(getattr(profile, name)[i] - mean) < 4 * reported + small, (name, t)
                    assert reported == pytest.approx(error, rel=0.2), (name, t)
                    checked[name] += 1
            for name in MEDIANS:
                expected, reported = median_of(truth[name], DENSITY), profile.sem[name][i]
                found = getattr(profile, name)[i]
                assert abs(found - expected) < 5 * reported + 1e-5, (name, t)
                if reported > 1e-3:
                    # a median's error is 1 / (2 density sqrt(Q)): within it, on both sides, is 1 / sqrt(Q) of the mass
                    share = DENSITY[truth[name] <= expected + reported].sum()
                    share -= DENSITY[truth[name] <= expected - reported].sum()
                    assert share * math.sqrt(NUM) == pytest.approx(1, rel=0.45), (name, t)
                    checked[name] += 1
        assert min(checked.values()) >= 5, checked

    @staticmethod
    def k_of(top1: float) -> float:
        level = logit(top1)  # top1 >= level where |2 k^2 + 2 k e| >= its logit

        def below(k: float) -> float:
            cdf = scipy.stats.norm.cdf
            return cdf((level - 2 * k**2) / (2 * k)) - cdf((-level - 2 * k**2) / (2 * k)) - 0.5

        return scipy.optimize.brentq(below, 0.1, 10)

    def test_refinement_is_complete_where_the_closed_form_says(self, measured, at):
        path, profile = measured
        expected = scipy.optimize.brentq(lambda t: at(path, t)[0] * 0.7 - self.k_of(0.9), 1e-6, 1 - 1e-6)
        error = profile.time_sem["refinement_complete"]
        assert 0 < error < 0.02
        assert abs(profile.refinement_complete - expected) < 4 * error
        # one of two always weighs half: the other two levels are reached from the start
        assert profile.boundary == profile.navigation_end == 0
        assert profile.time_sem["boundary"] == profile.time_sem["navigation_end"] == 0

    @pytest.mark.parametrize("half", [1e-3, 0.05, 10.0, 1e4])
    def test_in_other_units(self, half):
        profile = measure(two_points(half), num_queries=1000)
        k = self.k_of(0.9) / half
        error = profile.time_sem["refinement_complete"]
        near = 5e-5 if half == 1e4 else 0  # intervals next to t = 0 are not halved below 1e-4
        assert abs(profile.refinement_complete - k / (1 + k)) < 4 * error + near
        assert profile.t[0] == 0
        json.loads(profile.to_json(), parse_constant=pytest.fail)

    def test_what_it_is_of(self):
        profile = measure(two_points(3.0, 4), VPPath(0.2, 10), num_queries=5, num_times=3)
        assert (profile.num_rows, profile.num_distinct, profile.num_dims, profile.num_queries) == (2, 2, 4, 5)
        assert profile.rms_norm == pytest.approx(3.0)
        assert profile.path == "VPPath(beta_min=0.2, beta_max=10)"
        assert measure(two_points(3.0), num_queries=5, num_times=3).path == "LinearPath"


class TestGridOfPoints:
    """Points on a grid of 3 x 4 x 5: the posterior is a product, so each statistic is, or is a sum, over axes."""

    AXES = (np.array([-1.0, 0.0, 1.0]), np.arange(4) * 0.5, np.arange(5) * 0.8 - 2)

    @staticmethod
    def of_axis(points: np.ndarray, k: float) -> dict[str, float]:
        """Expectations over the own point and its noise."""
        x = k * points[:, None] + NORMAL  # (own, noise), in units of sigma
        weight = scipy.special.softmax(-0.5 * (x[..., None] - k * points) ** 2, -1)
        mean = weight @ points
        statistics = {
            "top1": weight.max(-1),
            "own": np.stack([weight[i, :, i] for i in range(len(points))]),
            "entropy": entropy_of(weight),
            "variance": (weight * (points - mean[..., None]) ** 2).sum(-1),
        }
        return {name: float((x @ DENSITY).mean()) for name, x in statistics.items()}

    @pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=name_of)
    def test_curves(self, path, at):
        rows = np.stack([x.ravel() for x in np.meshgrid(*self.AXES, indexing="ij")], 1)
        profile = measure(DataBank(torch.tensor(rows).float()), path, num_queries=3000, num_times=16)
        assert profile.num_distinct == 60
        for i, t in enumerate(profile.t):
            k, scale = at(path, t)
            axes = [self.of_axis(points, k) for points in self.AXES]
            expected = {
                "top1": math.prod(axis["top1"] for axis in axes),
                "own": math.prod(axis["own"] for axis in axes),
                "entropy": sum(axis["entropy"] for axis in axes),
                "floor": scale**2 * sum(axis["variance"] for axis in axes) / 3,
            }
            for name, value in expected.items():
                tolerance = 4 * profile.sem[name][i] + 1e-4 * value + (1e-3 if t > 0.9 else 1e-6)
                assert abs(getattr(profile, name)[i] - value) < tolerance, (name, t)


def draws_of(rows, labels, path: str, t: float, dropout: float, num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Statistics of draws of the process itself, in float64; the same draws at every t."""
    rng = np.random.default_rng(seed)
    a, s, scale = (t, 1 - t, 1 / (1 - t))
    if path == "cosine":
        a, s = math.sin(math.pi * t / 2), math.cos(math.pi * t / 2)
        scale = math.pi / 2 / s
    index, kept = rng.integers(len(rows), size=num), rng.random(num) >= dropout
    x_t = a * rows[index] + s * rng.standard_normal((num, rows.shape[1]))
    log_weight = a / s**2 * (x_t @ rows.T - a / 2 * (rows**2).sum(1))
    if labels is not None:
        log_weight[kept[:, None] & (labels[index][:, None] != labels)] = -np.inf
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    mean = weight @ rows
    variance = weight @ (rows**2).sum(1) - (mean**2).sum(1)
    top1 = weight.max(1)
    return {
        "top1": top1,
        "top1_median": top1,
        "ess": 1 / (weight**2).sum(1),
        "entropy": entropy_of(weight),
        "own": weight[np.arange(num), index],
        "floor": scale**2 * variance / rows.shape[1],
        "mean": mean,
    }


def crossing(rows, labels, path: str, dropout: float, level: float, num: int = 4000, seed: int = 0) -> float:
    """t at which the median top1 of independent draws reaches a level."""

    def above(x: float) -> float:
        return (
            float(np.median(draws_of(rows, labels, path, 1 / (1 + math.exp(-x)), dropout, num, seed)["top1"])) - level
        )

    return 1 / (1 + math.exp(-scipy.optimize.brentq(above, -6.0, 5.0, xtol=0.002)))


def cloud(num: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(num, dims, generator=torch.Generator().manual_seed(seed))


class TestGaussianCloud:
    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls) -> Tensor:
        return cloud(500, 16)

    @pytest.mark.parametrize(
        ("path", "name"), [(LinearPath(), "linear"), (CosinePath(), "cosine")], ids=["linear", "cosine"]
    )
    def test_against_independent_draws(self, rows, path: Path, name):
        profile = measure(DataBank(rows), path, num_queries=1000)
        assert profile.t == sorted(profile.t)
        num = 2000
        for i in range(0, len(profile.t), 3):
            t = profile.t[i]
            truth = draws_of(rows.double().numpy(), None, name, t, 1.0, num)
            for curve in MEANS:
                value, error = truth[curve].mean(), truth[curve].std() / math.sqrt(num)
                both = math.hypot(error, profile.sem[curve][i])
                assert abs(getattr(profile, curve)[i] - value) < 4 * both + 1e-4 * abs(value) + 1e-5, (curve, t)
            for curve in MEDIANS:
                low, high = np.quantile(truth[curve], [0.5 - 4 * 0.5 / num**0.5, 0.5 + 4 * 0.5 / num**0.5])
                slack = 3 * profile.sem[curve][i] + 1e-4
                assert low - slack <= getattr(profile, curve)[i] <= high + slack, (curve, t)
        for level, time in ((0.1, "navigation_end"), (0.5, "boundary"), (0.9, "refinement_complete")):
            expected = crossing(rows.double().numpy(), None, name, 1.0, level, num)
            other = crossing(rows.double().numpy(), None, name, 1.0, level, num, seed=1)
            # of 2000 draws the error is 0.7 of that of the profile's 1000
            assert abs(getattr(profile, time) - (expected + other) / 2) < 4 * profile.time_sem[time], time
            assert profile.time_sem[time] < 0.01

    def test_the_boundary_rises_with_n_and_falls_with_d(self):
        found = {
            (num, dims): measure(DataBank(cloud(num, dims)), num_queries=400, num_times=24)
            for num, dims in ((50, 16), (500, 16), (5000, 16), (500, 64), (500, 256))
        }

        def step(one: tuple[int, int], other: tuple[int, int]) -> float:
            """In standard errors."""
            a, b = found[one], found[other]
            return (b.boundary - a.boundary) / math.hypot(a.time_sem["boundary"], b.time_sem["boundary"])

        assert step((50, 16), (500, 16)) > 6
        assert step((500, 16), (5000, 16)) > 6
        assert step((500, 64), (500, 16)) > 6
        assert step((500, 256), (500, 64)) > 6
        # in the limit one row has all weight once the row's channel carries log N: D / 2 log(1 + (a / s)^2)
        for num, dims in ((500, 64), (500, 256)):
            ratio = math.sqrt(math.exp(2 * math.log(num) / dims) - 1)
            assert found[num, dims].boundary == pytest.approx(ratio / (1 + ratio), rel=0.15)


class TestErrors:
    """Over seeds the numbers spread as one of them says that they do."""

    SEEDS = 32

    @pytest.fixture(scope="class")
    @classmethod
    def profiles(cls) -> list[StageProfile]:
        bank = DataBank(cloud(40, 4, seed=1), torch.arange(40) % 2)
        oracle = Oracle(bank, LinearPath())
        return [
            StageProfile.measure(oracle, 0.3, num_queries=200, seed=seed, num_times=25, by_label=True)
            for seed in range(cls.SEEDS)
        ]

    def common(self, profiles) -> list[float]:
        """Times that all have: the even grid."""
        times = set(profiles[0].t).intersection(*(profile.t for profile in profiles))
        assert len(times) >= 9
        return sorted(t for t in times if t < 0.72)  # later the curves are made by rare draws

    @pytest.mark.parametrize("kind", [None, "unconditional", "conditional"])
    @pytest.mark.parametrize("name", [*MEANS, *MEDIANS])
    def test_curves(self, profiles, kind, name):
        ratios = []
        for t in self.common(profiles):
            curves = [(p if kind is None else getattr(p, kind), p.t.index(t)) for p in profiles]
            spread = np.std([getattr(curve, name)[i] for curve, i in curves], ddof=1)
            reported = np.median([curve.sem[name][i] for curve, i in curves])
            if spread > 1e-5:  # not where the weights are equal, or the median draw has collapsed
                ratios.append(spread / reported)
        assert len(ratios) >= 5
        assert np.median(ratios) == pytest.approx(1, abs=0.25)
        assert max(ratios) < 1.5
        assert min(ratios) > 0.6

    @pytest.mark.parametrize("kind", [None, "unconditional", "conditional"])
    @pytest.mark.parametrize("name", ["boundary", "refinement_complete"])
    def test_times(self, profiles, kind, name):
        curves = [p if kind is None else getattr(p, kind) for p in profiles]
        spread = np.std([getattr(curve, name) for curve in curves], ddof=1)
        reported = math.sqrt(np.mean([curve.time_sem[name] ** 2 for curve in curves]))
        assert spread / reported == pytest.approx(1, abs=0.35)

    def test_guidance(self, profiles):
        ratios = []
        for t in self.common(profiles):
            places = [(p, p.t.index(t)) for p in profiles]
            reported = np.mean([p.guidance_sem[i] for p, i in places])
            ratios.append(np.std([p.guidance[i] for p, i in places], ddof=1) / reported)
        assert np.median(ratios) == pytest.approx(1, abs=0.25)

    def test_floor_of_a_density_is_a_bound(self, profiles):
        found = np.array([profile.expected_floor() for profile in profiles])
        spread = found[:, 0].std(ddof=1)
        assert 0.7 * spread < found[:, 1].mean() < 3 * spread

    def test_fall_with_the_root_of_the_queries(self):
        bank = DataBank(cloud(40, 4, seed=1))
        few, many = (measure(bank, num_queries=num, num_times=12) for num in (200, 3200))
        for name in ("top1", "floor"):
            i, j = (profile.t.index(min(profile.t, key=lambda t: abs(t - 0.16))) for profile in (few, many))
            assert few.sem[name][i] / many.sem[name][j] == pytest.approx(4, rel=0.2)

    def test_of_one_query_are_zero(self):
        profile = measure(DataBank(cloud(5, 2), torch.arange(5) % 2), None, 0.5, num_queries=1, by_label=True)
        assert {x for values in profile.sem.values() for x in values} == {0.0}
        assert max(profile.time_sem.values()) < 1e-12
        assert set(profile.guidance_sem) == {0.0}


class TestLabels:
    @pytest.fixture(scope="class")
    @classmethod
    def data(cls) -> tuple[Tensor, Tensor]:
        """Two classes of 40 and 10 rows, so that their stages lie apart from each other and from those of all rows."""
        return cloud(50, 6), (torch.arange(50) >= 40).long()

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, data) -> Oracle:
        return Oracle(DataBank(*data), LinearPath())

    @pytest.mark.parametrize(("path", "by_label"), [("linear", False), ("linear", True), ("cosine", True)])
    @pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 1.0])
    def test_mixes_against_draws_without_the_package(self, data, path, by_label, dropout):
        oracle = Oracle(DataBank(*data), CosinePath() if path == "cosine" else LinearPath())
        profile = StageProfile.measure(oracle, dropout, num_queries=600, by_label=by_label)
        assert profile.label_dropout == dropout
        rows, labels, num = data[0].double().numpy(), data[1].numpy(), 4000
        for i in range(0, len(profile.t), 5):
            truth = draws_of(rows, labels, path, profile.t[i], dropout, num)
            for name in MEANS:
                value, error = truth[name].mean(), truth[name].std() / math.sqrt(num)
                both = math.hypot(error, profile.sem[name][i])
                assert abs(getattr(profile, name)[i] - value) < 4 * both + 1e-4 * value + 1e-5, (name, profile.t[i])
            for name in MEDIANS:
                low, high = np.quantile(truth[name], [0.5 - 2 / num**0.5, 0.5 + 2 / num**0.5])
                slack = 3.5 * profile.sem[name][i] + 1e-4
                assert low - slack <= getattr(profile, name)[i] <= high + slack, (name, profile.t[i])
        for level, name in ((0.1, "navigation_end"), (0.5, "boundary"), (0.9, "refinement_complete")):
            error = 4.5 * profile.time_sem[name] + 1e-3
            if dropout == 0 and name == "navigation_end":  # the jump from one class's top1 to the other's
                error += 0.03
            assert abs(getattr(profile, name) - crossing(rows, labels, path, dropout, level)) < error, name

    def test_both_ways_agree_and_asking_twice_is_not_less_exact(self, oracle):
        one, other = (StageProfile.measure(oracle, 0.5, num_queries=500, by_label=both) for both in (False, True))
        assert one.unconditional is one.conditional is one.guidance is one.guidance_sem is None
        for name in MEANS:
            for t in [t for t in one.t if t in other.t and t < 0.8]:
                i, j = one.t.index(t), other.t.index(t)
                difference = getattr(one, name)[i] - getattr(other, name)[j]
                assert abs(difference) < 4 * one.sem[name][i] + 1e-5, (name, t)
                assert other.sem[name][j] < 1.15 * one.sem[name][i] + 1e-5, (name, t)

    @pytest.mark.parametrize(("kind", "dropout"), [("unconditional", 1.0), ("conditional", 0.0)])
    def test_the_parts_are_the_profiles_of_either_kind(self, oracle, kind, dropout):
        part = getattr(StageProfile.measure(oracle, 0.1, num_queries=300, by_label=True), kind)
        whole = StageProfile.measure(oracle, 0.1, num_queries=300, by_label=True)
        alone = StageProfile.measure(oracle, dropout, num_queries=300)
        assert part == getattr(whole, kind)
        shared = set(alone.t) & set(whole.t)
        assert len(shared) >= 11
        for t in shared:  # the same draws
            i, j = whole.t.index(t), alone.t.index(t)
            for name in (*MEANS, *MEDIANS):
                assert getattr(part, name)[i] == pytest.approx(getattr(alone, name)[j], rel=1e-5, abs=1e-6), (name, t)
                assert part.sem[name][i] == pytest.approx(alone.sem[name][j], rel=1e-4, abs=1e-6), (name, t)
        for name in ("boundary", "refinement_complete"):
            assert getattr(part, name) == pytest.approx(getattr(alone, name), abs=0.01)

    @pytest.mark.parametrize("dropout", [0.0, 1.0])
    def test_a_mix_of_one_kind_is_that_kind(self, oracle, dropout):
        profile = StageProfile.measure(oracle, dropout, num_queries=50, by_label=True)
        part = profile.unconditional if dropout else profile.conditional
        for field in dataclasses.fields(part):
            assert getattr(profile, field.name) == getattr(part, field.name), field.name

    def test_guidance_against_draws_without_the_package(self, data, oracle):
        profile = StageProfile.measure(oracle, 0.1, num_queries=1000, by_label=True)
        rows, labels, num = data[0].double().numpy(), data[1].numpy(), 4000
        for i in range(0, len(profile.t), 4):
            t = profile.t[i]
            kept, dropped = (draws_of(rows, labels, "linear", t, dropout, num)["mean"] for dropout in (0.0, 1.0))
            values = ((kept - dropped) ** 2).sum(1) / (1 - t) ** 2 / 6
            both = math.hypot(values.std() / math.sqrt(num), profile.guidance_sem[i])
            assert abs(profile.guidance[i] - values.mean()) < 4 * both + 1e-6, t
            assert profile.guidance_sem[i] == pytest.approx(values.std() / math.sqrt(1000), rel=0.3, abs=1e-4)
        # at t = 0 it is the distance of the classes' means to the mean of all
        means = np.stack([rows[labels == label].mean(0) for label in labels])
        exact = ((means - rows.mean(0)) ** 2).sum(1).mean() / 6
        assert abs(profile.guidance[0] - exact) < 4 * profile.guidance_sem[0]

    def test_labels_move_the_stages_towards_noise(self, oracle):
        kept, mixed, dropped = (StageProfile.measure(oracle, label_dropout=share) for share in (0.0, 0.5, 1.0))
        assert kept.boundary < mixed.boundary < dropped.boundary

    def test_a_class_of_one_row(self):
        bank = DataBank(cloud(30, 5), (torch.arange(30) == 29).long())
        profile = measure(bank, None, 0.1, num_queries=500, by_label=True)
        # a query of the lone row has all its weight from the start, and the others those of 29 rows
        lone = float((torch.randint(30, (500,), generator=keyed_generator("profile", 0)) == 29).float().mean())
        assert 0 < lone < 0.1
        assert profile.conditional.top1[0] == pytest.approx(lone + (1 - lone) / 29, rel=1e-5)
        assert profile.conditional.own[0] == pytest.approx(lone + (1 - lone) / 29, rel=1e-5)
        assert profile.conditional.ess[0] == pytest.approx(29, rel=1e-5)
        json.loads(profile.to_json(), parse_constant=pytest.fail)

    def test_classes_of_one_row_each(self):
        profile = measure(DataBank(cloud(6, 2), torch.arange(6)), None, 0.5, num_queries=50, by_label=True)
        assert profile.conditional.refinement_complete == 0
        assert set(profile.conditional.floor) == {0.0}
        assert profile.unconditional.refinement_complete > 0.3
        # half of the weight is on queries that have collapsed from the start: the median is the largest of the others
        assert profile.navigation_end == 0  # 1 / 6
        assert 0 < profile.boundary < profile.unconditional.boundary

    @pytest.mark.parametrize("by_label", [False, True])
    def test_an_unlabelled_bank_has_no_labels_to_keep(self, data, by_label):
        with_labels = measure(DataBank(*data), None, 1.0)
        without = measure(DataBank(data[0]), None, 0.1, by_label=by_label)
        assert without.label_dropout == 1
        assert without.conditional is without.unconditional is without.guidance is None
        assert without.boundary == pytest.approx(with_labels.boundary, abs=1e-6)

    def test_seeds(self, oracle):
        assert StageProfile.measure(oracle, seed=3) == StageProfile.measure(oracle, seed=3)
        one, other = StageProfile.measure(oracle, seed=3), StageProfile.measure(oracle, seed=4)
        assert one.top1 != other.top1
        assert one.boundary == pytest.approx(other.boundary, abs=0.05)

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_a_share_outside_raises(self, oracle, share):
        with pytest.raises(ValueError, match="label_dropout"):
            StageProfile.measure(oracle, label_dropout=share)


class TestOddBanks:
    def test_one_row_is_refined_from_the_start(self, path):
        profile = measure(DataBank(torch.ones(1, 2, 2)), path, num_queries=16)
        assert profile.navigation_end == profile.boundary == profile.refinement_complete == 0
        assert set(profile.top1) == set(profile.ess) == set(profile.own) == {1.0}
        assert set(profile.floor) == set(profile.entropy) == {0.0}
        assert profile.expected_floor() == (0.0, 0.0)

    def test_constant_data_is_one_row(self):
        profile = measure(DataBank(torch.full((20, 3), 0.3)), num_queries=16)
        assert (profile.num_rows, profile.num_distinct) == (20, 1)
        assert profile.boundary == 0
        assert set(profile.floor) == {0.0}

    def test_copies_change_nothing(self):
        """Two copies of every row: top1 counts images, not rows. Of a row with three the weight is three times."""
        rows = cloud(50, 6)
        one, two = (measure(DataBank(x), num_queries=1000) for x in (rows, rows.repeat(2, 1)))
        assert (one.num_rows, two.num_rows, two.num_distinct) == (50, 100, 50)
        assert abs(one.boundary - two.boundary) < 4 * math.hypot(one.time_sem["boundary"], two.time_sem["boundary"])
        thrice = measure(DataBank(torch.cat([rows, rows[:1], rows[:1]])), num_queries=50)
        assert thrice.top1[0] == pytest.approx(3 / 52, rel=1e-5)
        assert thrice.own[0] == pytest.approx((9 + 49) / 52**2, rel=1e-5)

    def test_rows_that_nearly_coincide(self):
        """Pairs 1e-3 apart: the pair is found early, the row near the end only; the median stays at one half."""
        rows = cloud(20, 8)
        profile = measure(DataBank(torch.cat([rows, rows + 1e-3 / 8**0.5])), num_queries=400)
        alone = measure(DataBank(rows), num_queries=400)
        half_way = [i for i, t in enumerate(profile.t) if alone.refinement_complete + 0.25 < t < 0.99]
        assert half_way
        for i in half_way:
            assert profile.top1_median[i] == pytest.approx(0.5, abs=0.02)
        k = TestTwoPoints.k_of(0.9) / 5e-4
        error = 4 * profile.time_sem["refinement_complete"]
        assert abs(profile.refinement_complete - k / (1 + k)) < error
        json.loads(profile.to_json(), parse_constant=pytest.fail)

    @pytest.mark.parametrize("unit", [1e-6, 1e-3, 1.0, 255.0, 1e5])
    def test_units(self, unit, path):
        """The stages of c x_1 lie where alpha / sigma is 1 / c of what it is for x_1."""
        rows = cloud(30, 8)
        profile = measure(DataBank(rows * unit), path, num_queries=200)
        reference = measure(DataBank(rows), num_queries=200)
        json.loads(profile.to_json(), parse_constant=pytest.fail)
        assert profile.boundary <= profile.refinement_complete
        ratio = reference.boundary / (1 - reference.boundary) / unit
        ends = torch.tensor([0.0, min(path.max_time, 1 - 2**-20)]).double()
        first, last = (path.alpha(ends) / path.sigma(ends)).tolist()
        if ratio < first:  # VPPath has some signal at t = 0
            assert profile.boundary == 0.0
        elif ratio > last:  # later than any time that is measured
            assert profile.boundary == 1.0
        else:
            t = torch.tensor([profile.boundary]).double()
            found = float(path.alpha(t) / path.sigma(t))
            near = 1.0 if unit == 1e5 else 0.1  # next to t = 0 the grid ends at 1e-4
            assert profile.boundary < 1e-4 or abs(math.log(found / ratio)) < near


@pytest.mark.parametrize("few", [{"num_queries": 0}, {"num_times": 2}], ids=str)
def test_too_few_draws_or_times_raise(few):
    with pytest.raises(ValueError, match="must be 1 or more"):
        measure(DataBank(torch.eye(3)), **few)


def shifted(t: float, shift: float) -> float:
    """Density of u / (u + s (1 - u)) for uniform u."""
    return shift / (shift * t + 1 - t) ** 2


def logit_normal(t: float, mean: float, std: float) -> float:
    return scipy.stats.norm.pdf(math.log(t / (1 - t)), mean, std) / t / (1 - t)


class TestExpectedFloor:
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls) -> StageProfile:
        return measure(two_points(1.5), num_queries=3000, num_times=40)

    @staticmethod
    def floor(t: float) -> float:
        return float(DENSITY @ of_two_points(1.5 * t / (1 - t), 1 / (1 - t), 1.5)["floor"])

    @pytest.mark.parametrize(
        ("timesteps", "density"),
        [
            (None, lambda t: 1.0),
            (ShiftedTimesteps(3.0), lambda t: shifted(t, 3.0)),
            (ShiftedTimesteps(0.2), lambda t: shifted(t, 0.2)),
            (LogitNormalTimesteps(-0.5, 0.8), lambda t: logit_normal(t, -0.5, 0.8)),
        ],
        ids=["uniform", "shift 3", "shift 0.2", "logit-normal"],
    )
    @pytest.mark.parametrize("ends", [(0.0, 1.0), (0.0, 0.25), (0.3, 0.5), (0.4, 1.0), (0.0, 0.02)], ids=str)
    def test_against_numeric_integration(self, profile, timesteps, density, ends):
        start, end = ends
        low, high = max(start, 1e-6), min(end, 1 - 1e-6)
        mass, _ = scipy.integrate.quad(density, low, high, limit=200)
        if mass < 1e-3:
            pytest.skip("no draws to speak of")
        total, _ = scipy.integrate.quad(lambda t: self.floor(t) * density(t), low, high, limit=200)
        found, error = profile.expected_floor(timesteps, *ends)
        assert abs(found - total / mass) < 3 * error + 2e-3 * found
        assert 0 < error < 0.05 * found + 0.005

    def test_a_narrow_range_is_its_middle(self, profile):
        """Also where few draws fall."""
        for t in (0.1, 0.2, 0.3):
            floor, error = profile.expected_floor(ShiftedTimesteps(0.5), t, t + 1e-6)
            assert abs(floor - self.floor(t)) < 3 * error + 2e-3

    @pytest.mark.parametrize("ends", [(0.5, 0.5), (0.6, 0.4), (1.0, 1.0), (-2.0, -1.0)], ids=str)
    def test_an_empty_range_raises(self, profile, ends):
        with pytest.raises(ValueError, match="no draws in"):
            profile.expected_floor(None, *ends)


class TestGuidanceInterval:
    @pytest.mark.parametrize(
        ("navigation_end", "boundary", "expected"),
        [(0.1, 0.1, (0.1, 0.6)), (0.05, 0.15, (0.05, 0.9)), (0.2, 0.3, (0.2, 1.0)), (0.0, 0.0, (0.0, 0.0))],
    )
    def test_of_known_times(self, navigation_end, boundary, expected):
        """The first is the best row of Table 3 of arXiv 2512.02826."""
        profile = measure(two_points(1.0), num_queries=4, num_times=3)
        profile = dataclasses.replace(profile, navigation_end=navigation_end, boundary=boundary)
        assert profile.guidance_interval() == pytest.approx(expected)


@pytest.fixture(scope="module")
def profile() -> StageProfile:
    return measure(DataBank(cloud(20, 3), torch.arange(20) % 2), None, 0.1, num_queries=32, by_label=True)


class TestJson:
    def test_round_trip(self, profile):
        back = StageProfile.from_json(profile.to_json())
        assert back == profile
        assert type(back.conditional) is type(profile.conditional)

    def test_round_trip_of_one_kind(self):
        whole = measure(two_points(1.0), num_queries=4, num_times=3)
        assert StageProfile.from_json(whole.to_json()) == whole

    def test_is_plain_json(self, profile):
        plain = json.loads(profile.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert plain["boundary"] == profile.boundary
        assert plain["path"] == "LinearPath"
        assert plain["conditional"]["time_sem"] == profile.conditional.time_sem
        assert len(plain["t"]) == len(plain["top1"]) == len(plain["floor"]) == len(plain["guidance"])

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"boundary"', "{}", '{"boundary": 0.3}'])
    def test_other_text_raises(self, text):
        with pytest.raises(ValueError, match="not a stage profile"):
            StageProfile.from_json(text)

    CHANGES = {  # noqa: RUF012
        "an unknown key": lambda p: p.update(bondary=0.3),
        "a missing key": lambda p: p.pop("floor"),
        "an unknown key of a part": lambda p: p["conditional"].update(bondary=0.3),
        "a missing key of a part": lambda p: p["unconditional"].pop("sem"),
        "a part that is a list": lambda p: p.update(conditional=[1, 2]),
        "a part that is a number": lambda p: p.update(conditional=3),
        "a short list": lambda p: p["top1"].pop(),
        "a long list": lambda p: p["own"].append(0.5),
        "a short list of errors": lambda p: p["sem"]["floor"].pop(),
        "no errors": lambda p: p["sem"].pop("floor"),
        "errors that are a list": lambda p: p.update(sem=[]),
        "a short list of a part": lambda p: p["conditional"]["ess"].pop(),
        "NaN": lambda p: p["floor"].__setitem__(3, math.nan),
        "null": lambda p: p["floor"].__setitem__(3, None),
        "text": lambda p: p["floor"].__setitem__(3, "much"),
        "infinity of a part": lambda p: p["conditional"]["ess"].__setitem__(0, math.inf),
        "NaN among errors": lambda p: p["sem"]["top1"].__setitem__(1, math.nan),
        "short guidance": lambda p: p["guidance"].pop(),
        "NaN in guidance's errors": lambda p: p["guidance_sem"].__setitem__(0, math.nan),
        "equal times": lambda p: p["t"].__setitem__(2, p["t"][1]),
        "falling times": lambda p: p["t"].reverse(),
        "a time that is NaN": lambda p: p["t"].__setitem__(2, math.nan),
        "a last time that is NaN": lambda p: p["t"].__setitem__(-1, math.nan),
        "a time beyond 1": lambda p: p["t"].__setitem__(-1, 1.5),
        "a time before 0": lambda p: p["t"].__setitem__(0, -1.0),
        "times that are a number": lambda p: p.update(t=3.0),
        "times that are null": lambda p: p.update(t=None),
        "a boundary that is NaN": lambda p: p.update(boundary=math.nan),
        "a boundary outside": lambda p: p.update(boundary=1.1),
        "a boundary outside of a part": lambda p: p["unconditional"].update(boundary=-1),
        "a boundary without error": lambda p: p["time_sem"].pop("boundary"),
        "a boundary with an error that is NaN": lambda p: p["time_sem"].update(boundary=math.nan),
        "a share that is NaN": lambda p: p.update(label_dropout=math.nan),
        "a share that is null": lambda p: p.update(label_dropout=None),
        "a norm that is text": lambda p: p.update(rms_norm="large"),
    }

    @pytest.mark.parametrize("name", CHANGES)
    def test_is_refused_with(self, profile, name, tmp_path):
        plain = json.loads(profile.to_json())
        self.CHANGES[name](plain)
        with pytest.raises(ValueError, match="not a stage profile"):
            StageProfile.from_json(json.dumps(plain))
        (tmp_path / "stages.json").write_text(json.dumps(plain))
        with pytest.raises(ValueError, match=r"stages\.json: not a stage profile.*`fm-stages profile` writes one") as e:
            StageProfile.load(tmp_path / "stages.json")
        assert "\n" not in str(e.value)

    def test_files(self, profile, tmp_path):
        file = tmp_path / "some" / "folder" / "stages.json"
        profile.save(file)
        assert StageProfile.load(file) == profile == StageProfile.load(str(file))
        profile.save(str(file))  # over the old one
        assert file.read_text() == profile.to_json() + "\n"

    def test_files_of_something_else(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"missing\.json"):
            StageProfile.load(tmp_path / "missing.json")
        for content in (b"\x89PNG\xff\xfe", b"", b"t: [0, 1]"):
            (tmp_path / "other").write_bytes(content)
            with pytest.raises(ValueError, match=r"other: .*`fm-stages profile` writes one"):
                StageProfile.load(tmp_path / "other")


@pytest.mark.slow
class TestFashionMnist:
    """60 000 x 784 in [-1, 1], linear path, unconditional."""

    TIMES = (0.05, 0.10, 0.20, 0.25, 0.30, 0.35, 0.40, 0.50, 0.60)
    TABLE = {  # noqa: RUF012
        "top1": ((0.000, 0.003, 0.10, 0.23, 0.47, 0.69, 0.87, 0.986, 0.999), (3, 3, 2, 2, 2, 2, 2, 3, 3)),
        "ess": ((32_000, 7_300, 140, 28, 4.9, 1.5, 1.0, 1.0, 1.0), (-3, -2, -1, 0, 1, 1, 1, 1, 1)),
        "floor": ((0.35, 0.29, 0.19, 0.14, 0.093, 0.050, 0.016, 0.0007, 0.0), (2, 2, 2, 2, 3, 3, 3, 4, 4)),
    }
    """Values and their decimals; from 256 draws per time, some 3 % each."""

    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls, fashion_mnist) -> StageProfile:
        return measure(DataBank(fashion_mnist[0]))

    @pytest.mark.parametrize("name", TABLE)
    def test_against_the_table_of_reference_points(self, profile, name):
        for t, value, decimals in zip(self.TIMES, *self.TABLE[name], strict=True):
            curve, sem = getattr(profile, name), profile.sem[name]
            if name == "ess":  # falls by factors
                found = math.exp(np.interp(t, profile.t, np.log(curve)))
            else:
                found = np.interp(t, profile.t, curve)
            error = np.interp(t, profile.t, sem)
            rounding = 0.5 * 10.0**-decimals
            # the table is of as many other draws: its own error is that of the profile, and what is stated
            assert abs(found - value) < 3 * math.hypot(0.03 * value, 1.5 * error) + rounding, (name, t, found, error)

    def test_the_boundary_of_the_same_draws_in_float64(self, profile, fashion_mnist):
        index = torch.randint(60_000, (256,), generator=keyed_generator("profile", 0))
        noise = keyed_normal(("profile noise", 0), torch.arange(256), (1, 28, 28)).flatten(1).double()
        rows = fashion_mnist[0].flatten(1)
        x1 = rows[index].double()

        def top1_at(t: float) -> np.ndarray:
            x_t = t * x1 + (1 - t) * noise
            logits = torch.empty(256, len(rows), dtype=torch.float64)
            for place in torch.arange(len(rows)).split(4096):
                part = rows[place].double()
                logits[:, place] = t / (1 - t) ** 2 * (x_t @ part.T - t / 2 * part.square().sum(1))
            return torch.softmax(logits, 1).amax(1).numpy()

        after = next(i for i, median in enumerate(profile.top1_median) if median >= 0.5)
        for i in (after - 1, after):
            truth = top1_at(profile.t[i])
            assert profile.top1[i] == pytest.approx(truth.mean(), abs=2e-4)
            assert profile.top1_median[i] == pytest.approx(np.sort(truth)[127], abs=1e-3)
        assert profile.t[after - 1] <= profile.boundary <= profile.t[after]
        assert profile.t[after] - profile.t[after - 1] < 0.01
        assert np.median(top1_at(profile.boundary)) == pytest.approx(0.5, abs=0.02)
        assert profile.boundary == pytest.approx(0.320, abs=4 * profile.time_sem["boundary"])
