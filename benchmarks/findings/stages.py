"""Where the stages lie in real data, with and without labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_sample_images

from findings.workshop import CONFIG, Finding, Workshop, table

SIDE, STRIDE = 16, 8
"""Of the patches cut from photographs, in pixels."""

KINDS = "unconditional", "conditional"


def photographs(folder: Path) -> Path:
    """Patches of the two photographs that come with scikit-learn, (N, 3, 16, 16) in [-1, 1]: natural images."""
    file = folder / "photographs.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        cut = [
            image[row : row + SIDE, column : column + SIDE]
            for image in load_sample_images().images
            for row in range(0, image.shape[0] - SIDE + 1, STRIDE)
            for column in range(0, image.shape[1] - SIDE + 1, STRIDE)
        ]
        np.save(file, (np.stack(cut).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))
    return file


def measure(workshop: Workshop) -> Finding:
    out = workshop.folder / "stages"
    data = {
        "digits": "configs/digits_dit.yaml",
        "fashion_28": CONFIG,
        "fashion_14": "configs/fashion_mnist_14_dit.yaml",
        "photographs": photographs(workshop.folder),
    }
    named = [f"{name}={place}" for name, place in data.items()]
    workshop.run("profile", "--data", *named, "--out", out, unless=out / "comparison.png")
    curves, boundaries = [], []
    for name in data:
        profile = json.loads((out / name / "profile.json").read_text())
        size = {"data": name, "rows": profile["num_rows"], "values": profile["num_dims"]}
        for kind in KINDS:
            found = profile[kind] or (profile if kind == "unconditional" else None)  # data without labels has one kind
            if found is None:
                continue
            for i, t in enumerate(profile["t"]):
                numbers = {x: found[x][i] for x in ("top1", "ess", "floor")}
                errors = {f"{x}_sem": found["sem"][x][i] for x in ("top1", "floor")}
                curves.append({**size, "kind": kind, "t": t, **numbers, **errors})
            times = {x: found[x] for x in ("navigation_end", "boundary", "refinement_complete")}
            boundaries.append({**size, "kind": kind, **times, **{f"{x}_sem": found["time_sem"][x] for x in times}})
    columns = {"data": "{data}", "rows x values": "{rows} x {values}", "kind": "{kind}"}
    for name in ("navigation_end", "boundary", "refinement_complete"):
        columns[name.replace("_", " ")] = f"{{{name}:.3f}} ± {{{name}_sem:.3f}}"
    apart = {}
    for row in boundaries:
        apart.setdefault(row["data"], []).append(row["boundary"])
    shifts = [f"{pair[0] - pair[1]:+.3f} ({name})" for name, pair in apart.items() if len(pair) == 2]
    text = f"""
In every data set the posterior over the training images goes from many of them to one, within a short stretch of t:
*navigation* before it, *refinement* after it. Knowing the label moves the boundary towards noise, by
{", ".join(shifts)}: fewer images remain to choose between.

{table(boundaries, columns)}

1024 draws for each time, seed 0; ± is a standard error over draws (bootstrap). `photographs` are the
{next(r["rows"] for r in boundaries if r["data"] == "photographs")} patches of {SIDE}x{SIDE} pixels, {STRIDE} apart, of
the two photographs that come with scikit-learn: neighbours overlap by half, which moves their boundary towards data.
"""
    return Finding("Two stages", text, curves, out / "comparison.png")
