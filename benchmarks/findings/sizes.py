"""The gap over t by the size of the network, and by the length of the training."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from findings.workshop import SAVED_EVERY, SEEDS, STEPS, WIDTHS, Finding, Workshop, mean_and_error, table
from fm_stages import plots

STAGES = "navigation", "refinement"
NUM_DRAWS = 4096


def measure(workshop: Workshop) -> Finding:
    found = []
    for seed in SEEDS:
        files = {
            f"{name}_{steps}": workshop.network(name, seed).with_name(f"step_{steps:07d}.ckpt")
            for name in WIDTHS
            for steps in (SAVED_EVERY, STEPS)
        }
        out = workshop.folder / f"sizes_{seed}"
        words = [word for name, file in files.items() for word in ("--ckpt", f"{name}={file}")]
        workshop.run("diagnose", *words, "--num_samples", NUM_DRAWS, "--out", out, unless=out / "gap_by_t.png")
        found.append(json.loads((out / "checkpoints.json").read_text()))
    reference = next(iter(found[0]["checkpoints"]))
    edges = found[0]["checkpoints"][reference]["train"]["edges"]
    rows, curves = [], {}
    for name in found[0]["checkpoints"]:
        gaps = [one["checkpoints"][name]["train"]["mean"]["gap"] for one in found]
        first = [one["checkpoints"][reference]["train"]["mean"]["gap"] for one in found]
        points = [mean_and_error(of) for of in zip(*gaps, strict=True)]
        changes = [
            mean_and_error([a / b - 1 for a, b in zip(of, before, strict=True)])
            for of, before in zip(zip(*gaps, strict=True), zip(*first, strict=True), strict=True)
        ]
        curves[name] = {"mean": [mean for mean, _ in points], "sem": [error for _, error in points]}
        curves[name] |= {"relative": [mean for mean, _ in changes], "relative_sem": [error for _, error in changes]}
        rows += [
            {"network": name, "t_lo": lo, "t_hi": hi, "gap": mean, "gap_sem": error}
            for lo, hi, (mean, error) in zip(edges, edges[1:], points, strict=False)
        ]
    linear = found[0]["checkpoints"][reference]["train"]["mean"]["wiener"]
    figure: Figure = plots.gap_of_arms(
        edges, curves, reference, found[0]["profile"]["boundary"],
        f"Gap to the oracle, mean of {len(SEEDS)} training seeds", linear=linear,
    )  # fmt: skip
    listed = [
        {"network": name, **{stage: _written(found, name, stage) for stage in STAGES}} for name in list(curves)[1:]
    ]
    largest = f"large_{STEPS}"
    early, late = (mean_and_error(_changes(found, largest, stage, "gap_change_share")) for stage in STAGES)
    parts = [
        (1 - one["profile"]["boundary"]) * refinement / whole
        for one, refinement, whole in zip(
            found,
            _changes(found, largest, "refinement", "gap_change"),
            _changes(found, largest, "all t", "gap_change"),
            strict=True,
        )
    ]
    part, part_error = mean_and_error(parts)
    verdict = "as in the paper"
    if abs(early[0]) - abs(late[0]) > 2 * (early[1] ** 2 + late[1] ** 2) ** 0.5:
        verdict = "against the paper, navigation gains more of its gap than refinement"
    text = f"""
The paper (arXiv 2512.02826) finds that refinement improves with capacity and length of training, and navigation hardly.
Here the gap of the largest and longest trained network, against the smallest and shortest, is
{100 * early[0]:+.1f} ± {100 * early[1]:.1f} % in navigation and {100 * late[0]:+.1f} ± {100 * late[1]:.1f} % in
refinement: **{verdict}**, as a share of what was there. Of the change over all t,
{100 * part:.0f} ± {100 * part_error:.0f} % lies in refinement, whose gap is the larger one. The paper's networks have
hundreds to thousands of times as many weights as these.

{table(listed, {"against " + reference: "{network}", **{f"gap, {stage}": f"{{{stage}}}" for stage in STAGES}})}

Means over uniform t within each stage, averaged weights, {NUM_DRAWS} training images with the same noise for all;
{len(SEEDS)} training seeds, ± is the standard error of their mean, bands are two. Names are sizes and steps; channels:
{", ".join(f"{width} ({name})" for name, width in WIDTHS.items())}.
"""
    return Finding("The gap over t, by size and length", text, rows, figure)


def _changes(found: list[dict], name: str, stage: str, kind: str) -> list[float]:
    """Change of the gap of a stage against the first network, one number for each seed."""
    return [row[kind] for one in found for row in one["stages"] if (row["name"], row["stage"]) == (name, stage)]


def _written(found: list[dict], name: str, stage: str) -> str:
    mean, error = mean_and_error(_changes(found, name, stage, "gap_change_share"))
    return f"{100 * mean:+.1f} ± {100 * error:.1f} %"
