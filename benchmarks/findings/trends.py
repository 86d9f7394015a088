"""How the boundary moves with the number of training images, and with their size."""

from __future__ import annotations

import json
from math import log, log10

from findings.workshop import CONFIG, Finding, Workshop, table


def measure(workshop: Workshop) -> Finding:
    out = workshop.folder / "trends"
    workshop.run("profile", "--data", CONFIG, "--trends", "--out", out, unless=out / "trends.png")
    study = json.loads((out / "study.json").read_text())
    slope, points = study["row_trend"]["slope"], study["row_trend"]["points"]
    rows = [
        {**{x: p[x] for x in ("kind", "num_rows", "num_dims", "boundary")}, "sem": p["time_sem"]["boundary"]}
        for p in [*points, *study["dim_trend"]]
    ]
    fitted = points[: max(2, (len(points) + 1) // 2)]
    ends = []
    for kind in dict.fromkeys(point["kind"] for point in study["dim_trend"]):
        of = sorted((p for p in study["dim_trend"] if p["kind"] == kind), key=lambda p: p["num_dims"])
        ends.append(f"{kind}: {of[0]['boundary']:.3f} at D = {of[0]['num_dims']}, ")
        ends[-1] += f"{of[-1]['boundary']:.3f} at D = {of[-1]['num_dims']}"
    columns = {
        "data": "{kind}",
        "rows N": "{num_rows}",
        "values D": "{num_dims}",
        "boundary": "{boundary:.3f} ± {sem:.3f}",
    }
    text = f"""
The paper (arXiv 2512.02826) finds that more training images move the boundary later and more values per image earlier.
Here ten times as many images of Fashion-MNIST move it by {slope * log(10):+.3f} ± {slope_error(fitted):.3f} (a line in
the logarithm of N through the {len(fitted)} larger banks). Between the fewest and the most values it moves
({"; ".join(ends)}).

{table(rows, columns)}

Seed 0; ± is a standard error over 512 draws. Rows are halves, quarters and so on of the training set, for the mix of
labels that a network sees; the others are without labels. Pooled images are means over squares of pixels: smaller
images of the same things, whose intrinsic dimension falls less than D.
"""
    return Finding("What moves the boundary", text, rows, out / "trends.png")


def slope_error(points: list[dict]) -> float:
    """Standard error of the slope in log10 N of a line through boundaries with known errors."""
    weights = [point["time_sem"]["boundary"] ** -2 for point in points]
    x = [log10(point["num_rows"]) for point in points]
    centre = sum(w * value for w, value in zip(weights, x, strict=True)) / sum(weights)
    return sum(w * (value - centre) ** 2 for w, value in zip(weights, x, strict=True)) ** -0.5
