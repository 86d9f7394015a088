"""What a person should hear of while a run goes on: a warning, and an alert of wandb."""

from __future__ import annotations

from functools import partial

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from fm_stages.training.logs.patience import call_logger

WAIT_SEC = 3600
"""wandb drops an alert that repeats a title sooner: it sends each by mail."""

MAX_TITLE = 63
"""Characters of a title that wandb takes."""


@rank_zero_only
def alert(trainer: L.Trainer, title: str, text: str) -> None:
    """Print a warning, and send it as an alert where the run logs to wandb (offline: when the run is synced).

    Args:
        trainer: of the run.
        title: a few words, the same whenever the alert is the same: wandb sends one title once an hour.
        text: what was found, and what to do about it.
    """
    rank_zero_warn(f"{title}: {text}")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            call_logger(logger, "alert", partial(_send, logger, title, text))


def _send(logger: WandbLogger, title: str, text: str) -> None:
    logger.experiment.alert(title=title[:MAX_TITLE], text=text, level="WARN", wait_duration=WAIT_SEC)
