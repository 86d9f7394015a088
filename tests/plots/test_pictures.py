"""Pictures stand where they belong, with the numbers that they were given: read back from the figures."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fm_stages import plots

DRAWS, TIMES, SIDE = 2, 5, 4
T = [0.0, 0.1, 0.3, 0.6, 1.0]
BOUNDARY = 0.3
WEIGHTS = np.array([[[0.001, 0.001, 0], [0.2, 0.1, 0.1], [0.5, 0.3, 0], [0.97, 0.02, 0], [1, 0, 0]]] * DRAWS)
SHAPES = {"grey": (SIDE, SIDE), "colour": (SIDE, SIDE, 3), "not square": (3, SIDE)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def pictures(request) -> Callable[..., np.ndarray]:
    """Pictures of different values in [-1, 1], of so many draws, times, ..."""
    random = np.random.default_rng(0)
    return lambda *leading: random.uniform(-1, 1, (*leading, *request.param))


def shown(figure: Figure) -> dict[tuple[int, int], np.ndarray]:
    """Pictures by their place (row, column), counted from the upper left; values in [0, 1]."""
    (axes,) = figure.axes
    corners = [(image.get_extent()[0], image.get_extent()[3]) for image in axes.images]
    columns, rows = (sorted({round(corner[axis], 3) for corner in corners}) for axis in (0, 1))
    places = [(rows.index(round(y, 3)), columns.index(round(x, 3))) for x, y in corners]
    assert len(set(places)) == len(places)
    return {place: np.asarray(image.get_array()) for place, image in zip(places, axes.images, strict=True)}


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def frames(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if not patch.get_fill()]


def as_drawn(picture: np.ndarray) -> np.ndarray:
    return (picture + 1) / 2


class TestPosteriorStrips:
    def test_every_picture_has_its_place(self, pictures):
        x_t, mean, top = pictures(DRAWS, TIMES), pictures(DRAWS, TIMES), pictures(DRAWS, TIMES, 3)
        found = shown(plots.posterior_strips(x_t, mean, top, WEIGHTS, T, "title", BOUNDARY))
        assert len(found) == DRAWS * TIMES * 5
        for draw in range(DRAWS):
            for column in range(TIMES):
                expected = [x_t[draw, column], mean[draw, column], *top[draw, column]]
                for row, picture in enumerate(expected):
                    np.testing.assert_allclose(found[5 * draw + row, column], as_drawn(picture))

    def test_weights_and_times_are_written(self, pictures):
        top = pictures(1, TIMES, 3)
        figure = plots.posterior_strips(pictures(1, TIMES), pictures(1, TIMES), top, WEIGHTS[:1], T, "of 7 rows")
        found = words(figure)
        assert "of 7 rows" in found
        for written in ("0.00", "0.10", "0.30", "0.60", "1.00", "0.20", "0.50", "0.97", "0.02"):
            assert written in found
        assert found.count("<0.01") == 7
        assert found.count("its weight") == 3

    def test_what_outweighs_all_others_is_framed(self, pictures):
        top = pictures(DRAWS, TIMES, 3)
        figure = plots.posterior_strips(pictures(DRAWS, TIMES), pictures(DRAWS, TIMES), top, WEIGHTS, T)
        assert len(frames(figure)) == DRAWS * 3
        bold = [text.get_text() for text in figure.axes[0].texts if text.get_fontweight() == "bold"]
        assert bold == ["0.50", "0.97", "1.00"] * DRAWS

    def test_of_fewer_rows_than_asked_for_the_rest_stays_empty(self, pictures):
        top = pictures(1, TIMES, 3)
        top[:, :, 1:] = np.nan
        weights = np.zeros((1, TIMES, 3))
        weights[..., 0] = 1
        figure = plots.posterior_strips(pictures(1, TIMES), pictures(1, TIMES), top, weights, T)
        assert len(shown(figure)) == 3 * TIMES
        assert "<0.01" not in words(figure)

    @pytest.mark.parametrize("boundary", [0.0, 0.05, 0.3, 0.3 + 1e-8, 1.0])
    def test_refinement_begins_at_the_boundary(self, boundary, pictures, tmp_path):
        figure = plots.posterior_strips(
            pictures(1, TIMES), pictures(1, TIMES), pictures(1, TIMES, 3), WEIGHTS[:1], T, boundary=boundary
        )
        (axes,) = figure.axes
        early = sum(time < boundary - 1e-6 for time in T)
        areas = [patch for patch in axes.patches if patch.get_fill()]
        assert len(areas) == (early > 0) + (early < TIMES)
        left = sorted({round(image.get_extent()[0], 3) for image in axes.images})
        for area, (first, last) in zip(areas, [(0, early), (early, TIMES)][early == 0 :], strict=True):
            inside = [area.get_x() < x < area.get_x() + area.get_width() for x in left]
            assert inside == [first <= i < last for i in range(TIMES)]
        assert f"boundary: t = {boundary:.2f}" in words(figure)
        assert any(word.startswith("refinement") for word in words(figure))
        plots.save(figure, tmp_path / "figure.png")

    def test_nothing_is_cut_off(self, pictures):
        figure = plots.posterior_strips(
            pictures(DRAWS, TIMES), pictures(DRAWS, TIMES), pictures(DRAWS, TIMES, 3), WEIGHTS, T, "title", BOUNDARY
        )
        assert_inside(figure)

    def test_values_outside_the_range_are_clipped(self):
        flat = np.array([[[[-3.0, 0.0], [1.0, 5.0]]]])
        figure = plots.posterior_strips(flat, flat, flat[:, :, None], np.ones((1, 1, 1)), [0.5], value_range=(0, 2))
        assert shown(figure)[0, 0].tolist() == [[0, 0], [0.5, 1]]


class TestOraclePaths:
    def test_every_picture_has_its_place(self, pictures):
        states, mean, nearest = pictures(DRAWS, TIMES), pictures(DRAWS, TIMES), pictures(DRAWS)
        figure = plots.oracle_paths(states, mean, nearest, [0.0004, 1.2344], T, "title", BOUNDARY)
        found = shown(figure)
        assert len(found) == DRAWS * (2 * TIMES + 1)
        for draw in range(DRAWS):
            for column in range(TIMES):
                np.testing.assert_allclose(found[2 * draw, column], as_drawn(states[draw, column]))
                np.testing.assert_allclose(found[2 * draw + 1, column], as_drawn(mean[draw, column]))
            np.testing.assert_allclose(found[2 * draw, TIMES], as_drawn(nearest[draw]))
        assert_inside(figure)

    def test_the_distance_is_written_and_called_equal_only_if_it_vanishes(self, pictures):
        figure = plots.oracle_paths(
            pictures(DRAWS, TIMES), pictures(DRAWS, TIMES), pictures(DRAWS), np.array([0.0004, 1.2344]), T
        )
        assert [word for word in words(figure) if word.startswith("distance")] == ["distance 0.000", "distance 1.234"]
        assert [word for word in words(figure) if word == "="] == ["="]


class TestPredictionStrips:
    def arguments(self, pictures) -> dict:
        names = ("raw", "EMA")
        return {
            "x_t": pictures(DRAWS, TIMES),
            "mean": pictures(DRAWS, TIMES),
            "predicted": {name: pictures(DRAWS, TIMES) for name in names},
            "distance": {"raw": np.full((DRAWS, TIMES), 0.126), "EMA": np.arange(DRAWS * TIMES).reshape(DRAWS, -1)},
            "x1": pictures(DRAWS),
            "labels": ["class 3", "no label"],
        }

    def test_every_picture_has_its_place(self, pictures):
        given = self.arguments(pictures)
        figure = plots.prediction_strips(**given, t=T, title="title", boundary=BOUNDARY)
        found = shown(figure)
        assert len(found) == DRAWS * (4 * TIMES + 1)
        strips = [given["x_t"], given["mean"], given["predicted"]["raw"], given["predicted"]["EMA"]]
        for draw in range(DRAWS):
            for row, strip in enumerate(strips):
                for column in range(TIMES):
                    np.testing.assert_allclose(found[4 * draw + row, column], as_drawn(strip[draw, column]))
            np.testing.assert_allclose(found[4 * draw, TIMES], as_drawn(given["x1"][draw]))
        assert_inside(figure)

    def test_names_labels_and_distances_are_written(self, pictures):
        figure = plots.prediction_strips(**self.arguments(pictures), t=T, boundary=BOUNDARY)
        found = words(figure)
        assert found.count("0.13") == DRAWS * TIMES
        assert [word for word in found if word.endswith(".00") and word not in ("0.00", "1.00")] == [
            f"{i}.00" for i in range(2, DRAWS * TIMES)
        ]
        assert [word for word in found if word in ("class 3", "no label")] == ["class 3", "no label"]
        assert sum(word.startswith("EMA weights") for word in found) == DRAWS
        assert "boundary: t = 0.30" in found


def assert_inside(figure: Figure) -> None:
    """All that is written lies within the figure, and no two words lie on each other."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    for text, box in zip(figure.axes[0].texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for i, box in enumerate(boxes):
        overlapping = [figure.axes[0].texts[j] for j in range(i) if box.overlaps(boxes[j])]
        assert not overlapping, (figure.axes[0].texts[i], overlapping)
