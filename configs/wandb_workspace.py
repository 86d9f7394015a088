"""Saves a workspace of wandb whose panels are grouped by stage; runs that log to the project then show in it.

    pip install wandb-workspaces
    python configs/wandb_workspace.py ENTITY [PROJECT]    # PROJECT is fm-stages unless told otherwise

needs an account and a network. Without them `wandb leet` shows the numbers of a run's folder. What a run does not
measure (averaged weights with ema_decay 0, a density that nothing steers) stays an empty panel.
"""

from __future__ import annotations

import sys
from typing import Any

BOTH = ("", "_ema")
"""Raw and averaged weights."""


def both(*names: str) -> list[str]:
    """Names of raw and averaged weights."""
    return [f"{name}{suffix}" for name in names for suffix in BOTH]


LINES: dict[str, dict[str, list[str]]] = {
    "Navigation": {
        "gap before the boundary": ["oracle/gap_navigation", *both("oracle_val/gap_navigation")],
        "way from the best linear model to the oracle": ["oracle/closed", *both("oracle_val/closed")],
        "regular loss before the boundary, and its floor": [
            *both("oracle_train/regular_navigation", "oracle_val/regular_navigation"),
            "stages/floor_navigation",
        ],
    },
    "Refinement": {
        "regular loss past the boundary": both("oracle_train/regular_refinement", "oracle_val/regular_refinement"),
        "gap past the boundary, training batches": ["oracle/gap_refinement"],
    },
    "Stages": {
        "what the loss is made of": ["oracle/regular", "oracle/gap", "oracle/floor"],
        "objective": ["train/loss", *both("val/loss")],
        "where the stages lie": ["stages/navigation_end", "stages/boundary", "stages/refinement_complete"],
        "shift of the density of t": ["stages/shift"],
        "gradients: conditional over oracle target": [
            "stages/gradient_ratio_navigation",
            "stages/gradient_ratio_refinement",
        ],
        "posterior": ["oracle/top1", "oracle/ess"],
        "health: z of the identity": ["oracle/identity_z"],
    },
    "Memorization": {
        "held-out minus training loss, refinement": both("memorization/excess_refinement"),
        "held-out minus training loss, navigation": both("memorization/excess_navigation"),
        "standard errors of both": both("memorization/excess_refinement_sem", "memorization/excess_navigation_sem"),
        "step of the best validation": both("memorization/best_step"),
    },
    "Speed": {
        "images per second": ["speed/images_per_sec"],
        "time between batches, and the oracle's": ["speed/data_wait", "oracle/share"],
        "memory": ["speed/memory_bytes"],
        "learning rate": ["train/learning_rate"],
    },
}
"""Line charts over steps: section, title, names."""

PICTURES: dict[str, list[str]] = {
    "Stages": [
        "oracle/gap_by_t_figure",
        "oracle/gap_over_steps_figure",
        "stages/density_figure",
        "stages/gradient_variance_figure",
    ],
    "Memorization": ["memorization/regular_by_stage_figure", "memorization/regular_by_t_figure"],
    "Samples": ["samples/raw", "samples/ema", "samples/predictions"],
}
"""Pictures: section, names."""

SECTIONS = ("Navigation", "Refinement", "Stages", "Memorization", "Samples", "Speed")


def names() -> set[str]:
    """All that is shown, by logged name."""
    charts = [y for section in LINES.values() for y in section.values()]
    return {name for part in [*charts, *PICTURES.values()] for name in part}


def build(entity: str, project: str) -> Any:
    """The workspace, not yet saved."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for name in SECTIONS:
        charts: list[Any] = [
            panels.LinePlot(title=title, x="trainer/global_step", y=y, title_x="step", log_y="gap" in title)
            for title, y in LINES.get(name, {}).items()
        ]
        charts += [panels.MediaBrowser(title=key, media_keys=[key]) for key in PICTURES.get(name, [])]
        sections.append(workspaces.Section(name=name, panels=charts, is_open=True))
    return workspaces.Workspace(entity=entity, project=project, name="fm-stages: by stage", sections=sections)


def main() -> None:
    """Build it, save it, say where it is."""
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    workspace = build(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else "fm-stages")
    workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    main()
