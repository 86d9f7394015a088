"""Where the stages lie in real data, with and without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

from findings.workshop import CONFIG, Finding, Workshop, table

SIDE, STRIDE = 16, 8
"""Of the patches cut from photographs, in pixels."""

KINDS = "unconditional", "conditional"

NUM_DRAWS = 1024
"""Of each time: what ``fm-stages profile`` takes."""


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
                errors = {f"{x}_sem": found["sem"][x][i] for x in ("top1", "ess", "floor")}
                curves.append({**size, "kind": kind, "t": t, **numbers, **errors})
            times = {x: found[x] for x in ("navigation_end", "boundary", "refinement_complete")}
            boundaries.append({**size, "kind": kind, **times, **{f"{x}_sem": found["time_sem"][x] for x in times}})
    columns = {"data": "{data}", "rows x values": "{rows} x {values}", "kind": "{kind}"}
    for name in ("navigation_end", "boundary", "refinement_complete"):
        columns[name.replace("_", " ")] = f"{{{name}:.3f}} ± {{{name}_sem:.3f}}"
    moved = {}
    for row in boundaries:
        moved.setdefault(row["data"], []).append((row["boundary"], row["boundary_sem"]))
    shifts = [
        f"{label[0] - none[0]:+.3f} ± {(label[1] ** 2 + none[1] ** 2) ** 0.5:.3f} ({name})"
        for name, (none, *labels) in moved.items()
        for label in labels
    ]
    num = next(row["rows"] for row in boundaries if row["data"] == "photographs")
    text = f"""
With growing t the posterior over the training images goes from many of them to one: *navigation* before the boundary,
where the median largest weight reaches one half, *refinement* after it. Knowing the label leaves fewer images to choose
between: it moves the boundary by {", ".join(shifts)}.

{table(boundaries, columns)}

The paper (arXiv 2512.02826) has the boundary of ImageNet latents near t = 0.1, conditional on the class.
[How it moves](trends.md) with the number of images and of their values.

{NUM_DRAWS} draws for each time, seed 0; ± is a standard error over draws (bootstrap), bands are two. `photographs` are
the {num} patches of {SIDE}x{SIDE} pixels, {STRIDE} apart, of the two photographs that come with scikit-learn.
Neighbours overlap by half, and patches of sky are nearly equal.
"""
    return Finding("Two stages", text, curves, draw(curves))


def draw(curves: list[dict[str, Any]]) -> Figure:
    """Mean largest weight and median effective number of images over t; dashed: conditional on the class."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["data"] for row in curves))
    for axes, key, text in zip(
        figure.subplots(1, 2),
        ("top1", "ess"),
        ("largest posterior weight (mean)", "effective number of images (median)"),
        strict=True,
    ):
        for i, name in enumerate(names):
            for kind, line in zip(KINDS, ("-", "--"), strict=True):
                rows = [row for row in curves if (row["data"], row["kind"]) == (name, kind)]
                if not rows:
                    continue
                t, mean, error = (np.array([row[x] for row in rows]) for x in ("t", key, f"{key}_sem"))
                axes.plot(t, mean, color=f"C{i}", ls=line, lw=1.4, label=f"{name}, {kind}")
                axes.fill_between(t, mean - 2 * error, mean + 2 * error, color=f"C{i}", alpha=0.12, lw=0)
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("t   (0 is noise, 1 is data)")
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.9)
    axes.legend(fontsize=8)
    return figure
