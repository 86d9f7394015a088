"""The oracle until tau and the model after it, and the other way round."""

from __future__ import annotations

import json
from math import sqrt

from findings.workshop import STEPS, Finding, Workshop, table

NUM = 256
TAUS = 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9
ORACLE_FIRST, MODEL_FIRST = "oracle first", "model first"


def measure(workshop: Workshop) -> Finding:
    out, profile = workshop.folder / "handover", json.loads(workshop.profile().read_text())
    checkpoint = workshop.network("large")
    workshop.run(
        "handover", "--ckpt", checkpoint, "--num", NUM, "--taus", *TAUS, "--out", out, unless=out / "handover.png"
    )
    rows = json.loads((out / "handover.json").read_text())["closeness"]
    found = {(row["order"], row["tau"]): row for row in rows}
    listed = [
        {
            "tau": tau,
            "memorized": share(found[ORACLE_FIRST, tau]["memorized"]),
            "kept": share(found[ORACLE_FIRST, tau]["as_oracle"]),
            "turned": share(found[MODEL_FIRST, tau]["as_oracle"]),
        }
        for tau in TAUS
    ]
    columns = {
        "tau": "{tau:.1f}",
        "oracle first: memorized": "{memorized}",
        "oracle first: nearest to the oracle's own training image": "{kept}",
        "model first: nearest to the oracle's own training image": "{turned}",
    }
    half = next((tau for tau in TAUS if found[ORACLE_FIRST, tau]["as_oracle"] >= 0.5), None)
    when = "at none of these tau"
    if half is not None:
        when = f"from tau = {half:g} on, {half / profile['boundary']:.1f} times the boundary"
    text = f"""
From the same {NUM} noises the oracle draws until tau and the model after it, and the other way round. The oracle alone
ends on a training image. The paper (arXiv 2512.02826) finds on ImageNet latents, where the boundary is at 0.1, that a
hand-over up to tau = 0.2 gives new images and later ones nearly the training image: the model's turn lags the
objective's by a factor of two.

Here the boundary of the data is at t = {profile["boundary"]:.3f}. At least half of the model's images are nearest to
the training image that the oracle would have ended on {when}.

{table(listed, columns)}

± is the standard error of a share of {NUM}; of none or all of them no more is known than that the true share is within
{300 / NUM:.1f} % of it (95 %). Network `large` of seed 0 after {STEPS} steps, averaged weights, 50 Euler
steps. A sample counts as memorized where its nearest training image is three times nearer than the second nearest.
"""
    return Finding("Who draws before tau, and who after it", text, rows, out / "handover.png")


def share(p: float) -> str:
    """In per cent, with its standard error."""
    return f"{100 * p:.0f} %" if p in (0, 1) else f"{100 * p:.0f} ± {100 * sqrt(p * (1 - p) / NUM):.0f} %"
