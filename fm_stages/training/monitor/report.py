"""What a run found: as numbers for a logger, and in words that a newcomer understands."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import lightning as L

from fm_stages.oracle import Curves
from fm_stages.training.logs.loggers import run_folder

if TYPE_CHECKING:
    from fm_stages.training.monitor.callback import OracleMonitor

MEANING = {
    "regular": "the loss that everybody logs: gap + floor",
    "gap": "what a better model can still win",
    "floor": "what no model can win: the data's own ambiguity",
    "closed": "how far from the best linear model to the oracle",
}

PROBE = {"probe": "training images, measured with the same weights and noise as the held-out ones"}
"""What else a report explains that has such rows."""


def closed(curves: Curves, boundary: float) -> float:
    """1 - gap / gap of the best linear model, on the same draws, before the boundary; NaN without that reference."""
    return 1 - curves.average("gap", 0, boundary) / curves.average("wiener", 0, boundary)


def train_metrics(curves: Curves, b: float) -> dict[str, float]:
    """Scalars of a window of measurements, by logged name; b is the boundary."""
    return {
        **{f"oracle/{name}": curves.average(name) for name in ("regular", "gap", "floor", "top1", "ess")},
        "oracle/gap_sem": curves.average_sem("gap"),
        "oracle/gap_navigation": curves.average("gap", 0, b),
        "oracle/gap_refinement": curves.average("gap", b, 1),
        "oracle/closed": closed(curves, b),
        "oracle/identity_z": curves.z_score("identity"),
        "oracle/coverage": curves.coverage(),
    }


def report(
    train: Curves | None,
    held_out: dict[str, Curves],
    boundary: float,
    weights: str = "raw",
    probe: dict[str, Curves] | None = None,
) -> str:
    """A short table: regular, gap, floor and closed by stage, on training and held-out inputs, and a sentence on each.

    Args:
        train: of training inputs (regular, gap, floor, wiener, zero); None if none were measured.
        held_out: of held-out inputs (regular, gap, wiener; gap before the boundary only) by the suffix of the weights.
        boundary: between the stages.
        weights: which weights the numbers without a suffix are of.
        probe: of training images (regular), measured as the held-out ones were, by suffix; what is said of refinement
            is then said by these.

    Returns:
        Text of several lines.
    """
    b = boundary
    lines = [
        f"Stages of this data: navigation t < {b:.3f} (the oracle mixes many samples), refinement after it "
        "(the oracle is one sample).",
        f"Numbers are means over uniform t, per value, of the {weights} weights unless a row says otherwise.",
        "",
        f"{'':26}{'regular':>10}{'gap':>10}{'floor':>10}{'closed':>10}",
    ]
    for name, lo, hi in (("navigation", 0.0, b), ("refinement", b, 1.0), ("all t", 0.0, 1.0)):
        if train is not None:
            part = closed(train, b) if name == "navigation" else math.nan
            values = [train.average(key, lo, hi) for key in ("regular", "gap", "floor")] + [part]
            lines.append(_row(f"training, {name}", values))
        for suffix, curves in held_out.items():
            early = name == "navigation"  # past the boundary the oracle heads for another image: no gap to speak of
            gap, part = (curves.average("gap", lo, hi), closed(curves, b)) if early else (math.nan, math.nan)
            kind = f"held-out{suffix.replace('_ema', ' EMA')}, {name}"
            lines.append(_row(kind, [curves.average("regular", lo, hi), gap, math.nan, part]))
        for suffix, curves in (probe or {}).items():
            kind = f"probe{suffix.replace('_ema', ' EMA')}, {name}"
            lines.append(_row(kind, [curves.average("regular", lo, hi), math.nan, math.nan, math.nan]))
    lines += ["", *(f"  {key:8} {text}" for key, text in (MEANING | (PROBE if probe else {})).items())]
    pairs = {suffix: (curves, held_out[suffix]) for suffix, curves in (probe or {}).items() if suffix in held_out}
    if not pairs and train is not None and "" in held_out:
        pairs[""] = train, held_out[""]
    return "\n".join([*lines, "", *_navigation(train, b), *_refinement(pairs, b)])


def print_report(trainer: L.Trainer, monitor: OracleMonitor) -> None:
    """The report of a run, of what windows it is, and where the rest lies."""
    if monitor.profile is None or (monitor.train is None and not monitor.held_out):
        print(f"OracleMonitor measured nothing: the run ended before step {monitor.every_n_steps}.")
        return
    print("\n" + report(monitor.train, monitor.held_out, monitor.profile.boundary, probe=monitor.probe))
    if monitor.train is not None:
        print(f"\nTraining rows: mean of the last window of measurements, which ended at step {monitor.logged_step}.")
    checkpoint = getattr(trainer.checkpoint_callback, "dirpath", None)
    print(f"\nFigures and tables: {run_folder(trainer)}" + (f"\nCheckpoints: {checkpoint}" if checkpoint else ""))


def _row(name: str, values: list[float]) -> str:
    cells = ["" if math.isnan(v) else f"{v:.4f}" for v in values[:3]]
    cells.append("" if math.isnan(values[3]) else f"{100 * values[3]:.0f} %")
    return f"{name:26}" + "".join(f"{cell:>10}" for cell in cells)


def _navigation(train: Curves | None, b: float) -> list[str]:
    """A sentence on the stage before the boundary b."""
    if train is None or math.isnan(share_closed := closed(train, b)):
        return []
    share = f"{100 * share_closed:.0f} % of the way from the best linear model to the oracle"
    gap, linear, nothing = (train.average(name, 0, b) for name in ("gap", "wiener", "zero"))
    if gap > nothing:
        share = (
            f"worse than predicting 0 (gap {gap:.4f} against {nothing:.4f}), as a network is that runs time the other "
            "way, or knows the data at another scale"
        )
    elif share_closed < 0:
        share = f"not yet as good as the best linear model (gap {gap:.4f} against {linear:.4f})"
    floor, regular = train.average("floor", 0, b), train.average("regular", 0, b)
    return [
        f"navigation: {share}; {100 * floor / regular:.0f} % of its regular loss is floor, which no training removes."
    ]


def _refinement(pairs: dict[str, tuple[Curves, Curves]], b: float) -> list[str]:
    """A sentence on the stage after it: training and held-out images, by the suffix of the weights."""
    parts = []
    for suffix, (train, held_out) in pairs.items():
        ours, theirs = train.average("regular", b, 1), held_out.average("regular", b, 1)
        if not (math.isnan(ours) or math.isnan(theirs)):
            text = f"{theirs:.4f} against {ours:.4f} in training ({100 * (theirs / ours - 1):+z.0f} %)"
            parts.append(f"EMA {text}" if suffix else text)
    if not parts:
        return []
    return [
        f"refinement: held-out regular loss {', '.join(parts)}; here the held-out loss is the number to watch: a "
        "training loss that falls while it rises is memorization."
    ]
