"""How the boundary moves with the number of training images, and with their size."""

from __future__ import annotations

import json

from findings.workshop import CONFIG, Finding, Workshop


def measure(workshop: Workshop) -> Finding:
    out = workshop.folder / "trends"
    workshop.run("profile", "--data", CONFIG, "--trends", "--out", out, unless=out / "trends.png")
    study = json.loads((out / "study.json").read_text())
    row_trend, dims = study["row_trend"], study["dim_trend"]
    rows = [
        {**{x: p[x] for x in ("kind", "num_rows", "num_dims", "boundary")}, "sem": p["time_sem"]["boundary"]}
        for p in [*row_trend["points"], *dims]
    ]
    of_dims = {}
    for point in dims:
        of_dims.setdefault(point["kind"], []).append(point)
    moved = "; ".join(
        f"{kind}, {points[0]['num_rows']} rows: "
        + ", ".join(f"{p['boundary']:.3f} ± {p['time_sem']['boundary']:.3f} (D = {p['num_dims']})" for p in points)
        for kind, points in of_dims.items()
    )
    text = f"""
The paper (arXiv 2512.02826) finds that more training images move the boundary later and more values per image earlier.
Here it moves by {2.302585 * row_trend["slope"]:+.3f} for ten times as many images of Fashion-MNIST (a line in ln N
through the larger half of the points). Over D: {moved}.

Seed 0; ± is a standard error over draws. Pooled images are means over squares of pixels: smaller images of the same
things, whose intrinsic dimension falls less than D.
"""
    return Finding("What moves the boundary", text, rows, out / "trends.png")
