"""How many of the solver's steps to spend early: the paper's Table 2 on our own data."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from findings.workshop import NUM_IMAGES, SEEDS, Finding, Workshop, difference, mean_and_error, suggestion, table

SHIFTS = 0.15, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0
NUM_STEPS = 10
"""Few, so that it matters where they are."""


def measure(workshop: Workshop) -> Finding:
    file = workshop.profile()
    boundary = json.loads(file.read_text())["boundary"]
    suggested = round(suggestion(file, "shift of the sampling grid")["shift"], 3)
    rows, found = [], {}
    for shift in sorted({*SHIFTS, suggested}):
        found[shift] = fids = [
            workshop.fid(
                f"shift_{shift:g}_{seed}",
                "--ckpt", workshop.network("large", seed), "--num_steps", NUM_STEPS, "--shift", f"{shift:g}",
            )
            for seed in SEEDS
        ]  # fmt: skip
        mean, error = mean_and_error(fids)
        shares = {"boundary": share_before(boundary, shift), "twice": share_before(2 * boundary, shift)}
        rows.append({"shift": shift, **shares, "fid": mean, "sem": error, "suggested": shift == suggested})
    best = min(rows, key=lambda row: row["fid"])
    own = next(row for row in rows if row["suggested"])
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar([r["twice"] for r in rows], [r["fid"] for r in rows], [2 * r["sem"] for r in rows], marker="o", ms=4)
    for row in rows:
        axes.annotate(f"{row['shift']:g}", (row["twice"], row["fid"]), (3, 6), textcoords="offset points", fontsize=8)
    axes.axvline(own["twice"], color="C2", ls="--", lw=1, label="what fm-stages profile suggests")
    axes.set_xlabel(f"share of steps before t = {2 * boundary:.3f}, twice the boundary   (numbers: the shift)")
    axes.set_ylabel(f"FID of {NUM_IMAGES} images")
    axes.legend(fontsize=8)
    columns = {
        "shift": "{shift:g}",
        "steps before the boundary": "{boundary:.0%}",
        "before twice the boundary": "{twice:.0%}",
        "FID": "{fid:.2f} ± {sem:.2f}",
    }
    text = f"""
The paper (arXiv 2512.02826, Table 2) finds on ImageNet latents that the best grid spends 34 % of its steps before
t = 0.2, twice the boundary there; uniform steps spend 22 % (as it counts them), 72 % are far too many. `fm-stages
profile` takes over that share: for these data it suggests a shift of {own["shift"]:g}.

Here the best of the sweep is shift {best["shift"]:g}, with {best["twice"]:.0%} of the steps before twice the boundary
(t = {2 * boundary:.3f}): FID {best["fid"]:.2f} ± {best["sem"]:.2f}. The suggested shift has {own["fid"]:.2f} ±
{own["sem"]:.2f}; against the best that is {difference(found[own["shift"]], found[best["shift"]])}, against uniform
steps {difference(found[own["shift"]], found[1.0])} (paired by training seed, less is better).

{table(rows, columns)}

{NUM_IMAGES} images of Fashion-MNIST at 28x28, {NUM_STEPS} Euler steps, no guidance; network `large`, {len(SEEDS)}
training seeds, ± is the standard error of their mean (bars are two). The paper's s is one over our shift.
"""
    return Finding("Where the solver's steps belong", text, rows, figure)


def share_before(t: float, shift: float) -> float:
    """Share of uniform steps that `fm_stages.flow.shift_time` takes below t."""
    return shift * t / (1 + (shift - 1) * t)
