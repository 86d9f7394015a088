"""Several ways to train beside each other: the gap over t of each, and paired differences with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fm_stages.plots.losses import COLOURS
from fm_stages.plots.style import RUST, TIME, shade_stages


def gap_of_arms(
    edges: Sequence[float],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    reference: str,
    boundary: float,
    title: str = "",
    linear: Sequence[float] | None = None,
) -> Figure:
    """The gap over t of several arms, and below it the difference of each to the reference.

    Args:
        edges: (K + 1) bin edges.
        curves: by arm, ``mean`` (K) over seeds and its standard error ``sem`` (K), 0 or NaN where there is none; and,
            for arms that share seeds with the reference, ``relative`` (K) and ``relative_sem`` (K): the difference over
            the reference, paired by seed (or by draw).
        reference: the arm that is the zero line below.
        boundary: between the stages.
        title: of the figure.
        linear: (K) the gap of the best linear model, for scale.

    Returns:
        The figure; bands are two standard errors to either side.
    """
    figure = Figure(figsize=(8.5, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    centre = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    for i, (name, arm) in enumerate(curves.items()):
        mean, error = np.asarray(arm["mean"]), np.nan_to_num(np.asarray(arm["sem"]))
        above.plot(centre, mean, color=f"C{i}", marker="o", ms=3, lw=1.4, label=name)
        _band(above, centre, mean, error, f"C{i}")
        if name != reference and "relative" in arm:
            share = 100 * np.asarray(arm["relative"])
            error = 200 * np.nan_to_num(np.asarray(arm["relative_sem"]))
            below.plot(centre, share, color=f"C{i}", marker="o", ms=3, lw=1.4)
            below.fill_between(centre, share - error, share + error, color=f"C{i}", alpha=0.13, lw=0)
    if linear is not None:
        above.plot(centre, linear, color=COLOURS["wiener"], ls="--", lw=1.2, label="the best linear model (Wiener)")
    above.set_yscale("log")
    above.set_ylabel("distance to the oracle, squared, per value")
    above.legend(fontsize=8)
    below.axhline(0, color="0.4", lw=0.9, ls=":")
    below.set_ylabel(f"difference to {reference}, %")
    below.set_xlabel(TIME)
    for axes in (above, below):
        axes.set_xlim(0, 1)
        shade_stages(axes, boundary)
    figure.suptitle(title, fontsize=10)
    return figure


def progress_of_arms(curves: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], title: str = "") -> Figure:
    """Numbers along training, over steps above and over time below.

    Args:
        curves: by arm, ``steps`` (M), ``seconds`` (M), and by number ``mean`` (M) and its standard error ``sem`` (M).
        names: of the numbers, in words; a column each.
        title: of the figure.

    Returns:
        The figure; bands are two standard errors to either side.
    """
    figure = Figure(figsize=(4.6 * len(names), 7), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, sharey="col")
    for row, (place, label) in enumerate((("steps", "step"), ("seconds", "seconds of training"))):
        for axes, (name, words) in zip(panels[row], names.items(), strict=True):
            for i, (arm, curve) in enumerate(curves.items()):
                mean, error = np.asarray(curve[name]["mean"]), np.asarray(curve[name]["sem"])
                axes.plot(curve[place], mean, color=f"C{i}", marker="o", ms=3, lw=1.3, label=arm)
                _band(axes, curve[place], mean, error, f"C{i}")
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):  # as plain numbers, and few of them
                axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
                axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
                axis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.set_title(words if row == 0 else "", fontsize=10)
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def paired_differences(
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Mapping[str, str], title: str = ""
) -> Figure:
    """A panel for each number, with one row for each arm: the difference and its confidence interval.

    Args:
        differences: by arm and number, ``mean`` and ``low`` and ``high``, None without an interval.
        names: of the numbers, in words.
        title: of the figure.

    Returns:
        The figure; what excludes 0 is dark.
    """
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns, rows * (1.3 + 0.32 * max(len(differences), 1))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    arms = list(differences)
    for axes, (metric, words) in zip(panels, names.items(), strict=False):
        for place, arm in enumerate(arms):
            if pair := differences[arm].get(metric):
                _interval(axes, place, pair)
        axes.axvline(0, color="0.4", lw=0.9, ls=":")
        axes.set_title(words, fontsize=9)
        axes.set_yticks(range(len(arms)), arms, fontsize=8)
        axes.set_ylim(len(arms) - 0.5, -0.5)  # the first arm on top
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=5)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def _band(axes: Axes, x: Sequence[float], mean: np.ndarray, error: np.ndarray, colour: str) -> None:
    """Two standard errors to either side; cut above 0, where a logarithmic axis has no place."""
    axes.fill_between(x, np.maximum(mean - 2 * error, mean / 10), mean + 2 * error, color=colour, alpha=0.13, lw=0)


def _interval(axes: Axes, place: int, pair: Mapping[str, Any]) -> None:
    low, high = pair["low"], pair["high"]
    if low is None or high is None:
        axes.plot([pair["mean"]], [place], marker="o", ms=5, mfc="white", mec="0.4", ls="none")
        return
    colour = RUST if low > 0 else "#2a6f4e" if high < 0 else "0.65"
    axes.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
    axes.plot([pair["mean"]], [place], marker="o", ms=5, color=colour, ls="none")
