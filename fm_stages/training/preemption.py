"""Pre-emption: on SIGTERM or SIGUSR1 all ranks write one checkpoint after the same whole step, and the run ends."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.training.checkpoints import Checkpoints
from fm_stages.training.loggers import is_trial, run_folder

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What SLURM sends before it takes the nodes, and what torchrun hands on when it is stopped."""

MARKER = "preempted.txt"
"""A file in the run's folder while the run waits to be resumed: torchrun hides the status of its ranks."""


class Preempted(SystemExit):
    """The run was asked to end early and can be resumed. The status is EX_TEMPFAIL of sysexits.h: "retry later"."""

    STATUS = 75

    def __init__(self) -> None:
        super().__init__(self.STATUS)


class Preemption(Checkpoint):
    """Ends a run that was sent one of `SIGNALS`, on any rank, at the next whole optimizer step.

    The handler sets a flag and no more. Lightning's own would save, or broadcast, in the middle of a step. Before the
    Trainer runs there is nothing to save, and a signal ends the process as it would anyway.

    A `Checkpoint` in Lightning's sense comes after all other callbacks: what they counted in this step is in the file.

    Args:
        checkpoints: writes last.ckpt.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._received = ""
        self._step = 0
        self._ending = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it sets just before and takes away at any end of the run."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where there was no sanity check; and this run waits no longer."""
        self._listen()
        self._step = trainer.global_step
        if trainer.is_global_zero and not is_trial(trainer):
            self._marker(trainer).unlink(missing_ok=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a whole step: ask all ranks, which costs one small collective beside the one that Lightning makes."""
        if trainer.global_step == self._step:
            return  # gradients of a part of a batch are in no checkpoint
        self._step = trainer.global_step
        if self._step == trainer.max_steps:
            return  # the run ends by itself
        self._ending = trainer.strategy.reduce_boolean_decision(bool(self._received), all=False)
        if self._ending:
            self._checkpoints.write_last(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """End here, where the numbers of the last step have been logged."""
        self._end(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Or before a validation, for which there is no time."""
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        """End the run if that was decided.

        Raises:
            Preempted: on all ranks.
        """
        if not self._ending:
            return
        if trainer.is_global_zero and not is_trial(trainer):
            self._marker(trainer).write_text(f"Stopped after step {self._step}; --ckpt_path last goes on from there.\n")
        trainer.strategy.barrier()  # nobody leaves, and has the others killed, before that is written
        rank_zero_info(
            f"\n{self._received or 'A signal to another rank'}: stopped after step {self._step}. The same command with "
            f"--ckpt_path last goes on from {self._checkpoints.last_model_path}."
        )
        raise Preempted

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def _marker(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / MARKER
