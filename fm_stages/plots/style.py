"""What all figures share: a file format, and how the stages are shown."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)  # training machines have no screen; a notebook's own choice stays

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, making its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def shade_stages(axes: Axes, boundary: float) -> None:
    """Shade navigation and name both stages."""
    axes.axvspan(0, boundary, color="0.93", zorder=-2)
    axes.axvline(boundary, color="0.4", lw=0.8)
    for x, name in ((boundary / 2, "navigation"), ((1 + boundary) / 2, "refinement")):
        axes.text(
            x, 1.0, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color="0.35"
        )
