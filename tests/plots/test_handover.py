"""The hand-over figure: every picture in its place, a frame around copies alone, and the numbers of the table."""

import numpy as np
from matplotlib.patches import Rectangle

from fm_stages import plots

TAUS = [0.0, 0.25, 1.0]


def closeness() -> list[dict]:
    rows = [{"distance": i / 100, "ratio": i / 7, "memorized": i / 20, "as_oracle": i / 50} for i in range(7)]
    return [*rows[:-1], {**rows[-1], "as_oracle": None}]


def test_pictures_frames_and_numbers():
    images = np.linspace(-1, 1, 2 * 3 * 2 * 4).reshape(2, 3, 2, 2, 2)
    nearest = -images
    memorized = np.isin(np.arange(12), (1, 3, 6)).reshape(2, 3, 2)
    figure = plots.handover(images, nearest, memorized, TAUS, closeness(), "title")
    (axes,) = figure.axes
    assert len(axes.images) == 2 * images[..., 0, 0].size
    shown = np.stack([np.asarray(image.get_array()) for image in axes.images])
    both = np.stack([images, nearest], 3).reshape(-1, 2, 2)
    np.testing.assert_allclose(shown, (both + 1) / 2, atol=1e-12)
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(frames) == 3
    left = {(round(frame.get_x(), 2), round(frame.get_y(), 2)) for frame in frames}
    corners = {
        (round(image.get_extent()[0] - 0.02, 2), round(image.get_extent()[3] - 0.02, 2)) for image in axes.images
    }
    assert left <= corners  # a frame begins where a sample does
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("model\nalone") == texts.count("oracle\nalone") == 2
    assert texts.count("τ = 0.25") == 2
    for i in range(6):
        assert f"{i / 100:.3f}" in texts
    assert any("distance 0.060, ratio 0.86, memorized 30%" in text for text in texts)


def test_colours_and_a_saved_file(tmp_path):
    images = np.zeros((2, 3, 1, 4, 4, 3))
    figure = plots.handover(images, images, np.ones((2, 3, 1), dtype=bool), TAUS, closeness())
    assert plots.save(figure, tmp_path / "a/handover.png").stat().st_size > 1000
