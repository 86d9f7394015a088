"""Figures of the stages show the numbers that they were given: what is on the axes is read back."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fm_stages import plots

T = [0.0, 0.1, 0.3, 0.6, 1.0]
NAMES = ("top1", "top1_median", "ess", "entropy", "own", "floor")


def curves(start: float) -> dict:
    """Different numbers for each curve."""
    values = {name: [start + i + 0.1 * t for t in T] for i, name in enumerate(NAMES)}
    return {**values, "sem": {name: [0.01 * (i + 1)] * len(T) for i, name in enumerate(NAMES)}}


def profile(labelled: bool, **fields) -> dict:
    parts = {"unconditional": curves(10), "conditional": curves(20)} if labelled else {"unconditional": None}
    guided = {"guidance": [5.0, 4.0, 3.0, 2.0, 1.0], "guidance_sem": [0.2] * 5} if labelled else {"guidance": None}
    dropout = 0.1 if labelled else 1.0
    return {**curves(1), **parts, **guided, "t": T, "boundary": 0.25, "label_dropout": dropout, **fields}


def panel(figure: Figure, title: str) -> Axes:
    (found,) = (axes for axes in figure.axes if axes.get_title().startswith(title))
    return found


def line(axes: Axes, label: str, which: int = 0) -> np.ndarray:
    """Points (K, 2) of a line with this label."""
    return [x for x in axes.get_lines() if x.get_label() == label][which].get_xydata()


def borders(axes: Axes, which: int) -> tuple[float, float]:
    """Least and largest value of a filled band at t = 0."""
    points = axes.collections[which].get_paths()[0].vertices
    at_zero = points[np.abs(points[:, 0] - T[0]) < 1e-9][:, 1]
    return at_zero.min(), at_zero.max()


def vertical_lines(axes: Axes) -> list[float]:
    return [x.get_xdata()[0] for x in axes.get_lines() if len(x.get_xdata()) == 2 and len(set(x.get_xdata())) == 1]


class TestStageCurves:
    def test_labelled_data_show_both_kinds_and_what_the_label_adds(self):
        figure = plots.stage_curves(profile(True), (0.2, 0.9), "digits")
        assert figure.get_suptitle() == "digits"
        for start, kind in ((10, "unconditional"), (20, "conditional")):
            for title, name, label in (
                ("posterior weight", "top1", f"largest weight: mean, {kind}"),
                ("effective number", "ess", kind),
                ("floor", "floor", kind),
            ):
                expected = np.stack([T, curves(start)[name]], 1)
                np.testing.assert_allclose(line(panel(figure, title), label), expected)
        top = panel(figure, "posterior weight")
        for which, start in enumerate((10, 20)):
            np.testing.assert_allclose(line(top, "median", which)[:, 1], curves(start)["top1_median"])
        last = panel(figure, "what the label adds")
        np.testing.assert_allclose(line(last, "E||u*(label) - u*||² / D")[:, 1], [5, 4, 3, 2, 1])
        (interval,) = (x for x in last.patches if "guidance interval" in str(x.get_label()))
        assert (interval.get_x(), interval.get_x() + interval.get_width()) == pytest.approx((0.2, 0.9))

    def test_bands_are_two_standard_errors(self):
        figure = plots.stage_curves(profile(True), None, "")
        floor = panel(figure, "floor")
        value, error = curves(10)["floor"][0], curves(10)["sem"]["floor"][0]
        assert borders(floor, 0) == pytest.approx((value - 2 * error, value + 2 * error))
        assert borders(panel(figure, "what the label adds"), 0) == pytest.approx((4.6, 5.4))

    def test_unlabelled_data_show_the_weight_of_the_own_row(self):
        figure = plots.stage_curves(profile(False), None, "")
        own = panel(figure, "posterior weight of the sample that x_t was made from")
        np.testing.assert_allclose(line(own, "unconditional")[:, 1], curves(1)["own"])
        assert not [axes for axes in figure.axes if axes.get_title().startswith("what the label")]

    def test_the_boundary_is_in_every_panel(self):
        for axes in plots.stage_curves(profile(True), None, "").axes:
            assert 0.25 in vertical_lines(axes)
            assert {"navigation", "refinement"} <= {text.get_text() for text in axes.texts}


class TestCompareStages:
    def test_each_on_t_and_on_log_snr_where_that_is_finite(self):
        log_snr = [-np.inf, -4.0, -2.0, 1.0, np.inf]
        data = {"a": profile(True), "b": {**profile(False, boundary=0.45), **curves(3)}}
        figure = plots.compare_stages(data, {"a": log_snr, "b": log_snr})
        top_t, top_snr, floor_t, floor_snr = figure.axes
        for name, start in (("a", 1), ("b", 3)):
            for on_t, on_snr, curve in ((top_t, top_snr, "top1"), (floor_t, floor_snr, "floor")):
                values = curves(start)[curve]
                np.testing.assert_allclose(line(on_t, name), np.stack([T, values], 1))
                np.testing.assert_allclose(line(on_snr, name), np.stack([log_snr[1:-1], values[1:-1]], 1))
        assert vertical_lines(top_t) == pytest.approx([0.25, 0.45])
        assert vertical_lines(floor_snr) == pytest.approx([-4 + 2 * 0.15 / 0.2, -2 + 3 * 0.15 / 0.3])


class TestBoundaryTrends:
    ERRORS = {"navigation_end": 0.001, "boundary": 0.002, "refinement_complete": 0.003}

    def point(self, num_rows: int, num_dims: int, boundary: float, kind: str = "rows") -> dict:
        times = {"navigation_end": boundary - 0.1, "boundary": boundary, "refinement_complete": boundary + 0.1}
        return {"kind": kind, "num_rows": num_rows, "num_dims": num_dims, **times, "time_sem": self.ERRORS}

    def test_rows_with_their_line_up_to_ten_times_all_rows(self):
        points = [self.point(n, 8, b) for n, b in ((400, 0.4), (200, 0.35), (100, 0.3))]
        rows = {"points": points, "slope": 0.07, "intercept": -0.02}
        (axes,) = plots.boundary_trends(rows, None, 1000).axes
        measured = {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}
        np.testing.assert_allclose(measured["boundary"], [[400, 0.4], [200, 0.35], [100, 0.3]])
        np.testing.assert_allclose(measured["navigation end"][:, 1], [0.3, 0.25, 0.2])
        drawn = line(axes, "line through the larger half of the banks")
        assert (drawn[0, 0], drawn[-1, 0]) == pytest.approx((100, 10_000))
        np.testing.assert_allclose(drawn[:, 1], 0.07 * np.log(drawn[:, 0]) - 0.02)
        assert 1000 in vertical_lines(axes)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["400", "200", "100", "10000"]
        assert axes.get_ylim()[1] > max(drawn[-1, 1], 0.5)

    def test_dims_by_kind(self):
        dims = [
            self.point(50, d, b, kind)
            for kind in ("unit Gaussian", "images, pooled")
            for d, b in ((16, 0.5), (64, 0.3))
        ]
        (axes,) = plots.boundary_trends(None, dims).axes
        assert [c.get_label() for c in axes.containers] == ["unit Gaussian, N = 50", "images, pooled, N = 50"]
        for container in axes.containers:
            np.testing.assert_allclose(container.lines[0].get_xydata(), [[16, 0.5], [64, 0.3]])

    def test_both_side_by_side(self):
        rows = {"points": [self.point(200, 8, 0.4), self.point(100, 8, 0.3)], "slope": 0.1, "intercept": 0.0}
        assert len(plots.boundary_trends(rows, [self.point(50, 16, 0.5, "x")]).axes) == 2
