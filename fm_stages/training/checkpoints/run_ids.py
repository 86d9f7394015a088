"""One id for one run, however often it is started: of its checkpoints, and of its run at wandb."""

from __future__ import annotations

import secrets
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fm_stages.data import whole_file
from fm_stages.training.logs.loggers import is_trial, run_folder

FILE = "run_id.txt"
"""In the run's folder."""


def new_id() -> str:
    """Eight digits, as wandb draws them."""
    return secrets.token_hex(4)


def kept_id(folder: Path) -> str | None:
    """The id of the run that a folder is of, if it is written down there."""
    file = folder / FILE
    return (file.read_text().strip() or None) if file.is_file() else None


def name_at_wandb(trainer: L.Trainer, run_id: str) -> None:
    """Give wandb the run's id, unless it was given one.

    wandb is then asked to resume="allow", as Lightning does: it makes the run, or goes on with it.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger.version is None:
            logger._id = logger._wandb_init["id"] = run_id
            return  # two loggers are two runs


@rank_zero_only
def keep_id(trainer: L.Trainer, run_id: str) -> None:
    """Write the id down."""
    if not is_trial(trainer):
        with whole_file(run_folder(trainer) / FILE) as part:
            part.write_text(f"{run_id}\n")
