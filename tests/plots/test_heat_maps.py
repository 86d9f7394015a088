"""Heat maps show the numbers that they were given: colours and axes are read back."""

import math

import numpy as np
import pytest

from fm_stages import plots

NAN = math.nan
EDGES = [0.0, 0.1, 0.4, 0.9, 1.0]
STEPS = [100, 200, 400]
GAP = [[0.5, 0.4, 0.3, 2.0], [0.4, 0.2, NAN, 1.0], [0.3, 0.1, 0.2, 0.0]]


def mesh_of(axes):
    (mesh,) = axes.collections
    return mesh


class TestGapOverSteps:
    @pytest.fixture
    def figure(self):
        return plots.gap_over_steps(STEPS, EDGES, GAP, 0.4, "raw weights")

    def test_values_and_columns(self, figure, tmp_path):
        axes, bar = figure.axes
        shown = mesh_of(axes).get_array()
        expected = np.array(GAP).T
        assert np.ma.getmaskarray(shown).tolist() == (~(expected > 0)).tolist()  # a logarithm shows no 0
        assert shown.compressed() == pytest.approx(expected[expected > 0])
        borders = mesh_of(axes).get_coordinates()
        assert borders[0, :, 0].tolist() == [0, 100, 200, 400]
        assert borders[:, 0, 1].tolist() == [0, 1, 2, 3, 4]
        assert plots.save(figure, tmp_path / "a.png").stat().st_size > 1000

    def test_axes_are_named_and_times_written_where_they_are(self, figure):
        axes, bar = figure.axes
        assert axes.get_xlabel() == "step"
        assert axes.get_ylabel().startswith("t ")
        assert bar.get_ylabel().startswith("gap")
        ticks = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks(), strict=True))
        assert ticks["0.1"] == pytest.approx(1)
        assert ticks["0.2"] == pytest.approx(1 + 1 / 3)
        assert ticks["0.9"] == pytest.approx(3)

    def test_boundary_and_stages(self, figure):
        axes = figure.axes[0]
        assert {float(line.get_ydata()[0]) for line in axes.get_lines()} == {2.0}
        assert {text.get_text(): text.get_position()[1] for text in axes.texts} == {"navigation": 1, "refinement": 3}

    @pytest.mark.parametrize(("boundary", "name"), [(0.0, "refinement"), (1.0, "navigation")])
    def test_a_stage_that_there_is_not_has_no_name(self, boundary, name, tmp_path):
        figure = plots.gap_over_steps(STEPS, EDGES, GAP, boundary)
        assert [text.get_text() for text in figure.axes[0].texts] == [name]
        assert not figure.axes[0].get_lines()

    @pytest.mark.parametrize("gap", [[[NAN] * 4], [[1.0] * 4], [[0.0] * 4]])
    def test_one_step_and_nothing_to_tell_apart(self, gap, tmp_path):
        plots.save(plots.gap_over_steps([50], EDGES, gap, 0.4), tmp_path / "a.png")


class TestRegularOverSteps:
    def test_ratio_is_held_out_over_training(self, tmp_path):
        train, held_out = np.array(GAP) + 0.1, 2 * (np.array(GAP) + 0.1)
        error = 0.1 * train
        losses = {"raw": (train, held_out, error), "EMA": (held_out, train, error)}
        figure = plots.regular_over_steps(STEPS, EDGES, losses, 0.4)
        panels = [axes for axes in figure.axes if axes.get_xlabel() == "step"]
        assert [axes.get_title() for axes in panels][2] == "held-out / training, raw weights"
        for axes, ratio in ((panels[2], 2.0), (panels[5], 0.5)):
            mesh = mesh_of(axes)
            assert mesh.get_array().compressed() == pytest.approx(ratio)
            assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((0.5, 2.0))  # white is 1
        assert mesh_of(panels[0]).norm is mesh_of(panels[4]).norm  # one scale, so that panels can be compared
        plots.save(figure, tmp_path / "a.png")

    def test_what_may_be_chance_is_white(self):
        train, held_out, error = [[1.0] * 4], [[1.1, 1.3, 0.5, NAN]], [[0.1, 0.1, 0.1, 0.1]]
        figure = plots.regular_over_steps([1], EDGES, {"raw": (train, held_out, error)}, 0.4)
        shown = mesh_of([axes for axes in figure.axes if axes.get_xlabel() == "step"][2]).get_array()
        assert shown.compressed() == pytest.approx([1.0, 1.3, 0.5])

    def test_without_a_number(self, tmp_path):
        nothing = [[NAN] * 4]
        plots.save(plots.regular_over_steps([1], EDGES, {"raw": (nothing, nothing, nothing)}, 0.4), tmp_path / "a.png")
