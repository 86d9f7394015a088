"""Numbers of a validation, from curves made by hand."""

import math

import pytest

from fm_stages.oracle import Curves
from fm_stages.training.monitor.generalisation import (
    best_step_metrics,
    best_validation,
    excess_of,
    losses_over_steps,
    named,
    validation_metrics,
)
from fm_stages.training.monitor.history import History

EDGES, NAN = [0.0, 0.5, 0.75, 1.0], math.nan


def curves(*regular: float, sem: float = 0.1) -> Curves:
    mean = {"regular": list(regular), "gap": [0.2, NAN, NAN], "wiener": [0.4, NAN, NAN]}
    return Curves(EDGES, [4] * 3, mean, {name: [sem] * 3 for name in mean})


class TestMetrics:
    def test_by_stage(self):
        found = validation_metrics({"": curves(0.3, 0.5, 0.7)}, {"": curves(0.3, 0.4, 0.4)}, 0.5)
        assert found == pytest.approx(
            {
                "oracle_val/regular": 0.45,
                "oracle_val/regular_navigation": 0.3,
                "oracle_val/regular_refinement": 0.6,
                "oracle_val/gap_navigation": 0.2,
                "oracle_val/closed": 0.5,
                "oracle_train/regular": 0.35,
                "oracle_train/regular_navigation": 0.3,
                "oracle_train/regular_refinement": 0.4,
                "memorization/excess_navigation": 0.0,
                "memorization/excess_navigation_sem": 0.1 * math.sqrt(2),
                "memorization/excess_refinement": 0.2,
                "memorization/excess_refinement_sem": 0.1,
            }
        )

    def test_averaged_weights_end_in_ema(self):
        both = {"": curves(1, 1, 1), "_ema": curves(1, 1, 1)}
        found = validation_metrics(both, both, 0.5)
        assert {name for name in found if name.endswith("_ema")} == {f"{n}_ema" for n in found if "_ema" not in n}

    @pytest.mark.parametrize(("boundary", "stage"), [(0.0, "refinement"), (1.0, "navigation")])
    def test_of_a_stage_that_there_is_not_there_are_none(self, boundary, stage):
        found = validation_metrics({"": curves(1, 1, 1)}, {"": curves(1, 1, 1)}, boundary)
        other = ({"navigation", "refinement"} - {stage}).pop()
        assert f"memorization/excess_{stage}" in found
        assert not [name for name in found if other in name]

    def test_without_a_probe_there_is_no_excess(self):
        found = validation_metrics({"": curves(1, 1, 1)}, {}, 0.5)
        assert not [name for name in found if not name.startswith("oracle_val/")]

    def test_what_is_no_number_stays_none(self):
        excess, error = excess_of(curves(NAN, NAN, NAN), curves(1, 1, 1), 0.5, 1)
        assert math.isnan(excess)
        assert error == pytest.approx(0.1)


class TestOverSteps:
    @pytest.fixture
    def history(self) -> History:
        found = History("regular")
        for step, late in ((10, 0.5), (20, 0.3), (30, 0.4), (40, NAN)):
            held_out = {"": curves(0.5, late, late), "_ema": curves(0.5, late + step, late + step)}
            found.add(step, named(held_out, {"": curves(0.5, 0.1, 0.1)}))
        return found

    def test_best_is_the_lowest_past_the_boundary(self, history):
        assert best_validation(history, "", 0.5) == 1
        assert best_step_metrics(history, 0.5) == {"memorization/best_step": 20, "memorization/best_step_ema": 10}

    def test_there_is_none_of_what_was_never_measured(self):
        assert best_validation(History("regular"), "", 0.5) is None
        history = History("regular")
        history.add(10, named({"": curves(NAN, NAN, NAN)}, {}))
        assert best_step_metrics(history, 0.5) == {}

    def test_table(self, history):
        columns, rows = losses_over_steps(history, 0.5)
        assert [row[0] for row in rows] == [10, 20, 30, 40]
        assert [row[columns.index("refinement_held_out")] for row in rows[:3]] == pytest.approx([0.5, 0.3, 0.4])
        assert [row[columns.index("navigation_train")] for row in rows] == [0.5] * 4
        assert rows[0][columns.index("refinement_train_sem")] == pytest.approx(0.1 / math.sqrt(2))
        assert len(columns) == 1 + 2 * 2 * 3
