"""The summary run of a comparison in wandb, in the group of its runs."""

from __future__ import annotations

from pathlib import Path

import wandb

from fm_stages.studies.compare.comparison import COLUMNS, Comparison
from fm_stages.studies.compare.statistics import mean_of
from fm_stages.training import choose_wandb_mode


def log_comparison(comparison: Comparison, project: str, out: Path) -> None:
    """Log means, paired differences and figures; offline unless there is a login and a network.

    Args:
        comparison: with its report written.
        project: wandb's.
        out: folder of the results.
    """
    choose_wandb_mode()
    config = {"arms": list(comparison.arms), "seeds": list(comparison.seeds), "reference": comparison.reference}
    with wandb.init(
        project=project, group=comparison.name, job_type="summary", name="summary", dir=out, config=config
    ) as run:
        means = {
            arm: [mean_of(list(comparison.values(arm, name).values())) for name in COLUMNS] for arm in comparison.arms
        }
        table = wandb.Table(["arm", *COLUMNS], [[arm, *values] for arm, values in means.items()])
        run.log({"comparison/means": table})
        rows = [
            [arm, metric, pair.mean, pair.low, pair.high, pair.smallest, pair.num_seeds, pair.shown]
            for arm, pairs in comparison.differences().items()
            for metric, pair in pairs.items()
        ]
        head: list[str | int] = ["arm", "number", "difference", "low", "high", "could_show", "seeds", "shown"]
        run.log({"comparison/differences": wandb.Table(head, rows)})
        for figure in ("gap_by_t", "differences", "progress"):
            run.log({f"comparison/{figure}_figure": wandb.Image(str(out / f"{figure}.png"))})
        for arm, values in means.items():
            run.summary.update({f"{arm}/{name}": x for name, x in zip(COLUMNS, values, strict=True)})
