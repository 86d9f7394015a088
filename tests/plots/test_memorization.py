"""Figures of memorization: pictures in their places, frames around copies alone, curves with their gaps and names."""

import math

import numpy as np
from matplotlib.patches import Rectangle

from fm_stages import plots
from fm_stages.plots.memorization import COLUMNS


def pairs(ratios: list[float], shade: float, colours: tuple[int, ...] = ()) -> dict:
    num = len(ratios)
    pictures = {
        name: np.full((num, 3, 3, *colours), shade + 0.1 * i)
        + np.arange(num).reshape(-1, *[1] * (2 + len(colours))) / 100
        for i, name in enumerate(COLUMNS)
    }
    numbers = {name: [0.1 * i + row / 1000 for row in range(num)] for i, name in enumerate(COLUMNS)}
    return {
        "pictures": pictures, "distance": {**numbers, "ratio": ratios}, "index": list(range(num)), "num": 77,
        "note": "; decoded",
    }  # fmt: skip


def test_closest_pairs():
    figure = plots.closest_pairs({"samples": pairs([0.1, 0.3, 0.9], -1), "fresh": pairs([0.2, 0.8], 0)}, 1 / 3)
    (axes,) = figure.axes
    assert len(axes.images) == 4 * 3 + 4 * 2
    places = {tuple(image.get_extent()) for image in axes.images}
    assert len(places) == len(axes.images)
    first = next(image for image in axes.images if image.get_extent()[0] == 0 and image.get_extent()[3] == 0)
    np.testing.assert_allclose(first.get_array(), 0)  # of -1, black
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(frames) == 3
    left = {(frame.get_x(), frame.get_y()) for frame in frames}
    assert left <= {(extent[0], extent[3]) for extent in places}
    texts = [text.get_text() for text in axes.texts]
    for text in ("samples: closest 3 of 77", "fresh: closest 2 of 77", "ratio 0.10", "ratio 0.90", "0.102", "0.301"):
        assert text in texts
    assert any("framed: a copy, ratio < 0.33; decoded" in text for text in texts)


def test_colours_and_a_saved_file(tmp_path):
    figure = plots.closest_pairs({"samples": pairs([0.5], 0, (3,))}, 1 / 3)
    assert plots.save(figure, tmp_path / "closest.png").stat().st_size > 1000


def test_index_over_t(tmp_path):
    def of(level: float) -> dict:
        r = [math.nan, level, level + 0.1]
        stages = {"navigation": level, "navigation_sem": 0.01, "refinement": level + 0.1, "refinement_sem": 0.01}
        return {"r": r, "sem": [math.nan, 0.01, 0.02], **stages}

    curves = {
        "edges": [0.0, 0.2, 0.4, 1.0], "boundary": 0.4, "num_queries": 5, "difference": [0.1, 0.2, 0.3],
        "of": {"EMA weights": of(0.3), "memorizer": of(0.8), "Wiener": of(0.0)},
    }  # fmt: skip
    figure = plots.memorization_index(curves, ["memorizer", "Wiener"])
    upper, lower = figure.axes
    lines = {line.get_label(): line for line in upper.lines}
    np.testing.assert_allclose(lines["EMA weights:  0.30 | 0.40"].get_xdata(), [0.1, 0.3, 0.7])
    np.testing.assert_allclose(lines["EMA weights:  0.30 | 0.40"].get_ydata(), [math.nan, 0.3, 0.4])
    assert lines["EMA weights:  0.30 | 0.40"].get_linewidth() > lines["memorizer:  0.80 | 0.90"].get_linewidth()
    np.testing.assert_allclose(lower.lines[0].get_ydata(), [0.1, 0.2, 0.3])
    for axes, words in ((upper, "memorization index r"), (lower, "RMS per value")):
        assert words in axes.get_ylabel()
    assert "t " in lower.get_xlabel()
    assert {"navigation", "refinement"} <= {text.get_text() for text in upper.texts}
    assert plots.save(figure, tmp_path / "index.png").stat().st_size > 1000
