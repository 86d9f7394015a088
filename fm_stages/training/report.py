"""What a run found: as numbers for a logger, and in words that a newcomer understands."""

from __future__ import annotations

import math

from fm_stages.oracle import Curves

MEANING = {
    "regular": "the loss that everybody logs: gap + floor",
    "gap": "what a better model can still win",
    "floor": "what no model can win: the data's own ambiguity",
    "closed": "how far from the best linear model to the oracle",
}


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


def held_out_metrics(curves: Curves, b: float, suffix: str) -> dict[str, float]:
    """Scalars of a validation, by logged name with the suffix of the weights; b is the boundary."""
    return {
        f"oracle_val/regular{suffix}": curves.average("regular"),
        f"oracle_val/regular_refinement{suffix}": curves.average("regular", b, 1),
        f"oracle_val/gap_navigation{suffix}": curves.average("gap", 0, b),
        f"oracle_val/closed{suffix}": closed(curves, b),
    }


def report(train: Curves | None, held_out: dict[str, Curves], boundary: float, weights: str = "raw") -> str:
    """A short table: regular, gap, floor and closed by stage, on training and held-out inputs, and a sentence on each.

    Args:
        train: of training inputs (regular, gap, floor, wiener); None if none were measured.
        held_out: of held-out inputs (regular, gap, wiener; gap before the boundary only) by the suffix of the weights.
        boundary: between the stages.
        weights: which weights the numbers without a suffix are of.

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
    lines += ["", *(f"  {key:8} {text}" for key, text in MEANING.items())]
    return "\n".join([*lines, "", *_sentences(train, held_out.get(""), b)])


def _row(name: str, values: list[float]) -> str:
    cells = ["" if math.isnan(v) else f"{v:.4f}" for v in values[:3]]
    cells.append("" if math.isnan(values[3]) else f"{100 * values[3]:.0f} %")
    return f"{name:26}" + "".join(f"{cell:>10}" for cell in cells)


def _sentences(train: Curves | None, held_out: Curves | None, b: float) -> list[str]:
    """One sentence for each stage, before and after the boundary b."""
    sentences = []
    if train is not None and not math.isnan(share_closed := closed(train, b)):
        share = f"{100 * share_closed:.0f} % of the way from the best linear model to the oracle"
        if share_closed < 0:
            gap, linear = train.average("gap", 0, b), train.average("wiener", 0, b)
            share = f"not yet as good as the best linear model (gap {gap:.4f} against {linear:.4f})"
        floor, regular = train.average("floor", 0, b), train.average("regular", 0, b)
        sentences.append(
            f"navigation: {share}; {100 * floor / regular:.0f} % of its regular loss is floor, which no training "
            "removes."
        )
    if train is not None and held_out is not None:
        ours, theirs = train.average("regular", b, 1), held_out.average("regular", b, 1)
        if math.isnan(ours) or math.isnan(theirs):
            return sentences
        sentences.append(
            f"refinement: held-out regular loss {theirs:.4f} against {ours:.4f} in training "
            f"({100 * (theirs / ours - 1):+.0f} %); here the held-out loss is the number to watch: a training "
            "loss that falls while it rises is memorization."
        )
    return sentences
