"""A data set's stages over t: its own figure, several data sets over each other, and what moves the boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fm_stages.plots.style import BLUE, GREEN, INK, RUST, over_t

KIND_COLOURS = {"the network's mix": INK, "unconditional": BLUE, "conditional": RUST}


def stage_curves(profile: Mapping[str, Any], guidance_interval: tuple[float, float] | None, title: str) -> Figure:
    """Four panels over t: largest weight, effective number of rows, floor, and what the label adds.

    Args:
        profile: fields of `fm_stages.oracle.StageProfile` as plain data.
        guidance_interval: shaded in the last panel, if there is one.
        title: of the figure.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    (top, ess), (floor, last) = figure.subplots(2, 2)
    kinds = _kinds(profile)
    t = np.asarray(profile["t"])
    for kind, curves in kinds.items():
        colour = KIND_COLOURS[kind]
        _band(top, t, curves, "top1", colour, f"largest weight: mean, {kind}")
        _band(top, t, curves, "top1_median", colour, "median", ls="--", lw=1)
        _band(ess, t, curves, "ess", colour, kind)
        _band(floor, t, curves, "floor", colour, kind)
    for level, name in ((0.1, "navigation ends"), (0.5, "boundary"), (0.9, "refinement complete")):
        top.axhline(level, color="0.8", lw=0.6, zorder=-1)
        top.text(1.01, level, f"{name}:\nmedian {level}", va="center", fontsize=7, color="0.4")  # where no legend is
    _names(top, "posterior weight of the best training sample", "weight")
    _names(ess, "effective number of training samples (median)", "1 / sum of squared weights")
    ess.set_yscale("log")
    _names(floor, "floor: what no model can win", "mean squared error per value")
    _guidance(last, t, profile, guidance_interval)
    for axes in (top, ess, floor, last):
        over_t(axes, profile["boundary"])
        axes.legend(fontsize=7, loc="best")
    figure.suptitle(title)
    return figure


def compare_stages(profiles: Mapping[str, Mapping[str, Any]], log_snr: Mapping[str, Sequence[float]]) -> Figure:
    """Largest weight and floor of several data sets over each other, on t and on the logarithm of signal over noise.

    Args:
        profiles: by name, fields of `fm_stages.oracle.StageProfile` as plain data.
        log_snr: by name, log(alpha^2 / sigma^2) at its times.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for i, (name, profile) in enumerate(profiles.items()):
        colour = f"C{i}"
        for column, x in ((0, np.asarray(profile["t"])), (1, np.asarray(log_snr[name]))):
            _band(panels[0, column], x, profile, "top1", colour, name)
            _band(panels[1, column], x, profile, "floor", colour, name)
            for axes in panels[:, column]:
                axes.axvline(np.interp(profile["boundary"], profile["t"], x), color=colour, lw=0.8, ls=":")
    for row, (title, unit) in enumerate(
        (("largest posterior weight (mean)", "weight"), ("floor", "mean squared error per value"))
    ):
        _names(panels[row, 0], title, unit)
        _names(panels[row, 1], title, unit)
        panels[row, 0].set_xlim(0, 1)
        panels[row, 0].set_xlabel("t   (0 = noise, 1 = data); dotted: boundary")
        panels[row, 1].set_xlabel("log-SNR: log(alpha² / sigma²); dotted: boundary")
        panels[row, 1].set_xlim(-10, 10)
        panels[row, 0].legend(fontsize=8)
    figure.suptitle("stages of several data sets, for the label mix that the network sees")
    return figure


def boundary_trends(
    rows: Mapping[str, Any] | None, dims: Sequence[Mapping[str, Any]] | None, all_rows: int | None = None
) -> Figure:
    """The boundary over the number of rows, with its line, and over the number of values per row.

    Args:
        rows: points, slope and intercept of the trend over rows.
        dims: points of the trend over dimensions, each with its kind.
        all_rows: how many rows there are beyond those measured: the line is drawn up to there.

    Returns:
        The figure.
    """
    shown = [part for part in (rows, dims) if part]
    figure = Figure(figsize=(6.5 * len(shown), 4.8), layout="constrained")
    panels = iter(figure.subplots(1, len(shown), squeeze=False)[0])
    if rows:
        _row_trend(next(panels), rows, all_rows)
    if dims:
        axes = next(panels)
        for i, kind in enumerate(dict.fromkeys(point["kind"] for point in dims)):
            points = [point for point in dims if point["kind"] == kind]
            label = f"{kind}, N = {points[0]['num_rows']}"
            _points(axes, points, "num_dims", "boundary", f"C{i}", label)
        axes.set_xlabel("values per row D")
        axes.set_ylim(0, 1.05 * max(point["boundary"] for point in dims))
        _names(axes, "more values: earlier", "boundary t")
        axes.legend(fontsize=8)
    return figure


def _row_trend(axes: Axes, rows: Mapping[str, Any], all_rows: int | None) -> None:
    points = rows["points"]
    for name, colour in (("refinement_complete", "0.6"), ("boundary", RUST), ("navigation_end", "0.6")):
        _points(axes, points, "num_rows", name, colour, name.replace("_", " "))
    most = max(all_rows or 0, points[0]["num_rows"])
    x = np.geomspace(points[-1]["num_rows"], 10 * most, 50)
    expected = np.clip(rows["intercept"] + rows["slope"] * np.log(x), 0, 1)
    axes.plot(x, expected, color=RUST, ls=":", lw=1, label="line through the larger half of the banks")
    if most > points[0]["num_rows"]:
        axes.axvline(most, color="0.5", lw=0.8)
        axes.text(most, 0.02, f" all {most} rows", transform=axes.get_xaxis_transform(), fontsize=8, color="0.4")
    numbers = [*(point["num_rows"] for point in points), 10 * most]
    axes.set_xticks(numbers, [str(number) for number in numbers], fontsize=8)
    axes.xaxis.set_minor_formatter(NullFormatter())  # the powers of ten between them would overlap
    axes.set_xlabel("rows N")
    axes.set_ylim(0, 1.1 * max(expected[-1], *(point["refinement_complete"] for point in points)))
    _names(axes, "more rows: later, with log N", "t")
    axes.legend(fontsize=8)


def _points(axes: Axes, points: Sequence[Mapping[str, Any]], x: str, y: str, colour: str, label: str) -> None:
    axes.errorbar([p[x] for p in points], [p[y] for p in points], yerr=[p["time_sem"][y] for p in points],
                  color=colour, marker="o", ms=4, lw=1.2, capsize=2, label=label)  # fmt: skip
    axes.set_xscale("log")


def _kinds(profile: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The curves of each kind of query; the mix alone if that is all there is."""
    parts = {kind: profile[kind] for kind in ("unconditional", "conditional") if profile.get(kind)}
    if parts:
        return parts
    return {"unconditional" if profile["label_dropout"] == 1 else "the network's mix": profile}


def _band(
    axes: Axes, x: np.ndarray, curves: Mapping[str, Any], name: str, colour: str, label: str, **line: Any
) -> None:
    """A curve with two standard errors to either side."""
    y, error = np.asarray(curves[name]), np.asarray(curves["sem"][name])
    inside = np.isfinite(x)
    axes.plot(x[inside], y[inside], color=colour, label=label, marker=".", ms=3, **line)
    axes.fill_between(x[inside], (y - 2 * error)[inside], (y + 2 * error)[inside], color=colour, alpha=0.2, lw=0)


def _guidance(axes: Axes, t: np.ndarray, profile: Mapping[str, Any], interval: tuple[float, float] | None) -> None:
    """What the label adds; without labels the chance that the oracle's best guess is the source."""
    if profile.get("guidance") is None:
        for kind, curves in _kinds(profile).items():
            _band(axes, t, curves, "own", KIND_COLOURS[kind], kind)
        _names(axes, "posterior weight of the sample that x_t was made from", "weight")
        return
    curves = {"guidance": profile["guidance"], "sem": {"guidance": profile["guidance_sem"]}}
    _band(axes, t, curves, "guidance", GREEN, "E||u*(label) - u*||² / D")
    _names(axes, "what the label adds to the oracle", "mean squared difference per value")
    if interval:
        axes.axvspan(*interval, ymax=0.04, color=GREEN, alpha=0.5, label="guidance interval, by the rule")


def _names(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, pad=16, fontsize=10)
    axes.set_ylabel(unit)
