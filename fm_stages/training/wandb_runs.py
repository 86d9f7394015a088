"""One run of wandb for one run here, however often it is started."""

from __future__ import annotations

import secrets
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fm_stages.data import whole_file
from fm_stages.training.loggers import is_trial, run_folder

FILE = "wandb_run.txt"
"""In the run's folder: the id of its run at wandb."""


def choose_run(trainer: L.Trainer, goes_on: bool) -> None:
    """Give wandb the id that the run's folder has if it is gone on with, or else a new one; one that is set stays.

    wandb is then asked to resume="allow", as Lightning does: it makes the run, or goes on with it.
    """
    file = run_folder(trainer) / FILE
    for logger in _loggers(trainer):
        if logger.version is None:
            known = goes_on and file.is_file()
            logger._id = logger._wandb_init["id"] = file.read_text().strip() if known else secrets.token_hex(4)


@rank_zero_only
def keep_run(trainer: L.Trainer) -> None:
    """Write the id down."""
    for logger in _loggers(trainer):
        if not is_trial(trainer) and logger.version:
            with whole_file(Path(run_folder(trainer)) / FILE) as part:
                part.write_text(f"{logger.version}\n")


def _loggers(trainer: L.Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)][:1]
