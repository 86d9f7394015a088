"""The results of ``fm-stages profile`` in wandb: one run with numbers, curves, figures and the profiles as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import wandb

from fm_stages.oracle import THRESHOLDS
from fm_stages.studies.study import Study
from fm_stages.training import choose_wandb_mode


def log_studies(studies: Sequence[Study], project: str, out: Path) -> None:
    """Log them; offline unless there is a login and a network.

    Args:
        studies: with their files written.
        project: wandb's.
        out: folder of the results; wandb's own files go there, too.
    """
    print(f"wandb: {choose_wandb_mode()}")
    config = {s.source.name: {"num_rows": s.profile.num_rows, "path": s.profile.path} for s in studies}
    with wandb.init(project=project, job_type="profile", dir=out, config=config) as run:
        artifact = wandb.Artifact("stage-profile", type="stage-profile")
        for study in studies:
            name, profile = study.source.name, study.profile
            prefix = f"{name}/" if len(studies) > 1 else ""
            run.summary.update({f"{prefix}stages/{key}": getattr(profile, key) for key in THRESHOLDS})
            curves = [[profile.t[i], profile.top1[i], profile.ess[i], profile.floor[i]] for i in range(len(profile.t))]
            run.log({f"{prefix}stages/curves": wandb.Table(columns=["t", "top1", "ess", "floor"], data=curves)})
            suggestions = [[one.name, one.value, one.status, one.rule, one.yaml] for one in study.recommendations]
            columns: list[str | int] = ["setting", "value", "status", "rule", "yaml"]
            run.log({f"{prefix}stages/suggestions": wandb.Table(columns=columns, data=suggestions)})
            folder = out / name if len(studies) > 1 else out
            for figure in sorted(folder.glob("*.png")):
                run.log({f"{prefix}stages/{figure.stem}": wandb.Image(str(figure))})
            artifact.add_file(str(folder / "profile.json"), f"{name}.json")
        run.log_artifact(artifact)
