"""Training and held-out loss by stage over the training time, for few and for many training images."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from findings.workshop import STEPS, WIDTHS, Finding, Workshop, table

NUM_IMAGES = {"few": 1000, "all": 60_000}
STAGES = "navigation", "refinement"


def measure(workshop: Workshop) -> Finding:
    width = WIDTHS["large"]
    runs = {
        "few": workshop.train("few", 0, "--data.init_args.num_train", NUM_IMAGES["few"], width=width),
        "all": workshop.train("large", 0, width=width),
    }
    found = {name: read(run) for name, run in runs.items()}
    ends = [end(name, rows[-1], stage) for name, rows in found.items() for stage in STAGES]
    few = {row["stage"]: row for row in ends if row["images"] == NUM_IMAGES["few"]}
    last = found["few"][-1]["refinement_held_out_ema"]
    best = min(found["few"], key=lambda row: row["refinement_held_out_ema"])
    columns = {
        "training images": "{images}",
        "stage": "{stage}",
        "training": "{train:.4f}",
        "held-out": "{held_out:.4f}",
        "difference": "{excess:+.4f} ± {sem:.4f} ({share:+.1%})",
    }
    text = f"""
Does refinement memorize, and does navigation generalise? With {NUM_IMAGES["few"]} training images, after {STEPS} steps,
held-out images cost {few["refinement"]["share"]:+.1%} more than training images past the boundary
({few["refinement"]["excess"]:+.4f} ± {few["refinement"]["sem"]:.4f}), and {few["navigation"]["share"]:+.1%} before it
({few["navigation"]["excess"]:+.4f} ± {few["navigation"]["sem"]:.4f}). Its held-out loss in refinement was least at step
{best["step"]:.0f} ({best["refinement_held_out_ema"]:.4f}; at the end {last:.4f}).

{table(ends, columns)}

Regular loss of averaged weights on 1024 training and 1024 held-out images of Fashion-MNIST under the same noise at the
same t; network `large`, one training seed (0) each; ± is a standard error over images, bands are two. The boundary is
each run's own: fewer images have an earlier one.
"""
    rows = [{"images": NUM_IMAGES[name], **row} for name, rows in found.items() for row in rows]
    return Finding("What each stage learns over the training time", text, rows, draw(found))


def end(name: str, row: dict[str, float], stage: str) -> dict[str, Any]:
    """Training and held-out loss of a stage in one row of a run's table."""
    train, held_out = (row[f"{stage}_{images}_ema"] for images in ("train", "held_out"))
    error = sum(row[f"{stage}_{images}_ema_sem"] ** 2 for images in ("train", "held_out")) ** 0.5
    excess = held_out - train
    numbers = {"train": train, "held_out": held_out, "excess": excess, "sem": error, "share": excess / train}
    return {"images": NUM_IMAGES[name], "stage": stage, **numbers}


def draw(found: dict[str, list[dict[str, float]]]) -> Figure:
    """Both losses over the steps, a panel for each stage."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 2), STAGES, strict=True):
        for colour, (name, rows) in zip(("C3", "C0"), found.items(), strict=True):
            steps = [row["step"] for row in rows]
            for images, line in (("train", "-"), ("held_out", "--")):
                key = f"{stage}_{images}_ema"
                mean, error = ([row[column] for row in rows] for column in (key, f"{key}_sem"))
                label = f"{NUM_IMAGES[name]} images, {images.replace('_', '-')}"
                axes.plot(steps, mean, color=colour, ls=line, lw=1.4, label=label)
                low, high = ([m + k * e for m, e in zip(mean, error, strict=True)] for k in (-2, 2))
                axes.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("regular loss, per value (EMA)")
        axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def read(run: Path) -> list[dict[str, float]]:
    with (run / "memorization/regular_by_stage.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
