"""How many of the solver's steps to spend early: the paper's Table 2 on our own data."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from findings.workshop import NUM_IMAGES, SEEDS, Finding, Workshop, difference, mean_and_error, suggestion, table
from fm_stages.flow import shift_for_share

SHIFTS = 0.15, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0
PAPERS_SHARE, PAPERS_SHIFT = 1 / 3, 2.0
"""Of the steps before twice the boundary, and what made them so many."""

NUM_STEPS = 10
"""Few, so that it matters where they are."""


def measure(workshop: Workshop) -> Finding:
    file = workshop.profile()
    boundary = json.loads(file.read_text())["boundary"]
    suggested = round(suggestion(file, "shift of the sampling grid")["shift"], 2)
    same_share = round(shift_for_share(PAPERS_SHARE, 2 * boundary), 2)
    rows, found = [], {}
    for shift in sorted({*SHIFTS, suggested, same_share}):
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
    mean, error = mean_and_error([a - b for a, b in zip(found[1.0], found[best["shift"]], strict=True)])
    verdict = "Against the paper, that is no more early steps than uniform ones."
    if best["shift"] > 1:
        verdict = "As there, that is more early steps than uniform ones"
        verdict += "." if mean > 2 * error else ", though the two are not told apart."
    text = f"""
The paper (arXiv 2512.02826, Table 2) finds on ImageNet latents that of its grids that with 34 % of the steps before
t = 0.2, twice the boundary there, is best; uniform steps spend 22 % there, as it counts them, and 72 % are far too
many. In our terms its best is a shift of {PAPERS_SHIFT:g}.

Here the best of the sweep is shift {best["shift"]:g}, with {best["twice"]:.0%} of the steps before twice the boundary
(t = {2 * boundary:.3f}): FID {best["fid"]:.2f} ± {best["sem"]:.2f}. {verdict} Against the best, paired by training seed
(less is better):

- uniform steps: {difference(found[1.0], found[best["shift"]])};
- the paper's shift, {PAPERS_SHIFT:g}: {difference(found[PAPERS_SHIFT], found[best["shift"]])};
- the paper's share, a third of the steps, which is shift {same_share:g} here:
  {difference(found[same_share], found[best["shift"]])};
- what `fm-stages profile` suggests, shift {own["shift"]:g}: {difference(found[own["shift"]], found[best["shift"]])}.

The suggestion of `fm-stages profile` was the paper's share until this sweep was made; it never goes below uniform steps
since then.

{table(rows, columns)}

{NUM_IMAGES} images of Fashion-MNIST at 28x28, {NUM_STEPS} Euler steps, no guidance; network `large`, {len(SEEDS)}
training seeds, ± is the standard error of their mean (bars are two). The paper's s is one over our shift.
"""
    return Finding("Where the solver's steps belong", text, rows, figure)


def share_before(t: float, shift: float) -> float:
    """Share of uniform steps that `fm_stages.flow.shift_time` takes below t."""
    return shift * t / (1 + (shift - 1) * t)
