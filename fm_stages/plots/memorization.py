"""What is closest to samples among training and held-out images, and the memorization index over t.

Shapes: P images; a picture is (H, W) grey or (H, W, 3) red, green, blue.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fm_stages.plots.style import GREEN, INK, RUST, TIME, shade_stages

COLUMNS = {"image": "", "nearest": "nearest\ntraining", "second": "second\ntraining", "held_out": "nearest\nheld-out"}

CELL, WIDE, HIGH, BETWEEN = 0.85, 1.12, 1.32, 1.0
"""Side of a picture in inches; in units of it a place's width and height, and the space between two kinds of images."""

FRAME = RUST

REFERENCE_STYLES = ((RUST, "-"), (RUST, ":"), (GREEN, "-"))


def closest_pairs(kinds: Mapping[str, Mapping[str, Any]], threshold: float) -> Figure:
    """For each kind of images those closest to training images, with what is nearest to each, side by side.

    Args:
        kinds: by name: ``pictures``, a mapping of image, nearest, second, held_out to (P, H, W[, 3]) in [-1, 1];
            ``distance``, of nearest, second, held_out and ratio to (P,) numbers; ``index`` (P,) numbers of the images;
            ``num`` of how many these are the closest; ``note`` on how they are shown.
        threshold: ratio below which an image is a copy: it gets a frame.

    Returns:
        The figure; `save` writes it.
    """
    rows = max(len(kind["index"]) for kind in kinds.values())
    block = len(COLUMNS) * WIDE
    width, height = len(kinds) * (block + BETWEEN) - BETWEEN + 0.4, rows * HIGH + 1.7
    figure = Figure(figsize=(CELL * width, CELL * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.2, width - 0.2)
    axes.set_ylim(rows * HIGH + 0.45, -1.25)
    axes.set_axis_off()
    for place, (name, kind) in enumerate(kinds.items()):
        _block(axes, place * (block + BETWEEN), name, kind, threshold)
    note = next(iter(kinds.values()))["note"]
    about = "each training image once; under pictures their distance to the image (RMS per value); "
    about += f"framed: a copy, ratio < {threshold:.2f}"
    axes.text(width / 2 - 0.2, rows * HIGH + 0.25, about + note, ha="center", va="center", fontsize=7.5, color="0.35")
    return figure


def _block(axes: Axes, left: float, name: str, kind: Mapping[str, Any], threshold: float) -> None:
    """The pairs of one kind of images."""
    middle = left + len(COLUMNS) * WIDE / 2
    title = f"{name}: closest {len(kind['index'])} of {kind['num']}"
    axes.text(middle, -0.95, title, ha="center", va="center", fontsize=10, fontweight="bold")
    for column, (what, head) in enumerate(COLUMNS.items()):
        x = left + column * WIDE
        axes.text(x + 0.5, -0.1, head or "image", ha="center", va="bottom", fontsize=8)
        for row, picture in enumerate(kind["pictures"][what]):
            y, ratio = row * HIGH, kind["distance"]["ratio"][row]
            shown = np.clip((np.asarray(picture, dtype=float) + 1) / 2, 0, 1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(x, x + 1, y + 1, y), interpolation="nearest",
                        aspect="auto")  # fmt: skip
            copied = ratio < threshold
            if what == "image":
                text, colour = f"ratio {ratio:.2f}", FRAME if copied else "0.2"
            else:
                text, colour = f"{kind['distance'][what][row]:.3f}", "0.35"
            weight = "bold" if what == "image" and copied else "normal"
            axes.text(x + 0.5, y + 1.03, text, ha="center", va="top", fontsize=7.5, color=colour, fontweight=weight)
            if copied and what == "nearest":
                axes.add_patch(Rectangle((x - WIDE, y), 1 + WIDE, 1, fill=False, edgecolor=FRAME, lw=2, zorder=3))


def memorization_index(curves: Mapping[str, Any], references: Collection[str]) -> Figure:
    """r over t of networks and references; below it how far the two banks' predictions are apart.

    Args:
        curves: plain data of `fm_stages.studies.memorization.index.IndexCurves`.
        references: which of its names are references, in the order of `REFERENCE_STYLES`; the others are networks.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(8, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    edges = np.asarray(curves["edges"])
    t = (edges[1:] + edges[:-1]) / 2
    styles = iter(REFERENCE_STYLES)
    networks = iter(range(len(curves["of"])))
    for name, own in curves["of"].items():
        is_reference = name in references
        colour, line = next(styles) if is_reference else (f"C{next(networks)}", "-")
        r, sem = (np.array([math.nan if x is None else x for x in own[key]], dtype=float) for key in ("r", "sem"))
        stages = f"{name}:  {own['navigation']:.2f} | {own['refinement']:.2f}"
        upper.plot(t, r, color=colour, ls=line, lw=1.2 if is_reference else 2, marker=".", label=stages)
        upper.fill_between(t, r - 2 * sem, r + 2 * sem, color=colour, alpha=0.15, lw=0)
    upper.axhline(0, color="0.6", lw=0.8, zorder=-1)
    shown = [x for own in curves["of"].values() for x in own["r"] if x is not None and math.isfinite(x)]
    upper.set_ylim(max(-0.5, min([0.0, *shown]) - 0.1), 1.1)
    upper.set_ylabel("memorization index r\n(0: knows nothing, 1: oracle of T)")
    title = "navigation | refinement, each as one number"
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, title=title, title_fontsize=8)
    lower.plot(t, curves["difference"], color=INK, marker=".")
    lower.set_ylabel("T and H differ by\n(RMS per value)")
    lower.set_ylim(0, 1.15 * max(curves["difference"]))
    lower.set_xlabel(TIME)
    lower.set_xlim(0, 1)
    lower.axvspan(0, curves["boundary"], color="0.93", zorder=-2)
    shade_stages(upper, curves["boundary"])
    upper.set_title("does the velocity follow the training images?  (band: two standard errors)", pad=16, fontsize=10)
    return figure
