"""What oracle and networks see, in pictures: the posterior and predictions over t, and where the oracle's ODE leads.

Shapes: K draws, T times; a picture is (H, W) grey or (H, W, 3) red, green, blue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fm_stages.plots.style import RUST

CELL = 0.72
"""Side of a picture's place, in inches; everything else is in units of it."""

GAP, STEP, BLOCK = 0.06, 0.3, 0.5
"""Between pictures; in height for a number under one, and in width at the boundary; between draws."""

UNDER = 1 + STEP / 2 - GAP / 2
"""Middle of a number under a picture, from the picture's upper edge."""

MARGIN, NAMES, HEADER = 2.7, -0.3, 1.3
"""Left of the pictures, for the names of rows, which end at NAMES; above them, for the stages and times."""

SMALLEST = 0.005
"""Weights below are written as less than 0.01."""

HALF = 0.5
"""Weight from which on one image outweighs all others together: it gets a frame."""

NAVIGATION, REFINEMENT, FRAME = "0.92", "#fdf1e7", RUST


def posterior_strips(
    x_t: np.ndarray,
    mean: np.ndarray,
    top: np.ndarray,
    weights: np.ndarray,
    t: Sequence[float],
    title: str = "",
    boundary: float | None = None,
    value_range: tuple[float, float] = (-1, 1),
) -> Figure:
    """For each draw the noisy image by t, and below it what the oracle takes it for.

    Args:
        x_t: (K, T, H, W[, 3]) noisy images, a column for each time.
        mean: (K, T, H, W[, 3]) posterior means.
        top: (K, T, n, H, W[, 3]) the training images with the largest weights; NaN where there is none.
        weights: (K, T, n) these weights, written under the images.
        t: (T,) times, increasing.
        title: of the figure.
        boundary: between the stages; None: they are not shown.
        value_range: what is drawn black and white (of colours: none and full).

    Returns:
        The figure; `save` writes it.
    """
    x_t, mean, top, weights = (np.asarray(x, dtype=float) for x in (x_t, mean, top, weights))
    num = top.shape[2]
    names = ["noisy image  $x_t$", "posterior mean  $m(x_t)$", *_ranks(num)]
    columns = _columns(t, boundary)
    block = 2 + (1 + STEP) * num
    axes = _canvas(columns[-1] + 1, len(x_t) * (block + BLOCK) - BLOCK, title)
    _header(axes, columns, t, boundary)
    for draw in range(len(x_t)):
        y = draw * (block + BLOCK)
        heights = [y, y + 1, *(y + 2 + (1 + STEP) * rank for rank in range(num))]
        for name, height in zip(names, heights, strict=True):
            _name(axes, name, height + 0.5)
        for height in heights[2:]:
            _name(axes, "its weight", height + UNDER, color="0.45")
        for column, x in enumerate(columns):
            own = [x_t[draw, column], mean[draw, column], *top[draw, column]]
            for picture, height in zip(own, heights, strict=True):
                _picture(axes, picture, x, height, value_range)
            for rank, weight in enumerate(weights[draw, column]):
                if np.isfinite(top[draw, column, rank]).all():
                    _weight(axes, weight, x, heights[2 + rank])
    return axes.get_figure(root=True)  # type: ignore[return-value]


def oracle_paths(
    states: np.ndarray,
    mean: np.ndarray,
    nearest: np.ndarray,
    distance: Sequence[float] | np.ndarray,
    t: Sequence[float],
    title: str = "",
    boundary: float | None = None,
    value_range: tuple[float, float] = (-1, 1),
) -> Figure:
    """For each draw the states of the oracle's ODE by t, posterior means, and the training image nearest to the end.

    Args:
        states: (K, T, H, W[, 3]) of the ODE; the last one is where it ends.
        mean: (K, T, H, W[, 3]) posterior means: the one-step predictions of the data.
        nearest: (K, H, W[, 3]) the training image nearest to the last state.
        distance: (K,) between the two, written under it.
        t: (T,) times, increasing.
        title: of the figure.
        boundary: between the stages; None: they are not shown.
        value_range: what is drawn black and white (of colours: none and full).

    Returns:
        The figure; `save` writes it.
    """
    states, mean, nearest = (np.asarray(x, dtype=float) for x in (states, mean, nearest))
    columns = _columns(t, boundary)
    beside = columns[-1] + 1 + 2 * STEP
    axes = _canvas(beside + 1.15, len(states) * (2 + BLOCK) - BLOCK, title)
    _header(axes, columns, t, boundary)
    axes.text(beside + 0.5, -0.08, "nearest\ntraining image", ha="center", va="bottom", fontsize=8.5)
    for draw in range(len(states)):
        y = draw * (2 + BLOCK)
        _name(axes, "state  $x_t$", y + 0.5)
        _name(axes, "posterior mean  $m(x_t)$:\none-step prediction", y + 1.5)
        for column, x in enumerate(columns):
            _picture(axes, states[draw, column], x, y, value_range)
            _picture(axes, mean[draw, column], x, y + 1, value_range)
        written = f"{distance[draw]:.3f}"
        if float(written) == 0:
            axes.text(beside - STEP, y + 0.5, "=", ha="center", va="center", fontsize=14)
        _picture(axes, nearest[draw], beside, y, value_range)
        axes.text(beside + 0.5, y + 1.04, f"distance {written}", ha="center", va="top", fontsize=8.5)
    return axes.get_figure(root=True)  # type: ignore[return-value]


def prediction_strips(
    x_t: np.ndarray,
    mean: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    distance: Mapping[str, np.ndarray],
    x1: np.ndarray,
    labels: Sequence[str],
    t: Sequence[float],
    title: str = "",
    boundary: float | None = None,
    value_range: tuple[float, float] = (-1, 1),
) -> Figure:
    """For each draw the noisy image by t, and below it what the oracle and networks take it for in one step.

    Args:
        x_t: (K, T, H, W[, 3]) noisy images, a column for each time.
        mean: (K, T, H, W[, 3]) posterior means: the oracle's predictions of the data.
        predicted: (K, T, H, W[, 3]) predictions of each network, by its name.
        distance: (K, T) of these to the oracle's, by the same names, written under the pictures.
        x1: (K, H, W[, 3]) the training images that the noise was added to.
        labels: (K,) written under these.
        t: (T,) times, increasing.
        title: of the figure.
        boundary: between the stages; None: they are not shown.
        value_range: what is drawn black and white (of colours: none and full).

    Returns:
        The figure; `save` writes it.
    """
    columns = _columns(t, boundary)
    beside = columns[-1] + 1 + STEP
    block = 2 + (1 + STEP) * len(predicted)
    axes = _canvas(beside + 1.15, len(x_t) * (block + BLOCK) - BLOCK, title)
    _header(axes, columns, t, boundary)
    axes.text(beside + 0.5, -0.08, "training\nimage  $x_1$", ha="center", va="bottom", fontsize=8.5)
    for draw in range(len(x_t)):
        y = draw * (block + BLOCK)
        _name(axes, "noisy image  $x_t$", y + 0.5)
        _name(axes, "oracle:\nposterior mean  $m(x_t)$", y + 1.5)
        _picture(axes, x1[draw], beside, y, value_range)
        axes.text(beside + 0.5, y + 1.04, labels[draw], ha="center", va="top", fontsize=8.5)
        for column, x in enumerate(columns):
            _picture(axes, x_t[draw, column], x, y, value_range)
            _picture(axes, mean[draw, column], x, y + 1, value_range)
        for row, name in enumerate(predicted):
            height = y + 2 + (1 + STEP) * row
            _name(axes, f"{name} weights:\none-step prediction", height + 0.5)
            _name(axes, "distance to the oracle's", height + UNDER, color="0.45")
            for column, x in enumerate(columns):
                _picture(axes, predicted[name][draw, column], x, height, value_range)
                far = f"{distance[name][draw, column]:.2f}"
                axes.text(x + 0.5, height + UNDER, far, ha="center", va="center", fontsize=8, color="0.3")
    return axes.get_figure(root=True)  # type: ignore[return-value]


def _ranks(num: int) -> list[str]:
    """What the training images are called, by their weight."""
    known = ["training image with\nthe largest weight", "second largest", "third largest"]
    return [*known, *(f"{rank}th largest" for rank in range(4, num + 1))][:num]


def _columns(t: Sequence[float], boundary: float | None) -> list[float]:
    """The left edge of each time's column; where refinement begins after others, a step apart."""
    early = 0 if boundary is None else sum(not _refines(time, boundary) for time in t)
    return [i + (STEP if i >= early > 0 else 0) for i in range(len(t))]


def _refines(time: float, boundary: float) -> bool:
    return time >= boundary - 1e-6  # times may have been rounded to float32


def _canvas(width: float, height: float, title: str) -> Axes:
    """Axes in units of a picture's place, y downwards, that have room for so many to the right and below of (0, 0)."""
    left, right, above, below = MARGIN, 0.25, HEADER + 0.6, 0.25
    across, down = left + width + right, above + height + below
    figure = Figure(figsize=(CELL * across, CELL * down))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-left, width + right)
    axes.set_ylim(height + below, -above)
    axes.set_axis_off()
    axes.text(across / 2 - left, 0.3 - above, title, ha="center", va="center", fontsize=10.5)
    return axes


def _name(axes: Axes, name: str, y: float, color: str = "black") -> None:
    """What a row shows, left of it."""
    axes.text(NAMES, y, name, ha="right", va="center", fontsize=8.5, color=color)


def _header(axes: Axes, columns: list[float], t: Sequence[float], boundary: float | None) -> None:
    """Times over the columns; behind and over these the two stages."""
    for x, time in zip(columns, t, strict=True):
        axes.text(x + 0.5, -0.08, f"{time:.2f}", ha="center", va="bottom", fontsize=8.5)
    axes.text(NAMES, -0.08, "t  (0 = noise, 1 = data)", ha="right", va="bottom", fontsize=8.5)
    if boundary is None:
        return
    bottom, edge = axes.get_ylim()[0], STEP / 2
    for refines, colour, name, meaning in (
        (False, NAVIGATION, "navigation", "many images mixed"),
        (True, REFINEMENT, "refinement", "one image"),
    ):
        own = [x for x, time in zip(columns, t, strict=True) if _refines(time, boundary) == refines]
        if not own:
            continue
        left, width = own[0] - edge, own[-1] + 1 - own[0] + 2 * edge
        axes.add_patch(Rectangle((left, -HEADER), width, bottom + HEADER, facecolor=colour, lw=0, zorder=-2))
        between = ": " if len(own) > 3 else ":\n"
        axes.text(left + width / 2, -0.6, f"{name}{between}{meaning}", ha="center", va="center", fontsize=9.5)
        if refines:
            axes.text(left, -HEADER + 0.2, f"boundary: t = {boundary:.2f}", ha="center", va="center", fontsize=8,
                      color=FRAME)  # fmt: skip
            axes.plot([left, left], [-HEADER + 0.35, bottom], color=FRAME, lw=1)


def _picture(axes: Axes, picture: np.ndarray, x: float, y: float, value_range: tuple[float, float]) -> None:
    """A picture in the place whose upper left corner is (x, y)."""
    if not np.isfinite(picture).all():
        return
    low, high = value_range
    shown = np.clip((picture - low) / (high - low), 0, 1)
    sides = np.array(picture.shape[:2])
    down, across = (1 - GAP) / 2 * sides / sides.max()  # half the height and width
    place = (x + 0.5 - across, x + 0.5 + across, y + 0.5 + down, y + 0.5 - down)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=place, interpolation="nearest", aspect="auto")


def _weight(axes: Axes, weight: float, x: float, y: float) -> None:
    """A weight under the picture in the place at (x, y), which is framed if it outweighs all others."""
    wins = weight >= HALF
    text = "<0.01" if weight < SMALLEST else f"{weight:.2f}"
    axes.text(
        x + 0.5, y + UNDER, text, ha="center", va="center", fontsize=8,
        color=FRAME if wins else "0.3", fontweight="bold" if wins else "normal",
    )  # fmt: skip
    if wins:
        axes.add_patch(
            Rectangle((x + GAP / 2, y + GAP / 2), 1 - GAP, 1 - GAP, fill=False, edgecolor=FRAME, lw=2, zorder=3)
        )
