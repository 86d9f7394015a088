"""The results of ``fm-stages evaluate`` in wandb: one run with numbers, table, figures and the report as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from fm_stages.studies.evaluate.memorization import numbers_of
from fm_stages.studies.evaluate.report import table_of
from fm_stages.training import choose_wandb_mode


def log_report(report: dict[str, Any], files: Sequence[Path], project: str, out: Path) -> None:
    """Log it; offline unless there is a login and a network.

    Args:
        report: the whole of it.
        files: that it was written to.
        project: wandb's.
        out: folder of the report; wandb's own files go there, too.
    """
    print(f"wandb: {choose_wandb_mode()}")
    config = {name: report[name] for name in ("samples", "reference", "features", "metrics", "versions")}
    with wandb.init(project=project, job_type="evaluate", dir=out, config=config) as run:
        run.summary.update({f"quality/{name}": value for name, value in report["scores"].items()})
        run.summary.update({f"quality_real/{name}": value for name, value in report["yardstick"].items()})
        found = numbers_of(report.get("memorization") or {})
        run.summary.update({f"memorization/{name}": value for name, value in found.items()})
        columns, rows = table_of(report)
        run.log({"quality/table": wandb.Table([column or "number" for column in columns], rows)})
        artifact = wandb.Artifact("evaluation", type="evaluation")
        for file in files:
            if file.suffix == ".png":
                run.log({f"quality/{file.stem}_figure": wandb.Image(str(file))})
            artifact.add_file(str(file))
        run.log_artifact(artifact)
