"""A small and a large network before and after the split: the paper's Table 1 on our own data."""

from __future__ import annotations

import json
from itertools import product

from matplotlib.figure import Figure

from findings.workshop import NUM_IMAGES, SEEDS, STEPS, WIDTHS, Finding, Workshop, difference, mean_and_error, table

EARLY_STEPS = LATE_STEPS = 8

NAMES = "small", "large"


def measure(workshop: Workshop) -> Finding:
    boundary = json.loads(workshop.profile().read_text())["boundary"]
    splits = {"boundary": boundary, "2 x boundary": 2 * boundary}
    found, rows = {}, []
    for (of, split), early, late in product(splits.items(), NAMES, NAMES):
        fids = [
            workshop.fid(
                f"capacity_{split:.3f}_{early}_{late}_{seed}",
                "--expert", workshop.network(early, seed), "--expert", workshop.network(late, seed),
                "--split", f"{split:.3f}", "--navigation_share", 0.5, "--num_steps", EARLY_STEPS + LATE_STEPS,
            )
            for seed in SEEDS
        ]  # fmt: skip
        found[of, early, late] = fids
        mean, error = mean_and_error(fids)
        rows.append({"split": f"{split:.3f}", "of": of, "before": early, "after": late, "fid": mean, "sem": error})
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, of in enumerate(splits):
        mine = [row for row in rows if row["of"] == of]
        places = [k + 0.4 * i - 0.2 for k in range(len(mine))]
        heights, errors = ([row[name] for row in mine] for name in ("fid", "sem"))
        axes.bar(places, heights, 0.36, yerr=errors, label=f"split at t = {mine[0]['split']} ({of})")
    axes.set_xticks(range(4), [f"{early},\nthen {late}" for early, late in product(NAMES, NAMES)])
    axes.set_ylabel(f"FID of {NUM_IMAGES} images")
    axes.legend(fontsize=8)
    gains = [
        {
            "split": f"{split:.3f} ({of})",
            "early": difference(found[of, "large", "small"], found[of, "small", "small"]),
            "late": difference(found[of, "small", "large"], found[of, "small", "small"]),
            "both": difference(found[of, "large", "large"], found[of, "small", "small"]),
        }
        for of, split in splits.items()
    ]
    verdicts = [
        f"at {of} more is won "
        + (
            "after it, as there"
            if sum(found[of, "small", "large"]) < sum(found[of, "large", "small"])
            else "before it, **against** the paper"
        )
        for of in splits
    ]
    heads = {
        "split": "{split}",
        "large network before it": "{early}",
        "large network after it": "{late}",
        "both": "{both}",
    }
    text = f"""
The paper (arXiv 2512.02826, Table 1) finds on ImageNet latents that a small network is enough before the split, and
that capacity counts after it: of the distance between its two networks, the large one after the split wins nearly all.
Here, FID against that of the small network on both sides, paired by training seed (less is better):

{table(gains, heads)}

With the split {"; ".join(verdicts)}.

{table(rows, {"split": "{split} ({of})", "before": "{before}", "after": "{after}", "FID": "{fid:.2f} ± {sem:.2f}"})}

{NUM_IMAGES} images of Fashion-MNIST at 28x28, {EARLY_STEPS} Euler steps before and {LATE_STEPS} after the split, no
guidance. Networks of {" and ".join(f"{WIDTHS[name]} channels ({name})" for name in NAMES)}, each trained on all t for
{STEPS} steps; {len(SEEDS)} training seeds, ± is the standard error of their mean. FID by features of our own
classifier: to be compared with nothing but itself.
"""
    return Finding("Which stage needs the capacity?", text, rows, figure)
