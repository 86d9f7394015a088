"""Arms after equal steps and after equal time, against curves whose law is known."""

import json
import math

import pytest

from fm_stages.studies.compare.measure import PROGRESS
from fm_stages.studies.compare.progress import cost_of_step, equal_time, progress_curves, seconds_per_step


def run(train_sec: float, numbers: dict[int, float], steps: int = 0) -> dict:
    """A run in which all numbers are equal."""
    stones = [{"step": step, **dict.fromkeys(PROGRESS, x)} for step, x in numbers.items()]
    return {"steps": steps or max(numbers), "train_sec": train_sec, "milestones": stones}


def test_the_pace_is_that_of_the_fastest_run():
    runs = {seed: run(seconds, {10: 1.0}) for seed, seconds in enumerate((20.0, 900.0, 30.0))}
    assert seconds_per_step({"arm": runs, "unfinished": {}}) == {"arm": 2.0}


def test_cost_is_time_per_step_over_the_references():
    regular = {seed: run(seconds, {10: 1.0}) for seed, seconds in enumerate((20.0, 30.0, 25.0))}
    oracle = {seed: run(seconds, {5: 1.0}) for seed, seconds in enumerate((20.0, 20.0, 30.0))}
    costs = cost_of_step({"regular": regular, "oracle": oracle}, "regular")
    assert costs["oracle"] == pytest.approx((4 / 2, 4 / 3, 6 / 2.5))
    assert costs["regular"] == pytest.approx((1, 1, 1))
    assert cost_of_step({"regular": {}, "oracle": oracle}, "regular") == {}


class TestEqualTime:
    RESULTS = {
        # falls by 1 with each doubling, so by log2 of the step whatever lies between
        "fast": {0: run(80.0, {2: 9.0, 4: 8.0, 8: 7.0}), 1: run(80.0, {2: 9.5, 4: 8.5, 8: 7.5})},
        "slow": {0: run(226.27417, {2: 5.0, 4: 4.0, 8: 3.0}), 1: run(226.27417, {2: 5.5, 4: 4.5, 8: 3.5})},
    }

    def test_the_slow_arm_is_read_at_the_step_that_it_has_reached(self):
        found = equal_time(self.RESULTS)
        assert found.seconds == pytest.approx(80)
        assert found.steps == pytest.approx({"fast": 8, "slow": 2 * math.sqrt(2)})  # a cost of sqrt(8)
        for name in PROGRESS:
            assert found.values["fast"][name] == pytest.approx({0: 7.0, 1: 7.5})
            assert found.values["slow"][name] == pytest.approx({0: 4.5, 1: 5.0})

    def test_an_arm_of_fewer_steps_sets_the_time(self):
        short = {0: run(10.0, {1: 1.0, 2: 0.5})}
        found = equal_time({"long": {0: run(100.0, {1: 3.0, 2: 2.0, 10: 1.0})}, "short": short})
        assert found.seconds == pytest.approx(10)
        assert found.steps == pytest.approx({"long": 1, "short": 2})
        assert found.values["long"]["gap"] == pytest.approx({0: 3.0})

    def test_nothing_is_read_off_before_the_first_measurement(self):
        found = equal_time({"fast": {0: run(10.0, {10: 1.0})}, "slow": {0: run(100.0, {10: 1.0})}})
        assert found.values["fast"]["gap"] == {0: 1.0}
        assert math.isnan(found.values["slow"]["gap"][0])

    def test_what_could_not_be_measured_is_left_out(self):
        one = run(10.0, {2: 3.0, 4: 2.0, 8: 1.0})
        one["milestones"][1]["gap"] = None  # as JSON holds NaN
        slow = equal_time({"fast": {0: run(5.0, {8: 1.0})}, "slow": {0: one}})
        assert slow.values["slow"]["regular"][0] == pytest.approx(2.0)
        assert slow.values["slow"]["gap"][0] == pytest.approx(2.0)  # between 2 and 8 steps

    def test_there_is_none_without_a_finished_run(self):
        assert equal_time({"arm": {}}) is None


class TestCurves:
    def test_mean_and_error_over_seeds(self):
        runs = {0: run(20.0, {5: 4.0, 10: 1.0}), 1: run(20.0, {5: 2.0, 10: 1.0})}
        curve = progress_curves({"arm": runs})["arm"]
        assert (curve["steps"], curve["seconds"]) == ([5, 10], [10.0, 20.0])
        assert curve["gap"] == {"mean": [3.0, 1.0], "sem": [pytest.approx(1.0), 0.0]}  # deviation sqrt(2) / sqrt(2)

    def test_only_steps_that_all_seeds_were_measured_at(self):
        runs = {0: run(20.0, {5: 4.0, 10: 1.0}), 1: run(20.0, {10: 1.0})}
        curve = progress_curves({"arm": runs})["arm"]
        assert curve["steps"] == [10]
        assert curve["gap"]["mean"] == [1.0]

    def test_missing_numbers_leave_a_gap_in_the_line(self):
        one = run(20.0, {5: 4.0, 10: 1.0})
        one["milestones"][0]["gap"] = None
        curve = progress_curves({"arm": {0: json.loads(json.dumps(one))}})["arm"]
        assert math.isnan(curve["gap"]["mean"][0])
        assert curve["gap"]["mean"][1] == 1.0
