"""Training against held-out images at each validation: numbers by stage, raw and EMA weights, over the steps of a run.

The difference of the two losses past the boundary is what the network knows of its training images and of no other:
it grows as they are learnt by heart. Before the boundary there is hardly anything to learn by heart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fm_stages.oracle import Curves
from fm_stages.training.logs.loggers import Table
from fm_stages.training.monitor.checks import SUFFIXES
from fm_stages.training.monitor.history import History
from fm_stages.training.monitor.report import closed


def stages_of(boundary: float) -> dict[str, tuple[float, float]]:
    """The stages that there are, each from t to t."""
    both = {"navigation": (0.0, boundary), "refinement": (boundary, 1.0)}
    return {name: (lo, hi) for name, (lo, hi) in both.items() if lo < hi}


def validation_metrics(held_out: Mapping[str, Curves], probe: Mapping[str, Curves], b: float) -> dict[str, float]:
    """Scalars of a validation, by logged name.

    Args:
        held_out: of held-out images (regular, gap, wiener), by the suffix of the weights.
        probe: of training images (regular), likewise.
        b: the boundary. Of a stage that there is not, there are no numbers.
    """
    metrics: dict[str, float] = {}
    for suffix, curves in held_out.items():
        metrics |= _regular("oracle_val", curves, b, suffix)
        if b > 0:
            metrics[f"oracle_val/gap_navigation{suffix}"] = curves.average("gap", 0, b)
            metrics[f"oracle_val/closed{suffix}"] = closed(curves, b)
    for suffix, curves in probe.items():
        metrics |= _regular("oracle_train", curves, b, suffix)
    for suffix in (suffix for suffix in held_out if suffix in probe):
        for stage, (lo, hi) in stages_of(b).items():
            excess, error = excess_of(held_out[suffix], probe[suffix], lo, hi)
            metrics[f"memorization/excess_{stage}{suffix}"] = excess
            metrics[f"memorization/excess_{stage}_sem{suffix}"] = error
    return metrics


def excess_of(held_out: Curves, train: Curves, lo: float, hi: float) -> tuple[float, float]:
    """Held-out minus training regular loss over uniform t in [lo, hi], and its standard error.

    The error takes the two for independent. They share noise and t, so that it is rather too large.
    """
    excess = held_out.average("regular", lo, hi) - train.average("regular", lo, hi)
    return excess, math.hypot(*(curves.average_sem("regular", lo, hi) for curves in (held_out, train)))


def best_validation(history: History, suffix: str, boundary: float) -> int | None:
    """Place in the history of the lowest held-out regular loss past the boundary, or of all t where there is none."""
    lo = boundary if boundary < 1 else 0.0
    losses, _ = history.average(f"held_out{suffix}", lo, 1.0)
    finite = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
    return min(finite, key=lambda i: losses[i]) if finite else None


def best_step_metrics(history: History, boundary: float) -> dict[str, float]:
    """The step of the best validation so far, by logged name."""
    places = {suffix: best_validation(history, suffix, boundary) for suffix in SUFFIXES}
    return {f"memorization/best_step{s}": float(history.steps[i]) for s, i in places.items() if i is not None}


def named(held_out: Mapping[str, Curves], probe: Mapping[str, Curves]) -> dict[str, Curves]:
    """Both as series of a `History`: train, held_out, train_ema, held_out_ema."""
    series = {f"train{suffix}": curves for suffix, curves in probe.items()}
    return {**series, **{f"held_out{suffix}": curves for suffix, curves in held_out.items()}}


def losses_over_steps(history: History, boundary: float) -> Table:
    """One row for each step: the regular loss of each series by stage, with standard errors."""
    columns: dict[str, list[float]] = {"step": [float(step) for step in history.steps]}
    for stage, (lo, hi) in stages_of(boundary).items():
        for name in history.series:
            mean, sem = history.average(name, lo, hi)
            columns |= {f"{stage}_{name}": mean, f"{stage}_{name}_sem": sem}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _regular(family: str, curves: Curves, b: float, suffix: str) -> dict[str, float]:
    by_stage = {
        f"{family}/regular_{stage}{suffix}": curves.average("regular", lo, hi)
        for stage, (lo, hi) in stages_of(b).items()
    }
    return {f"{family}/regular{suffix}": curves.average("regular"), **by_stage}
