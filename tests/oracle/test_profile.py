"""Where the stages lie, against closed forms and against draws made without the package."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, Path
from fm_stages.oracle import DataBank, Oracle, StageProfile

NUM = 4096  # queries: the median's error in logit(t) is then about 0.02


def logit(t: float) -> float:
    return math.log(t / (1 - t))


def median_top1(rows: np.ndarray, labels: np.ndarray, path: str, t: float, dropout: float, num: int = 4000) -> float:
    """From draws of the process itself, in float64; the same draws at every t."""
    rng = np.random.default_rng(0)
    a, s = (t, 1 - t) if path == "linear" else (math.sin(math.pi * t / 2), math.cos(math.pi * t / 2))
    index, kept = rng.integers(len(rows), size=num), rng.random(num) >= dropout
    x_t = a * rows[index] + s * rng.standard_normal((num, rows.shape[1]))
    log_weight = -((x_t[:, None] - a * rows) ** 2).sum(2) / (2 * s**2)
    log_weight[kept[:, None] & (labels[index][:, None] != labels)] = -np.inf
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    return float(np.median(weight.max(1) / weight.sum(1)))


def crossings(rows: Tensor, labels: Tensor, path: str, dropout: float) -> list[float]:
    """Where the median top1 passes 0.1, 0.5 and 0.9, in logit(t)."""
    arrays = rows.double().numpy(), labels.numpy()

    def above(x: float, level: float) -> float:
        return median_top1(*arrays, path, 1 / (1 + math.exp(-x)), dropout) - level

    return [scipy.optimize.brentq(above, -4.5, 4.5, args=(level,), xtol=0.01) for level in (0.1, 0.5, 0.9)]


def two_points(distance: float, dims: int = 3) -> DataBank:
    x = torch.zeros(2, dims)
    x[:, 0] = torch.tensor([distance / 2, -distance / 2])
    return DataBank(x)


class TestTwoPoints:
    """At +-c the log odds of a row over the other are 2 k^2 + 2 k e, k = alpha c / sigma and e ~ N(0, 1)."""

    @staticmethod
    def k_of(top1: float) -> float:
        level = math.log(top1 / (1 - top1))  # top1 >= level means |2 k^2 + 2 k e| >= its logit

        def below(k: float) -> float:
            cdf = scipy.stats.norm.cdf
            return cdf((level - 2 * k**2) / (2 * k)) - cdf((-level - 2 * k**2) / (2 * k)) - 0.5

        return scipy.optimize.brentq(below, 0.1, 10)

    @pytest.mark.parametrize("distance", [0.5, 2.0, 20.0])
    def test_refinement_is_complete_where_the_closed_form_says(self, distance):
        ratio = self.k_of(0.9) / (distance / 2)  # alpha / sigma at the crossing
        linear = StageProfile.measure(Oracle(two_points(distance), LinearPath()), num_queries=NUM)
        assert logit(linear.refinement_complete) == pytest.approx(logit(ratio / (1 + ratio)), abs=0.06)
        cosine = StageProfile.measure(Oracle(two_points(distance), CosinePath()), num_queries=NUM)
        assert logit(cosine.refinement_complete) == pytest.approx(logit(math.atan(ratio) * 2 / math.pi), abs=0.06)
        # one of two always weighs half: the other two levels are reached from the start
        assert linear.boundary == linear.navigation_end == 0

    def test_the_curves_are_those_of_the_closed_form(self):
        profile = StageProfile.measure(Oracle(two_points(2.0), LinearPath()), num_queries=NUM)
        e = np.random.default_rng(1).standard_normal(200_000)
        assert profile.t == sorted(profile.t)
        for i in range(0, len(profile.t), 3):
            t = float(np.float32(profile.t[i]))
            k = t / (1 - t)
            other = scipy.special.expit(-2 * k**2 - 2 * k * e)  # weight of the other row
            top1 = np.maximum(other, 1 - other)
            assert profile.top1[i] == pytest.approx(top1.mean(), abs=0.01)
            assert profile.top1_median[i] == pytest.approx(np.median(top1), abs=0.03)
            ess = 1 / (other**2 + (1 - other) ** 2)
            assert profile.ess[i] == pytest.approx(np.median(ess), abs=0.05)
            floor = (4 * other * (1 - other)).mean() / (1 - t) ** 2 / 3  # variance of +-1, D = 3
            assert profile.floor[i] == pytest.approx(floor, rel=0.1, abs=1e-3)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """Two classes of 40 and 10 rows, so that their stages lie apart from each other and from those of all rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), (torch.arange(50) >= 40).long()


class TestManyRows:
    @pytest.mark.parametrize(
        ("path", "name"), [(LinearPath(), "linear"), (CosinePath(), "cosine")], ids=["linear", "cosine"]
    )
    @pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
    def test_against_draws_without_the_package(self, data, path: Path, name, dropout):
        profile = StageProfile.measure(Oracle(DataBank(*data), path), label_dropout=dropout, num_queries=NUM)
        found = [profile.navigation_end, profile.boundary, profile.refinement_complete]
        assert found == sorted(found)
        expected = crossings(*data, name, dropout)
        assert [logit(t) for t in found] == pytest.approx(expected, abs=0.08)
        assert profile.path == type(path).__name__
        assert (profile.num_rows, profile.num_queries, profile.label_dropout) == (50, NUM, dropout)

    def test_labels_move_the_stages_towards_noise(self, data):
        oracle = Oracle(DataBank(*data), LinearPath())
        kept, mixed, dropped = (StageProfile.measure(oracle, label_dropout=share) for share in (0.0, 0.5, 1.0))
        assert kept.boundary < mixed.boundary < dropped.boundary

    def test_an_unlabelled_bank_has_no_labels_to_keep(self, data):
        with_labels = StageProfile.measure(Oracle(DataBank(*data), LinearPath()), label_dropout=1.0)
        without = StageProfile.measure(Oracle(DataBank(data[0]), LinearPath()), label_dropout=0.1)
        assert without.label_dropout == 1
        assert without.boundary == pytest.approx(with_labels.boundary, abs=1e-6)

    def test_the_boundary_is_where_the_measured_median_reaches_half(self, data):
        profile = StageProfile.measure(Oracle(DataBank(*data), LinearPath()), num_queries=NUM)
        at = dict(zip(profile.t, profile.top1_median, strict=True))
        for found, level in zip(
            (profile.navigation_end, profile.boundary, profile.refinement_complete), (0.1, 0.5, 0.9), strict=True
        ):
            assert at[found] >= level
            before = max(t for t in at if t < found)
            assert at[before] < level
            assert logit(found) - logit(before) < 0.011

    def test_seed_and_number_of_queries(self, data):
        oracle = Oracle(DataBank(*data), LinearPath())
        assert StageProfile.measure(oracle, seed=3) == StageProfile.measure(oracle, seed=3)
        one, other = StageProfile.measure(oracle, seed=3), StageProfile.measure(oracle, seed=4)
        assert one.top1 != other.top1
        assert one.boundary == pytest.approx(other.boundary, abs=0.05)

    def test_copies_change_nothing(self, data):
        """Two copies of every row: top1 counts images, not rows."""
        twice = DataBank(data[0].repeat(2, 1))
        one = StageProfile.measure(Oracle(DataBank(data[0]), LinearPath()), num_queries=NUM)
        two = StageProfile.measure(Oracle(twice, LinearPath()), num_queries=NUM)
        assert logit(two.boundary) == pytest.approx(logit(one.boundary), abs=0.1)
        assert (one.num_rows, two.num_rows) == (50, 100)

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_a_share_outside_raises(self, data, share):
        with pytest.raises(ValueError, match="label_dropout"):
            StageProfile.measure(Oracle(DataBank(*data), LinearPath()), label_dropout=share)


class TestOddBanks:
    def test_one_row_is_refined_from_the_start(self, path):
        profile = StageProfile.measure(Oracle(DataBank(torch.ones(1, 2, 2)), path), num_queries=16)
        assert profile.navigation_end == profile.boundary == profile.refinement_complete == 0
        assert set(profile.top1) == set(profile.ess) == {1.0}
        assert set(profile.floor) == {0.0}

    def test_rows_too_close_to_tell_apart_are_refined_at_the_end(self):
        rows = torch.linspace(0, 1e-3, 30)[:, None]
        profile = StageProfile.measure(Oracle(DataBank(rows), LinearPath()), num_queries=64)
        assert profile.boundary == profile.refinement_complete == 1.0
        assert profile.top1_median[-1] < 0.5


@pytest.fixture(scope="module")
def profile() -> StageProfile:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return StageProfile.measure(Oracle(DataBank(rows, torch.arange(20) % 2), LinearPath()), 0.1, num_queries=32)


@pytest.mark.parametrize("few", [{"num_queries": 0}, {"num_times": 1}], ids=str)
def test_too_few_draws_or_times_raise(few):
    with pytest.raises(ValueError, match="must be 1 or more"):
        StageProfile.measure(Oracle(DataBank(torch.eye(3)), LinearPath()), **few)


class TestJson:
    def test_round_trip(self, profile):
        assert StageProfile.from_json(profile.to_json()) == profile

    def test_is_plain_json(self, profile):
        plain = json.loads(profile.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert plain["boundary"] == profile.boundary
        assert plain["path"] == "LinearPath"
        assert len(plain["t"]) == len(plain["top1"]) == len(plain["floor"])

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"boundary"', "{}", '{"boundary": 0.3}'])
    def test_other_text_raises(self, text):
        with pytest.raises(ValueError, match="not a stage profile"):
            StageProfile.from_json(text)

    def test_an_unknown_or_missing_key_raises(self, profile):
        plain = json.loads(profile.to_json())
        for wrong in (plain | {"bondary": 0.3}, {k: v for k, v in plain.items() if k != "floor"}):
            with pytest.raises(ValueError, match="not a stage profile"):
                StageProfile.from_json(json.dumps(wrong))
