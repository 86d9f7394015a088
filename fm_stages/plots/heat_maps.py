"""Numbers by t over the steps of a run, as colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from fm_stages.plots.style import TIME, plain_log_ticks

TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Times that are written beside the bins, which are even in logit(t)."""

WIDEST, NARROWEST = 4.0, 1.5
"""Ratio of held-out to training loss, or its inverse, where a colour scale ends at the latest and soonest."""

Rows = Sequence[Sequence[float]]


def gap_over_steps(steps: Sequence[int], edges: Sequence[float], gap: Rows, boundary: float, title: str = "") -> Figure:
    """The gap by t over the steps of a run; a column reaches from the step before it to its own.

    Args:
        steps: (S,) at which windows of measurements ended.
        edges: (K + 1) bin edges.
        gap: (S, K) means; NaN where there were no samples.
        boundary: between the stages.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    axes = figure.subplots()
    values = np.asarray(gap, dtype=float)
    mesh = _mesh(axes, steps, edges, values, LogNorm(*_limits(values)), "magma")
    _decorate(axes, edges, boundary)
    axes.set_ylabel("t   (0 = noise, 1 = data; bins even in logit t)")
    _bar(figure, mesh, [axes], "gap: squared distance to the oracle, per value")
    figure.suptitle(title)
    return figure


def regular_over_steps(
    steps: Sequence[int],
    edges: Sequence[float],
    losses: Mapping[str, tuple[Rows, Rows, Rows]],
    boundary: float,
    title: str = "",
) -> Figure:
    """Training and held-out regular loss by t over the steps, and how many times as large the held-out one is.

    Where the two are within two standard errors of one another, or there is no such error, the ratio is white.

    Args:
        steps: (S,) of the validations.
        edges: (K + 1) bin edges.
        losses: by kind of weights the training loss, the held-out loss, and the standard error of their difference,
            each (S, K); a row of panels for each kind.
        boundary: between the stages.
        title: of the figure.

    Returns:
        The figure; `save` writes it.
    """
    figure = Figure(figsize=(14, 0.8 + 3.8 * len(losses)), layout="constrained")
    panels = figure.subplots(len(losses), 3, squeeze=False, sharey=True)
    known = {name: tuple(np.asarray(rows, dtype=float) for rows in three) for name, three in losses.items()}
    scale = LogNorm(*_limits(np.stack([rows for three in known.values() for rows in three[:2]])))
    ratios = {name: _clear_ratio(*three) for name, three in known.items()}
    widest = _widest(np.stack(list(ratios.values())))
    for row, (name, (train, held_out, _)) in zip(panels, known.items(), strict=True):
        left = _mesh(row[0], steps, edges, train, scale, "viridis")
        _mesh(row[1], steps, edges, held_out, scale, "viridis")
        right = _mesh(row[2], steps, edges, ratios[name], LogNorm(1 / widest, widest), "RdBu_r")
        for axes, what in zip(row, ("training images", "held-out images", "held-out / training"), strict=True):
            axes.set_title(f"{what}, {name} weights", fontsize=10)
            _decorate(axes, edges, boundary)
        row[0].set_ylabel(TIME)
        _bar(figure, left, list(row[:2]), "regular loss per value")
        _bar(figure, right, [row[2]], "ratio: above 1 = training images known by heart")
    figure.suptitle(title)
    return figure


def _mesh(
    axes: Axes, steps: Sequence[int], edges: Sequence[float], values: np.ndarray, scale: LogNorm, colours: str
) -> QuadMesh:
    """Colours of values (S, K); bins are drawn of equal height."""
    ends = np.asarray(steps, dtype=float)
    first = ends[0] - (ends[1] - ends[0] if len(ends) > 1 else ends[0] or 1)
    borders = np.concatenate([[first], ends])
    shown = np.ma.masked_invalid(np.where(values > 0, values, np.nan)).T
    axes.set_facecolor("0.85")  # of bins without samples
    axes.set_xlabel("step")
    return axes.pcolormesh(borders, np.arange(len(edges)), shown, norm=scale, cmap=colours)


def _decorate(axes: Axes, edges: Sequence[float], boundary: float) -> None:
    """Times on the axis; the boundary as a line, and the stages' names beside it."""
    places = np.arange(len(edges))
    axes.set_yticks(np.interp(TICKS, edges, places), [f"{t:g}" for t in TICKS])
    border, top = float(np.interp(boundary, edges, places)), len(edges) - 1
    if 0 < boundary < 1:
        axes.axhline(border, color="white", lw=2.4)
        axes.axhline(border, color="black", lw=1.2)
    for lo, hi, name in ((0.0, border, "navigation"), (border, top, "refinement")):
        if lo < hi:
            axes.text(1.01, (lo + hi) / 2, name, transform=axes.get_yaxis_transform(), rotation=90, ha="left",
                      va="center", fontsize=8, color="0.3")  # fmt: skip


def _bar(figure: Figure, mesh: QuadMesh, axes: list[Axes], label: str) -> None:
    """A colour bar with plain numbers."""
    bar = figure.colorbar(mesh, ax=axes, label=label, pad=0.05)
    plain_log_ticks(bar.ax.yaxis)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest value that a logarithmic scale can show."""
    shown = values[np.isfinite(values) & (values > 0)]
    if not len(shown):
        return 0.1, 1.0
    low, high = float(shown.min()), float(shown.max())
    return low, high if high > low else 1.01 * low


def _clear_ratio(train: np.ndarray, held_out: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Held-out over training loss; 1 where their difference is below two standard errors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = held_out / train
        same = np.isfinite(ratio) & ~(np.abs(held_out - train) > 2 * error)
    return np.where(same, 1.0, ratio)


def _widest(ratios: np.ndarray) -> float:
    """End of a scale that is even about 1."""
    shown = ratios[np.isfinite(ratios) & (ratios > 0)]
    largest = float(np.exp(np.abs(np.log(shown)).max())) if len(shown) else 1.0
    return min(max(largest, NARROWEST), WIDEST)
