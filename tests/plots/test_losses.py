"""Figures show the numbers that they were given: what is on the axes is read back."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fm_stages import plots

NAN = math.nan
EDGES = [0.0, 0.1, 0.4, 0.6, 1.0]
CENTRES = [0.05, 0.25, 0.5, 0.8]
MEAN = {
    "regular": [1.0, 0.9, 0.5, 0.4],
    "gap": [0.4, 0.5, 0.3, 0.4],
    "floor": [0.6, 0.4, 0.2, 0.0],
    "zero": [1.2, 1.3, 1.4, 1.5],
    "wiener": [0.5, 0.6, 0.7, 0.8],
}
SEM = {name: [0.01, 0.02, 0.03, 0.04] for name in MEAN}
HELD_OUT = {"regular": [1.1, 1.0, 0.8, 2.0], "gap": [0.45, 0.55, NAN, NAN]}


def line(axes: Axes, label: str) -> np.ndarray:
    """Points (K, 2) of the line with this beginning of a label."""
    (found,) = (x for x in axes.get_lines() if x.get_label().startswith(label))
    return found.get_xydata()


def band(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper border of a filled band at the centres."""
    (found,) = (x for x in axes.collections if str(x.get_label()).startswith(label))
    points = found.get_paths()[0].vertices
    borders = [sorted({round(float(y), 6) for x, y in points if abs(x - t) < 1e-9}) for t in CENTRES]
    return np.array([b[0] for b in borders]), np.array([b[-1] for b in borders])


@pytest.fixture
def figure() -> Figure:
    return plots.gap_by_t(EDGES, MEAN, SEM, 0.4, HELD_OUT, "step 7")


class TestGapByT:
    def test_parts_are_stacked_to_the_regular_loss(self, figure):
        left = figure.axes[0]
        lower, upper = band(left, "floor")
        assert lower == pytest.approx([0] * 4)
        assert upper == pytest.approx(MEAN["floor"])
        lower, upper = band(left, "gap")
        assert lower == pytest.approx(MEAN["floor"])
        assert upper == pytest.approx([1.0, 0.9, 0.5, 0.4])
        assert line(left, "regular loss (training)")[:, 1] == pytest.approx(MEAN["regular"])
        assert line(left, "regular loss (held-out)")[:, 1] == pytest.approx(HELD_OUT["regular"])
        assert left.get_ylim()[1] > 2.0  # nothing is cut off

    def test_gap_beside_its_references(self, figure):
        right = figure.axes[1]
        assert line(right, "a network that predicts 0")[:, 1] == pytest.approx(MEAN["zero"])
        assert line(right, "the best linear model")[:, 1] == pytest.approx(MEAN["wiener"])
        (bars,) = right.containers
        assert bars.get_label() == "this model"
        assert bars[0].get_xydata() == pytest.approx(np.column_stack([CENTRES, MEAN["gap"]]))
        tops = [segment[1][1] for segment in bars[2][0].get_segments()]
        assert tops == pytest.approx([g + e for g, e in zip(MEAN["gap"], SEM["gap"], strict=True)])
        assert right.get_yscale() == "log"

    def test_a_held_out_gap_ends_at_the_boundary(self, figure):
        right = figure.axes[1]
        assert line(right, "this model, held-out").tolist() == [[0.05, 0.45], [0.25, 0.55]]
        assert line(right, "held-out regular loss")[:, 1] == pytest.approx(HELD_OUT["regular"])

    def test_stages_are_named_on_both_sides_of_the_boundary(self, figure):
        for axes in figure.axes:
            words = {text.get_text(): text.get_position()[0] for text in axes.texts}
            assert words == pytest.approx({"navigation": 0.2, "refinement": 0.7})
            assert axes.get_xlim() == (0, 1)
            assert "0 = noise, 1 = data" in axes.get_xlabel()
        assert figure.get_suptitle() == "step 7"

    def test_without_held_out_images(self):
        figure = plots.gap_by_t(EDGES, MEAN, SEM, 0.4)
        labels = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
        assert not [label for label in labels if "held-out" in label]
        assert len(labels) == 6

    @pytest.mark.parametrize(
        "held_out",
        [None, HELD_OUT, {"regular": [NAN, 1.0, NAN, 2.0], "gap": [NAN] * 4}, {"regular": [NAN] * 4, "gap": [NAN] * 4}],
    )
    @pytest.mark.parametrize("boundary", [0.0, 1.0])
    def test_empty_bins_are_drawn(self, held_out, boundary, tmp_path):
        mean = {name: [NAN, *values[1:]] for name, values in MEAN.items()}
        mean["wiener"] = [NAN] * 4  # rows too long for a linear reference
        sem = {name: [NAN, NAN, *values[2:]] for name, values in SEM.items()}
        figure = plots.gap_by_t(EDGES, mean, sem, boundary, held_out)
        assert np.isfinite(figure.axes[0].get_ylim()).all()
        plots.save(figure, tmp_path / "figure.png")

    def test_numbers_are_not_changed(self, figure):
        assert MEAN["regular"] == [1.0, 0.9, 0.5, 0.4]
        assert HELD_OUT["gap"][:2] == [0.45, 0.55]


class TestSave:
    def test_makes_the_folder_and_replaces_the_file(self, figure, tmp_path):
        path = tmp_path / "a" / "b" / "figure.png"
        assert plots.save(figure, path) == path
        first = path.read_bytes()
        assert first.startswith(b"\x89PNG")
        plots.save(plots.gap_by_t(EDGES, MEAN, SEM, 0.8), path)
        assert path.read_bytes() != first
        assert [Path(file).name for file in path.parent.iterdir()] == ["figure.png"]

    def test_needs_no_screen_and_keeps_no_figure_open(self, figure):
        import matplotlib.pyplot as plt

        assert matplotlib.get_backend().lower() == "agg"
        assert plt.get_fignums() == []
