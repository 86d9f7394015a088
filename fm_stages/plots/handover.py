"""Images of the oracle and a model that take turns, by the time of the hand-over, beside their nearest training images.

Shapes: T times, K noises; a picture is (H, W) grey or (H, W, 3) red, green, blue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fm_stages.plots.style import RUST

CELL = 0.5
"""Side of a picture's place, in inches; everything else is in units of it."""

PAIR, PANEL, NUMBERS, LEFT, ABOVE, BELOW = 2.25, 1.9, 5.6, 1.6, 2.4, 1.3
"""Width of a sample and its neighbour; between the halves; room for numbers, names, titles, the yardstick."""

COLUMNS = {"distance": 0.7, "ratio": 2.1, "memorized": 3.5, "as oracle": 5.0}
"""Numbers right of the pictures, and where."""

FRAME = RUST
TITLES = ("oracle until τ, then the model", "model until τ, then the oracle")


def handover(
    images: np.ndarray,
    nearest: np.ndarray,
    memorized: np.ndarray,
    taus: Sequence[float],
    closeness: Sequence[Mapping[str, Any]],
    title: str = "",
    value_range: tuple[float, float] = (-1, 1),
) -> Figure:
    """A row for each tau, a column for each noise: the sample and, right of it, the training image nearest to it.

    Args:
        images: (2, T, K, H, W[, 3]) samples: of the oracle first, and of the model first.
        nearest: (2, T, K, H, W[, 3]) training images.
        memorized: (2, T, K) bool, whether a sample counts as memorized; the pair is then framed.
        taus: (T,) times of the hand-over.
        closeness: 2 T mappings with distance, ratio, memorized and as_oracle, in that order; last, of held-out images.
        title: of the figure.
        value_range: what is drawn black and white.

    Returns:
        The figure; `save` writes it.
    """
    num_taus, num = images.shape[1:3]
    panel = num * PAIR + NUMBERS
    width, height = LEFT + 2 * panel + PANEL + 0.3, ABOVE + num_taus * 1.1 + BELOW
    figure = Figure(figsize=(CELL * width, CELL * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-LEFT, width - LEFT)
    axes.set_ylim(num_taus * 1.1 + BELOW, -ABOVE)
    axes.set_axis_off()
    axes.text(width / 2 - LEFT, 0.6 - ABOVE, title, ha="center", va="center", fontsize=10.5)
    for half in range(2):
        left = half * (panel + PANEL)
        axes.text(left + num * PAIR / 2, -1.0, TITLES[half], ha="center", va="center", fontsize=11, fontweight="bold")
        _columns(axes, left, num)
        for row, tau in enumerate(taus):
            y = row * 1.1
            _name(axes, left, y, tau, half)
            for column in range(num):
                pair = images[half, row, column], nearest[half, row, column]
                _pair(axes, pair, left + column * PAIR, y, bool(memorized[half, row, column]), value_range)
            _numbers(axes, left + num * PAIR, y, closeness[half * num_taus + row])
    _yardstick(axes, num_taus * 1.1 + 0.6, closeness[-1])
    return figure


def _columns(axes: Axes, left: float, num: int) -> None:
    """What stands over the columns."""
    for column in range(num):
        for x, name in ((0.5, "sample"), (1.5, "nearest")):
            axes.text(left + column * PAIR + x, -0.12, name, ha="center", va="bottom", fontsize=6.5, color="0.35")
    for name, x in COLUMNS.items():
        axes.text(left + num * PAIR + x, -0.12, name, ha="center", va="bottom", fontsize=7.5, color="0.35")


def _name(axes: Axes, left: float, y: float, tau: float, half: int) -> None:
    """tau, left of its row, or who draws alone."""
    alone = {0.0: ("model\nalone", "oracle\nalone"), 1.0: ("oracle\nalone", "model\nalone")}
    text = alone[tau][half] if tau in alone else f"τ = {tau:.2f}"
    axes.text(left - 0.15, y + 0.5, text, ha="right", va="center", fontsize=8)


def _pair(
    axes: Axes,
    pair: tuple[np.ndarray, np.ndarray],
    x: float,
    y: float,
    is_copy: bool,
    value_range: tuple[float, float],
) -> None:
    """A sample, its neighbour right of it, and a frame around both if they are one image."""
    low, high = value_range
    for place, picture in enumerate(pair):
        shown = np.clip((picture - low) / (high - low), 0, 1)
        extent = (x + place + 0.02, x + place + 0.98, y + 0.98, y + 0.02)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    if is_copy:
        axes.add_patch(Rectangle((x, y), 2, 1, fill=False, edgecolor=FRAME, lw=1.8, zorder=3))


def _numbers(axes: Axes, x: float, y: float, of_row: Mapping[str, Any]) -> None:
    values = (of_row["distance"], of_row["ratio"], of_row["memorized"], of_row["as_oracle"])
    written = (f"{value:{form}}" for value, form in zip(values, (".3f", ".2f", ".0%", ".0%"), strict=True))
    for place, value in zip(COLUMNS.values(), written, strict=True):
        axes.text(x + place, y + 0.5, value, ha="center", va="center", fontsize=8.5)


def _yardstick(axes: Axes, y: float, held_out: Mapping[str, Any]) -> None:
    """The same numbers of images that no one trained on, and what the numbers are."""
    axes.text(
        -LEFT + 0.3, y,
        f"Held-out images, for comparison: distance {held_out['distance']:.3f}, ratio {held_out['ratio']:.2f}, "
        f"memorized {held_out['memorized']:.0%}.   Distance: to the nearest training image, root mean square over the "
        "values, mean of all samples.\nRatio: of the distances to the nearest and the second nearest training image; "
        "where it is small enough the sample counts as memorized, and is framed.   As oracle: share of samples whose "
        "nearest training image is the one on which the oracle alone ends, from the same noise.",
        ha="left", va="center", fontsize=8, linespacing=1.6,
    )  # fmt: skip
