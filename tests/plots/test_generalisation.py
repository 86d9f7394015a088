"""Lines over steps show the numbers that they were given."""

import math

import pytest

from fm_stages import plots

STEPS = [10, 20, 30]
SERIES = {
    "train": ([0.5, 0.4, 0.3], [0.01] * 3),
    "held_out": ([0.6, 0.5, 0.55], [0.02] * 3),
    "held_out_ema": ([math.nan, 0.45, 0.4], [math.nan, 0.02, 0.02]),
}


def test_a_panel_for_each_stage_with_its_lines_and_the_best_step(tmp_path):
    stages = {"navigation": SERIES, "refinement": {n: ([2 * x for x in m], e) for n, (m, e) in SERIES.items()}}
    figure = plots.regular_by_stage(STEPS, stages, {"": 1, "_ema": 2}, "title")
    assert [axes.get_title() for axes in figure.axes] == list(stages)
    for axes, factor in zip(figure.axes, (1, 2), strict=True):
        assert axes.get_xlabel() == "step"
        assert "per value" in axes.get_ylabel()
        found = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
        assert found["training images, raw weights"][:, 1] == pytest.approx([factor * x for x in SERIES["train"][0]])
        assert found["held-out images, EMA weights"][1:, 1] == pytest.approx([factor * 0.45, factor * 0.4])
    last = {line.get_label(): line.get_xydata()[0].tolist() for line in figure.axes[1].get_lines()}
    assert last["best held-out: step 20"] == [20, 1.0]
    assert last["best held-out EMA: step 30"] == [30, 0.8]
    plots.save(figure, tmp_path / "a.png")


def test_one_stage_one_series_and_no_best(tmp_path):
    nothing = {"held_out": ([math.nan] * 3, [math.nan] * 3)}
    figure = plots.regular_by_stage(STEPS, {"refinement": nothing}, {})
    assert len(figure.axes) == 1
    plots.save(figure, tmp_path / "a.png")
