"""What was measured of several checkpoints on the same draws, as rows, in words, as a figure and in files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fm_stages import plots
from fm_stages.oracle import Curves, StageProfile
from fm_stages.studies.text_files import write_csv, write_json
from fm_stages.training import closed

STAGES = ("navigation", "refinement", "all t")

SHOWN = 2.0
"""Standard errors beyond which a difference is said to be there."""


@dataclass(frozen=True)
class CheckpointCurves:
    """What was measured of one checkpoint.

    Attributes:
        checkpoint: its file.
        weights: raw or ema.
        step: of the weights.
        num_weights: numbers that were learnt.
        train: by t on training images, `several.TRAINING`; changes are differences to the first one, draw by draw.
        held_out: by t on held-out images, `several.HELD_OUT`.
    """

    checkpoint: str
    weights: str
    step: int
    num_weights: int
    train: Curves
    held_out: Curves

    def change(self, first: CheckpointCurves, lo: float, hi: float) -> tuple[float, float]:
        """Change of the gap over t in [lo, hi] as a share of the first one's gap there, and its standard error."""
        reference = first.train.average("gap", lo, hi) or math.nan
        change, error = self.train.average("gap_change", lo, hi), self.train.average_sem("gap_change", lo, hi)
        return change / reference, error / reference


@dataclass(frozen=True)
class CheckpointComparison:
    """Several checkpoints on the same draws.

    Attributes:
        checkpoints: by name; the first one is what the others are held against.
        profile: the stages of the data.
        num_samples: draws of training images.
        seed: of the draws.
    """

    checkpoints: dict[str, CheckpointCurves]
    profile: StageProfile
    num_samples: int
    seed: int

    @property
    def reference(self) -> str:
        """Name of the first one."""
        return next(iter(self.checkpoints))

    def stages(self) -> dict[str, tuple[float, float]]:
        """Ends of the stages in t."""
        return dict(zip(STAGES, ((0.0, self.profile.boundary), (self.profile.boundary, 1.0), (0.0, 1.0)), strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each checkpoint and stage, as plain data; `nan` where nothing was measured."""
        first = self.checkpoints[self.reference]
        rows = []
        for name, one in self.checkpoints.items():
            for stage, (lo, hi) in self.stages().items():
                share, share_sem = one.change(first, lo, hi)
                row = {"name": name, "weights": one.weights, "step": one.step, "num_weights": one.num_weights}
                row |= {
                    "stage": stage,
                    "gap": one.train.average("gap", lo, hi),
                    "gap_sem": one.train.average_sem("gap", lo, hi),
                    "gap_change": one.train.average("gap_change", lo, hi),
                    "gap_change_sem": one.train.average_sem("gap_change", lo, hi),
                    "gap_change_share": share,
                    "gap_change_share_sem": share_sem,
                    "closed": closed(one.train, hi) if stage == "navigation" else float("nan"),
                    "regular": one.train.average("regular", lo, hi),
                    "held_out_regular": one.held_out.average("regular", lo, hi),
                    "held_out_regular_change": one.held_out.average("regular_change", lo, hi),
                    "held_out_regular_change_sem": one.held_out.average_sem("regular_change", lo, hi),
                }
                rows.append(row)
        return rows

    def text(self) -> str:
        """The table split by stage, and a sentence for each checkpoint after the first."""
        width = max(12, *(len(name) for name in self.checkpoints)) + 2
        b, first = self.profile.boundary, self.checkpoints[self.reference]
        lines = [
            f"{first.weights} weights, {self.num_samples} draws, the same for all. Navigation is t < {b:.3f}, "
            f"refinement what follows; means over uniform t, per value. In brackets the change against "
            f"{self.reference}.",
            "",
            f"{'':{width}}{'step':>8}{'weights':>12}{'closed':>8}{'held-out regular':>26}",
        ]
        kept = self.rows()
        for name, one in self.checkpoints.items():
            whole, navigation = (_row(kept, name, stage) for stage in ("all t", "navigation"))
            held_out = _with_change(whole["held_out_regular"], whole["held_out_regular_change"], name, self.reference)
            share = "" if navigation["closed"] != navigation["closed"] else f"{navigation['closed']:.0%}"
            lines.append(f"{name:{width}}{one.step:>8}{one.num_weights:>12,}{share:>8}{held_out:>26}")
        lines += ["", f"{'gap':{width}}" + "".join(f"{stage:>30}" for stage in STAGES)]
        for name in self.checkpoints:
            cells = []
            for stage in STAGES:
                row = _row(kept, name, stage)
                cell = f"{row['gap']:.4f}"
                if name != self.reference:
                    cell += f" ({row['gap_change_share']:+.1%} ± {row['gap_change_share_sem']:.1%})"
                cells.append(f"{cell:>30}")
            lines.append(f"{name:{width}}" + "".join(cells))
        return "\n".join([*lines, "", *self.sentences()])

    def sentences(self) -> list[str]:
        """What the paired differences say about the stages, one sentence for each checkpoint after the first."""
        first, sentences = self.checkpoints[self.reference], []
        for name, one in list(self.checkpoints.items())[1:]:
            (early, early_sem), (late, late_sem) = (
                one.change(first, *self.stages()[stage]) for stage in ("navigation", "refinement")
            )
            error = math.hypot(early_sem, late_sem)
            verdict = "no difference between the stages can be told from noise"
            if early * late < 0 and abs(early) > SHOWN * early_sem and abs(late) > SHOWN * late_sem:
                verdict = "the stages go opposite ways"
            elif abs(abs(early) - abs(late)) > SHOWN * error:
                larger = "navigation" if abs(early) > abs(late) else "refinement"
                verdict = f"more in {larger}, as a share of what was there"
            sentences.append(
                f"{name}: against {self.reference} the gap changes by {early:+.1%} ± {early_sem:.1%} in navigation and "
                f"by {late:+.1%} ± {late_sem:.1%} in refinement: {verdict}{self._parts(one)}."
            )
        return sentences

    def _parts(self, one: CheckpointCurves) -> str:
        """Which part of the whole change, over all t, lies in refinement; nothing where there is hardly a change."""
        b, train = self.profile.boundary, one.train
        whole, error = train.average("gap_change"), train.average_sem("gap_change")
        if not abs(whole) > SHOWN * error or not 0 < b < 1:
            return ""
        return f"; {(1 - b) * train.average('gap_change', b, 1) / whole:.0%} of the change over all t is in refinement"

    def figure(self) -> Figure:
        """The gap over t of each, and the paired difference to the first."""
        first = self.checkpoints[self.reference]
        curves = {}
        for name, one in self.checkpoints.items():
            curves[name] = {"mean": one.train.mean["gap"], "sem": one.train.sem["gap"]}
            if name != self.reference:
                curves[name]["relative"] = _divided(one.train.mean["gap_change"], first.train.mean["gap"])
                curves[name]["relative_sem"] = _divided(one.train.sem["gap_change"], first.train.mean["gap"])
        title = f"Gap to the oracle, {first.weights} weights, {self.num_samples} draws, the same for all checkpoints"
        return plots.gap_of_arms(
            first.train.edges, curves, self.reference, self.profile.boundary, title, linear=first.train.mean["wiener"]
        )

    def write(self, out: Path) -> None:
        """Write ``checkpoints.json``, ``checkpoints.csv`` (by stage), ``gap_by_t.csv`` and ``gap_by_t.png``."""
        out.mkdir(parents=True, exist_ok=True)
        plain = {"seed": self.seed, "num_samples": self.num_samples, "stages": self.rows()}
        plain |= {"checkpoints": {name: asdict(one) for name, one in self.checkpoints.items()}}
        plain |= {"profile": asdict(self.profile)}
        write_json(out / "checkpoints.json", plain)
        rows = self.rows()
        write_csv(out / "checkpoints.csv", list(rows[0]), [list(row.values()) for row in rows])
        tables = {name: one.train.table() for name, one in self.checkpoints.items()}
        columns = next(iter(tables.values()))[0]
        by_t = [[name, *row] for name, (_, own) in tables.items() for row in own]
        write_csv(out / "gap_by_t.csv", ["name", *columns], by_t)
        plots.save(self.figure(), out / "gap_by_t.png")


def _divided(values: list[float], by: list[float]) -> list[float]:
    return [x / y if y else float("nan") for x, y in zip(values, by, strict=True)]


def _row(rows: list[dict[str, Any]], name: str, stage: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name and row["stage"] == stage)


def _with_change(value: float, change: float, name: str, reference: str) -> str:
    return f"{value:.4f}" if name == reference else f"{value:.4f} ({change / (value - change):+.1%})"
