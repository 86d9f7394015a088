"""Samples beside real images, and how many each class has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from fm_stages.plots.style import BLUE, RUST


def evaluation(
    samples: np.ndarray,
    reference: np.ndarray,
    classes: Mapping[str, Sequence[int] | None],
    names: Sequence[str],
    title: str = "",
) -> Figure:
    """Samples, real images, and the shares of their classes.

    Args:
        samples: (N, C, H, W) uint8; any N.
        reference: (M, C, H, W) uint8.
        classes: images of each class, by the name of the set; None of a set without labels.
        names: of the classes.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, images, name in ((left, samples, "samples"), (middle, reference, "real images (reference)")):
        axes.set_axis_off()
        axes.set_title(f"{name}, the first {len(images)}")
        if len(images):
            axes.imshow(_grid(images), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    known = {name: np.asarray(counts) for name, counts in classes.items() if counts is not None}
    width = 0.8 / max(len(known), 1)
    for number, (name, counts) in enumerate(known.items()):
        place = np.arange(len(counts)) + (number - (len(known) - 1) / 2) * width
        right.bar(place, 100 * counts / counts.sum(), width, label=name, color=(RUST, BLUE)[number % 2])
    if known:
        right.legend(fontsize=8, loc="upper right", ncols=2)
        right.set_ylim(0, 1.2 * max(100 * counts.max() / counts.sum() for counts in known.values()))
        if len(names) <= 20:
            right.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    right.set_ylabel("share of images [%]")
    right.set_xlabel("class")
    right.set_title("balance of labels" if known else "no labels are known")
    figure.suptitle(title)
    return figure


def _grid(images: np.ndarray, columns: int = 8) -> np.ndarray:
    """(rows H, columns W[, 3]) uint8, row by row, white where there is no image."""
    num, channels, height, width = images.shape
    rows = -(-num // columns)
    padded = np.full((rows * columns, channels, height + 1, width + 1), 255, np.uint8)
    padded[:num, :, :height, :width] = images
    grid = padded.reshape(rows, columns, channels, height + 1, width + 1).transpose(0, 3, 1, 4, 2)
    grid = grid.reshape(rows * (height + 1), columns * (width + 1), channels)
    return grid[..., :3] if channels >= 3 else grid[..., 0]
