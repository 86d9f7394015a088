"""How much a sample's gradient scatters with either target, by t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fm_stages.plots.style import INK, PALE, RUST, over_t, plain_log_ticks

COLOURS = {"regular": INK, "oracle": RUST, "mean": PALE}


def gradient_variance(
    edges: Sequence[float],
    regular: Sequence[float],
    oracle: Sequence[float],
    boundary: float,
    mean_square: Sequence[float] | None = None,
    title: str = "",
) -> Figure:
    """Left: variance of a sample's gradient by t, with either target. Right: their ratio.

    Args:
        edges: (K + 1) bin edges.
        regular: (K) variance with the conditional target.
        oracle: (K) variance with the oracle target.
        boundary: between the stages.
        mean_square: (K) squared norm of the mean gradient; drawn where the estimate is positive.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    border = np.asarray(edges, dtype=float)
    t = (border[1:] + border[:-1]) / 2
    _line(left, t, regular, color=COLOURS["regular"], lw=3, label="conditional target (regular loss)")
    _line(left, t, oracle, color=COLOURS["oracle"], label="oracle target")
    if mean_square is not None:
        _line(left, t, mean_square, color=COLOURS["mean"], ls="--", label="squared norm of the mean gradient")
    left.set_title("variance of one sample's gradient", pad=16)
    left.set_ylabel("summed over all parameters")
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(regular, dtype=float) / np.asarray(oracle, dtype=float)
    _line(right, t, ratio, color=COLOURS["oracle"], label="regular / oracle")
    right.axhline(1, color="0.6", ls=":", label="equal: nothing to gain from the oracle")
    right.set_title("how many times as many samples the conditional target needs", pad=16)
    right.set_ylabel("ratio of the variances")
    for axes in (left, right):
        axes.set_yscale("log")
        over_t(axes, boundary)
        axes.legend(loc="best", fontsize=8)
        plain_log_ticks(axes.yaxis)
    figure.suptitle(title)
    return figure


def _line(axes: Axes, t: np.ndarray, values: Sequence[float] | np.ndarray, **line: Any) -> None:
    """A line through the values that a logarithmic axis can show."""
    y = np.asarray(values, dtype=float)
    shown = np.isfinite(y) & (y > 0)
    axes.plot(t[shown], y[shown], marker="o", ms=3, **line)
