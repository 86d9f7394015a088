"""The figure shows the variances that it was given, and their ratio: read back from the axes."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from fm_stages import plots

EDGES = [0.0, 0.1, 0.4, 0.6, 1.0]
CENTRES = [0.05, 0.25, 0.5, 0.8]
REGULAR, ORACLE, MEAN = [8.0, 6.0, 4.0, 2.0], [2.0, 2.0, 4.0, 2.0], [1.0, -0.5, 0.5, 0.25]


def line(axes: Axes, label: str) -> list:
    """Points (K, 2) of the line with this beginning of a label."""
    (found,) = (x for x in axes.get_lines() if x.get_label().startswith(label))
    return found.get_xydata().tolist()


def points(values: list[float]) -> list:
    return [pytest.approx([t, v]) for t, v in zip(CENTRES, values, strict=True) if v > 0]


def test_variances_and_their_ratio():
    figure = plots.gradient_variance(EDGES, REGULAR, ORACLE, 0.4, MEAN, "step 7")
    left, right = figure.axes
    assert line(left, "conditional target") == points(REGULAR)
    assert line(left, "oracle target") == points(ORACLE)
    assert line(left, "squared norm of the mean") == points(MEAN)  # an estimate below 0 has no place
    assert line(right, "regular / oracle") == points([4.0, 3.0, 1.0, 1.0])
    assert {y for _, y in line(right, "equal")} == {1}
    for axes in figure.axes:
        assert axes.get_yscale() == "log"
        words = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert words == pytest.approx({"navigation": 0.2, "refinement": 0.7})
    assert figure.get_suptitle() == "step 7"


@pytest.mark.parametrize("oracle", [[0.0] * 4, [math.nan] * 4, [1.0, 0.0, math.nan, 1.0]])
def test_what_is_missing_is_left_out(oracle, tmp_path):
    figure = plots.gradient_variance(EDGES, REGULAR, oracle, 0.4)
    shown = line(figure.axes[1], "regular / oracle")
    assert np.isfinite(shown).all()
    assert len(shown) == sum(v > 0 for v in oracle)
    plots.save(figure, tmp_path / "figure.png")


def test_a_ratio_near_one_has_numbers_on_its_axis(tmp_path):
    figure = plots.gradient_variance(EDGES, [1.3, 1.2, 1.05, 1.0], [1.0] * 4, 0.4)
    plots.save(figure, tmp_path / "figure.png")  # which makes the ticks
    right = figure.axes[1]
    low, high = right.get_ylim()
    written = [text.get_text() for text in right.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert {"1", "1.1", "1.2"} <= set(written)
