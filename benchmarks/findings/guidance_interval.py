"""Where guidance helps: the paper's Table 3 on our own data."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from findings.workshop import NUM_IMAGES, SEEDS, Finding, Workshop, difference, mean_and_error, suggestion, table

SCALE, NUM_STEPS = 2.5, 10

NONE, EVERYWHERE = (0.0, 0.0), (0.0, 1.0)

Interval = tuple[float, float]


def intervals(profile: dict, suggested: Interval) -> list[Interval]:
    """None, everywhere, parts of the stages, unions of such parts, and the suggested one."""
    end, boundary = (round(profile[name], 3) for name in ("navigation_end", "boundary"))
    twice = round(2 * boundary, 3)
    parts = [(0.0, end), (end, boundary), (boundary, twice), (twice, 1.0)]
    unions = [(0.0, boundary), (0.0, twice), (end, twice), (boundary, 1.0)]
    return sorted({NONE, EVERYWHERE, *parts, *unions, suggested}, key=lambda one: (one[1] - one[0] > 0, one))


def measure(workshop: Workshop) -> Finding:
    file = workshop.profile()
    profile = json.loads(file.read_text())
    numbers = suggestion(file, "guidance interval")
    suggested = round(numbers["start"], 3), round(numbers["end"], 3)
    rows, found = [], {}
    for lo, hi in intervals(profile, suggested):
        guided = ["--guidance_scale", SCALE, "--guidance_interval", lo, hi] if hi > lo else []
        found[lo, hi] = fids = [
            workshop.fid(
                f"guidance_{lo:g}_{hi:g}_{seed}",
                "--ckpt", workshop.network("large", seed), "--num_steps", NUM_STEPS, *guided,
            )
            for seed in SEEDS
        ]  # fmt: skip
        mean, error = mean_and_error(fids)
        name = f"{lo:g} to {hi:g}" if guided else "none"
        rows.append({"interval": name, "lo": lo, "hi": hi, "fid": mean, "sem": error})
    best = min(rows, key=lambda row: row["fid"])
    own = next(row for row in rows if (row["lo"], row["hi"]) == suggested)
    figure = Figure(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        axes.plot([row["lo"], row["hi"]], [i, i], lw=5, solid_capstyle="butt", color="C2" if row is own else "C0")
        axes.text(1.02, i, f"{row['fid']:.2f} ± {row['sem']:.2f}", va="center", fontsize=8)
    axes.axvline(profile["boundary"], color="0.4", lw=0.8)
    axes.set_yticks(range(len(rows)), [row["interval"] for row in rows], fontsize=8)
    axes.set_xlim(0, 1.3)
    axes.set_xlabel("t between which there is guidance; at the right FID; line: boundary; green: suggested")
    first = best["lo"], best["hi"]
    beside = "and is what is suggested"
    if own is not best:
        beside = f"the suggested interval has {own['fid']:.2f} ± {own['sem']:.2f}, against the best "
        beside += difference(found[suggested], found[first])
    text = f"""
The paper (arXiv 2512.02826, Table 3) finds on ImageNet latents that guidance is best from the end of navigation into
the middle of refinement, [0.1, 0.6] at a boundary of 0.1, and better there than everywhere. `fm-stages profile` takes
over that rule: for these data, with the boundary at {profile["boundary"]:.3f}, it suggests "{own["interval"]}".

Here the best of the sweep is "{best["interval"]}" with FID {best["fid"]:.2f} ± {best["sem"]:.2f}, {beside}. Against
guidance everywhere the suggested one is {difference(found[suggested], found[EVERYWHERE])}, against none
{difference(found[suggested], found[NONE])} (paired by training seed, less is better).

{table(rows, {"guided for t in": "{interval}", "FID": "{fid:.2f} ± {sem:.2f}"})}

{NUM_IMAGES} images of Fashion-MNIST at 28x28, balanced classes, {NUM_STEPS} Euler steps, guidance scale {SCALE};
network `large`, {len(SEEDS)} training seeds, ± is the standard error of their mean. Navigation ends at
t = {profile["navigation_end"]:.3f}.
"""
    return Finding("Where guidance helps", text, rows, figure)
