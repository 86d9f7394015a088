"""Figures of a comparison show the numbers that they were given."""

import math

import numpy as np
import pytest

from fm_stages import plots

EDGES = [0.0, 0.2, 0.5, 1.0]
CURVES = {
    "regular": {"mean": [0.4, 0.2, 0.5], "sem": [0.01, 0.15, 0.0]},
    "oracle": {"mean": [0.3, 0.1, math.nan], "sem": [0.0, math.nan, math.nan]}
    | {"relative": [-0.25, -0.5, math.nan], "relative_sem": [0.05, math.nan, math.nan]},
}
PAIR = {"mean": 0.5, "low": 0.25, "high": 0.75}
DIFFERENCES = {
    "worse": {"gap": PAIR, "mmd": {"mean": 2.0, "low": None, "high": None}},
    "better": {"gap": {"mean": -0.5, "low": -0.75, "high": -0.25}},
    "unclear": {"gap": {"mean": 0.1, "low": -0.1, "high": 0.3}},
}
NAMES = {"gap": "gap, all t", "mmd": "pixel MMD (not FID)"}


class TestGapOfArms:
    @pytest.fixture
    def axes(self):
        return plots.gap_of_arms(EDGES, CURVES, "regular", 0.3, "title").axes[0]

    def test_one_line_per_arm_at_the_middle_of_each_bin(self, axes):
        lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        for name, curve in CURVES.items():
            np.testing.assert_allclose(lines[name], np.column_stack([[0.1, 0.35, 0.75], curve["mean"]]))
        assert axes.get_yscale() == "log"
        assert [text.get_text() for text in axes.texts] == ["navigation", "refinement"]

    def test_the_band_is_two_standard_errors_and_stays_above_zero(self, axes):
        points = axes.collections[0].get_paths()[0].vertices
        spans = {t: sorted({round(float(y), 6) for x, y in points if abs(x - t) < 1e-9}) for t in (0.1, 0.35)}
        assert spans[0.1] == pytest.approx([0.38, 0.42])
        assert spans[0.35] == pytest.approx([0.02, 0.5])  # a tenth of the mean, where -0.1 has no place

    def test_below_is_the_difference_to_the_reference(self):
        axes = plots.gap_of_arms(EDGES, CURVES, "regular", 0.3).axes[1]
        assert axes.get_ylabel() == "difference to regular, %"
        (line,) = (line for line in axes.get_lines() if len(line.get_xdata()) == 3)
        np.testing.assert_allclose(line.get_xydata(), [[0.1, -25], [0.35, -50], [0.75, math.nan]])
        points = axes.collections[0].get_paths()[0].vertices
        assert sorted({round(float(y), 6) for x, y in points if abs(x - 0.1) < 1e-9}) == [-35, -15]

    def test_is_written(self, tmp_path):
        file = plots.save(plots.gap_of_arms(EDGES, CURVES, "regular", 0.3), tmp_path / "gap.png")
        assert file.read_bytes().startswith(b"\x89PNG")


class TestProgressOfArms:
    CURVES = {
        "regular": {"steps": [10, 20], "seconds": [1.0, 2.0], "gap": {"mean": [0.4, 0.2], "sem": [0.1, 0.0]}},
        "oracle": {"steps": [10, 20], "seconds": [1.5, 3.0], "gap": {"mean": [0.3, 0.1], "sem": [0.0, 0.0]}},
    }

    def test_each_arm_has_a_line_over_steps_and_one_over_time(self):
        over_steps, over_time = plots.progress_of_arms(self.CURVES, {"gap": "gap, all t"}).axes
        assert over_steps.get_title() == "gap, all t"
        for axes, place in ((over_steps, "steps"), (over_time, "seconds")):
            lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
            for arm, curve in self.CURVES.items():
                np.testing.assert_allclose(lines[arm], np.column_stack([curve[place], curve["gap"]["mean"]]))
        points = over_steps.collections[0].get_paths()[0].vertices
        assert {round(float(y), 6) for x, y in points if x == 10} == {0.2, 0.6}


class TestPairedDifferences:
    @pytest.fixture
    def figure(self):
        return plots.paired_differences(DIFFERENCES, NAMES, "title")

    def intervals(self, axes) -> dict[float, tuple[float, float]]:
        """Ends of the intervals by row."""
        lines = [line.get_xydata() for line in axes.get_lines() if len(line.get_xdata()) == 2]
        return {float(y0): (float(x0), float(x1)) for (x0, y0), (x1, y1) in lines if y0 == y1}

    def test_each_number_has_a_panel_and_each_arm_a_row_from_the_top(self, figure):
        gap, mmd = figure.axes
        assert (gap.get_title(), mmd.get_title()) == tuple(NAMES.values())
        assert [label.get_text() for label in gap.get_yticklabels()] == list(DIFFERENCES)
        assert gap.get_ylim()[0] > gap.get_ylim()[1]
        assert self.intervals(gap) == {0.0: (0.25, 0.75), 1.0: (-0.75, -0.25), 2.0: (-0.1, 0.3)}

    def test_what_is_shown_differs_in_colour_from_what_is_not(self, figure):
        colours = [line.get_color() for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
        assert len(set(colours)) == 3

    def test_one_seed_has_a_point_and_no_interval(self, figure):
        mmd = figure.axes[1]
        assert self.intervals(mmd) == {}
        (point,) = (line for line in mmd.get_lines() if line.get_marker() == "o")
        assert point.get_xydata().tolist() == [[2.0, 0.0]]

    @pytest.mark.parametrize("num", [1, 5, 8])
    def test_any_number_of_panels_is_drawn(self, num, tmp_path):
        names = {f"n{i}": f"number {i}" for i in range(num)}
        figure = plots.paired_differences({"a": {"n0": PAIR}}, names)
        assert sum(axes.get_visible() for axes in figure.axes) == num
        plots.save(figure, tmp_path / "forest.png")
