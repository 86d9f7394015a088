"""The results of ``fm-stages profile`` in wandb: one run with numbers, curves, figures and the profiles as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import wandb

from fm_stages.oracle import THRESHOLDS, StageProfile
from fm_stages.studies.profile.study import Study
from fm_stages.studies.profile.text import comparison_table
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
            run.log({f"{prefix}stages/curves": wandb.Table(*_curves(profile))})
            suggestions = [[one.name, one.value, one.status, one.rule, one.yaml] for one in study.recommendations]
            fields: list[str | int] = ["setting", "value", "status", "rule", "yaml"]
            run.log({f"{prefix}stages/suggestions": wandb.Table(fields, suggestions)})
            folder = out / name if len(studies) > 1 else out
            for figure in sorted(folder.glob("*.png")):
                run.log({f"{prefix}stages/{figure.stem}": wandb.Image(str(figure))})
            artifact.add_file(str(folder / "profile.json"), f"{name}.json")
            artifact.add_file(str(folder / "study.json"), f"{name}-study.json")
        if len(studies) > 1:
            columns, rows = comparison_table(studies)
            run.log({"stages/comparison": wandb.Table([*columns], rows)})
            run.log({"stages/comparison_figure": wandb.Image(str(out / "comparison.png"))})
        run.log_artifact(artifact)


def _curves(profile: StageProfile) -> tuple[list[str | int], list[list[float]]]:
    """Columns and rows of the curves over t, each with its standard error."""
    columns = {"t": profile.t}
    for name, error in profile.sem.items():
        columns |= {name: getattr(profile, name), f"{name}_sem": error}
    if profile.guidance and profile.guidance_sem:
        columns |= {"guidance": profile.guidance, "guidance_sem": profile.guidance_sem}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]
