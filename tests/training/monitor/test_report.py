"""The printed report, from curves made by hand: each number below was worked out on paper."""

import math

import pytest

from fm_stages.oracle import Curves
from fm_stages.training import report
from fm_stages.training.monitor.report import closed

NAN = math.nan


def curves(**mean) -> Curves:
    """Three bins: two of a quarter before t = 0.5, one of a half after it."""
    sem = {name: [0.01] * 3 for name in mean}
    return Curves([0.0, 0.25, 0.5, 1.0], [10, 10, 20], mean, sem)


def training(wiener: float = 1.0, zero: float = 2.0) -> Curves:
    parts = {"regular": [1.0, 0.8, 0.6], "gap": [0.4, 0.2, 0.5], "floor": [0.6, 0.6, 0.1]}
    return curves(**parts, wiener=[wiener, wiener, 0.7], zero=[zero] * 3)


def held_out() -> Curves:
    return curves(regular=[1.1, 0.9, 0.75], gap=[0.5, 0.3, NAN], wiener=[1.0, 1.0, NAN])


def cells(text: str, row: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(row))
    return [line[26 + 10 * k : 36 + 10 * k].strip() for k in range(4)]


class TestTable:
    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ("training, navigation", ["0.9000", "0.3000", "0.6000", "70 %"]),
            ("training, refinement", ["0.6000", "0.5000", "0.1000", ""]),
            ("training, all t", ["0.7500", "0.4000", "0.3500", ""]),
            ("held-out, navigation", ["1.0000", "0.4000", "", "60 %"]),
            ("held-out, refinement", ["0.7500", "", "", ""]),
            ("held-out, all t", ["0.8750", "", "", ""]),
            ("held-out EMA, navigation", ["1.0000", "0.4000", "", "60 %"]),
            ("held-out EMA, all t", ["0.8750", "", "", ""]),
        ],
    )
    def test_rows(self, row, expected):
        text = report(training(), {"": held_out(), "_ema": held_out()}, 0.5)
        assert cells(text, row) == expected

    def test_rows_of_the_probe_are_there_with_it_alone(self):
        """The sentence on refinement is of the probe, whose numbers are not those of the last window."""
        probe = curves(regular=[0.7, 0.5, 0.5])
        text = report(training(), {"": held_out()}, 0.5, probe={"": probe, "_ema": probe})
        assert cells(text, "probe, refinement") == ["0.5000", "", "", ""]
        assert cells(text, "probe EMA, navigation") == ["0.6000", "", "", ""]
        assert "held-out regular loss 0.7500 against 0.5000 in training (+50 %)" in text
        assert "  probe    training images" in text
        assert "probe" not in report(training(), {"": held_out()}, 0.5)

    def test_says_where_the_stages_lie_and_whose_weights(self):
        text = report(training(), {}, 0.5, "EMA")
        assert "navigation t < 0.500" in text
        assert "of the EMA weights" in text
        assert all(f"  {name:8} " in text for name in ("regular", "gap", "floor", "closed"))

    def test_empty_bins_are_left_out_of_the_means(self):
        found = curves(
            regular=[NAN, 0.8, 0.6],
            gap=[NAN, 0.2, 0.5],
            floor=[NAN, 0.6, 0.1],
            wiener=[NAN, 0.4, 0.7],
            zero=[NAN, 2.0, 2.0],
        )
        found.count[0] = 0
        text = report(found, {}, 0.5)
        assert cells(text, "training, navigation") == ["0.8000", "0.2000", "0.6000", "50 %"]
        assert cells(text, "training, all t")[0] == "0.6667"  # (0.25 * 0.8 + 0.5 * 0.6) / 0.75


class TestSentences:
    def test_percentages(self):
        text = report(training(), {"": held_out()}, 0.5)
        assert (
            "navigation: 70 % of the way from the best linear model to the oracle; 67 % of its regular loss is floor"
            in text
        )
        assert "held-out regular loss 0.7500 against 0.6000 in training (+25 %)" in text

    def test_a_falling_held_out_loss(self):
        better = curves(regular=[1.0, 1.0, 0.54], gap=[0.4, 0.4, NAN], wiener=[1.0, 1.0, NAN])
        assert "(-10 %)" in report(training(), {"": better}, 0.5)

    def test_worse_than_the_linear_model_is_said_in_words(self):
        text = report(training(wiener=0.2), {}, 0.5)
        assert cells(text, "training, navigation")[3] == "-50 %"
        assert "not yet as good as the best linear model (gap 0.3000 against 0.2000)" in text
        assert "-50 % of the way" not in text

    def test_worse_than_predicting_nothing_is_said_in_words(self):
        text = report(training(wiener=0.2, zero=0.25), {}, 0.5)
        assert "navigation: worse than predicting 0 (gap 0.3000 against 0.2500), as a network is that runs time" in text
        assert "linear model (gap" not in text

    def test_without_training_there_are_none(self):
        """As after `validate`."""
        text = report(None, {"": held_out()}, 0.5)
        assert "training, " not in text
        assert "navigation: " not in text
        assert "refinement: " not in text

    @pytest.mark.parametrize("boundary", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("wiener", [1.0, NAN])
    def test_nothing_is_not_a_number(self, boundary, wiener):
        """A stage that is empty, and rows that are too long for a linear reference."""
        text = report(training(wiener), {"": held_out(), "_ema": held_out()}, boundary)
        assert "nan" not in text.lower()


class TestClosed:
    def test_is_one_minus_the_ratio_of_mean_gaps(self):
        assert closed(training(), 0.5) == pytest.approx(0.7)
        assert closed(training(), 0.25) == pytest.approx(0.6)

    def test_unknown_without_a_reference(self):
        assert math.isnan(closed(training(NAN), 0.5))
