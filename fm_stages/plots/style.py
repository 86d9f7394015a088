"""What all figures share: a file format, colours, and how t and the stages are shown."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)  # training machines have no screen; a notebook's own choice stays

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

RUST, INK, BLUE, GREEN, PALE = "#c1440e", "#253237", "#3a7ca5", "#6a994e", "#9db4c0"
"""The colours of what stands in several figures: rust is the gap, and what a reader has to see."""

TIME = "t   (0 = noise, 1 = data)"
"""Label of an axis of times."""

TICKS = {
    10: (1, 2, 5),
    3: (1, 1.5, 2, 3, 5, 7),
    1: (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.5, 3, 4, 5, 6, 7, 8, 9),
}
"""Ticks in each power of ten, by the ratio of the axis's ends from which on they are few enough."""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, making its folder; returns the path.

    Where there is one already, it stays until the new one is whole: a run may be killed at any time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, dpi=110, format="png")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def plain_log_ticks(axis: Axis) -> None:
    """Write plain numbers on a logarithmic axis whose limits are set, some of them however short it is."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=next(subs for ratio, subs in TICKS.items() if high >= ratio * low)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())  # of powers of ten


def over_t(axes: Axes, boundary: float | None) -> None:
    """Make t the horizontal axis, and show the stages if the boundary is known."""
    axes.set_xlim(0, 1)
    axes.set_xlabel(TIME)
    if boundary is not None:
        shade_stages(axes, boundary)


def shade_stages(axes: Axes, boundary: float) -> None:
    """Shade navigation and name both stages."""
    axes.axvspan(0, boundary, color="0.93", zorder=-2)
    axes.axvline(boundary, color="0.4", lw=0.8)
    for x, name in ((boundary / 2, "navigation"), ((1 + boundary) / 2, "refinement")):
        axes.text(
            x, 1.0, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="0.35"
        )
