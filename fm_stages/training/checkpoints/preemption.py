"""Pre-emption: on SIGTERM, SIGUSR1 or Ctrl-C all ranks write one checkpoint of the same step, and the run ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.training.checkpoints.callback import Checkpoints
from fm_stages.training.logs.loggers import dispensable, is_trial, run_folder
from fm_stages.training.ranks import gather

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What SLURM sends before it takes the nodes, what torchrun hands on when it is stopped, and Ctrl-C."""

SAME_SEC = 1.0
"""Seconds in which Ctrl-C counts once: the terminal sends it to all processes, and torchrun to its ranks again."""

TOLD = b"\nCtrl-C: the run ends after this step, with a checkpoint. Once more: at once, without.\n"
TOLD_TRIAL = b"\nCtrl-C: the rehearsal ends after this step, without a checkpoint. Once more: at once.\n"
TOLD_BEFORE = b"\nCtrl-C: the run ends; it was not training.\n"

MARKER = "preempted.txt"
"""A file in the run's folder while the run waits to be resumed: torchrun hides the status of its ranks."""


class Preempted(SystemExit):
    """The run was asked to end early and can be resumed.

    The status is EX_TEMPFAIL of sysexits.h, "retry later"; after Ctrl-C it is what a shell makes of that, so that
    nothing starts it again which a person has just stopped.
    """

    STATUS, INTERRUPTED = 75, 130

    def __init__(self, interrupted: bool = False) -> None:
        super().__init__(self.INTERRUPTED if interrupted else self.STATUS)


@contextmanager
def listening(trainer: L.Trainer) -> Iterator[None]:
    """Let signals end a run that does not train yet, or not just now; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Preemption):
            callback.listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


class Preemption(Checkpoint):
    """Ends a run that was sent one of `SIGNALS`, on any rank, at the next whole optimizer step.

    The handler sets a flag and no more. Lightning's own would save, or broadcast, in the middle of a step. A validation
    is left after its current batch, and done again when the run goes on. Before training there is nothing to save, and
    a signal ends the process at once; so does a second Ctrl-C.

    A `Checkpoint` in Lightning's sense comes after all other callbacks: what they counted in this step is in the file.

    Args:
        checkpoints: writes last.ckpt.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._received = ""
        self._interrupted: float | None = None
        self._process = os.getpid()
        self._step = 0
        self._training = self._ending = self._alike = self._trial = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the place of Lightning's handler, which it sets just before and takes away at any end of the run."""
        self.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same where there was no sanity check; and this run waits no longer."""
        self.listen()
        self._training, self._trial = True, is_trial(trainer)
        self._step = trainer.global_step
        if trainer.is_global_zero and not self._trial:
            self._marker(trainer).unlink(missing_ok=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a whole step: ask all ranks, which costs one small collective beside the one that Lightning makes."""
        if trainer.global_step == self._step:
            return  # gradients of a part of a batch are in no checkpoint
        self._step = trainer.global_step
        if self._step == trainer.max_steps:
            return  # the run ends by itself
        if self._ask(trainer):
            self._checkpoints.write_last(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """End here, where the numbers of the last step have been logged."""
        self._end(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Or before a validation, for which there is no time; one that can be left has as many batches on each rank."""
        self._end(trainer)
        if self._training:
            counts = gather(list(trainer.num_val_batches))
            self._alike = all(count == counts[0] for count in counts)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Or inside one: the checkpoint says that it is due."""
        whole = trainer.global_step == self._step and not trainer.fit_loop.epoch_loop._should_accumulate()
        whole = whole and self._step != trainer.max_steps  # a run that is found at its end does not validate
        if self._training and self._alike and whole and self._ask(trainer):
            self._checkpoints.write_last(trainer)
            self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """From here on a signal ends the process."""
        self._training = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The same."""
        self._training = False

    def _ask(self, trainer: L.Trainer) -> bool:
        """Whether any rank was sent a signal."""
        self._ending = trainer.strategy.reduce_boolean_decision(bool(self._received), all=False)
        return self._ending

    def _end(self, trainer: L.Trainer) -> None:
        """End the run if that was decided.

        Raises:
            Preempted: on all ranks.
        """
        if not self._ending:
            return
        if trainer.is_global_zero and not is_trial(trainer):
            with dispensable(trainer, MARKER):
                text = f"Stopped after step {self._step}; --ckpt_path last goes on from there.\n"
                self._marker(trainer).write_text(text)
        # nobody leaves, and has the others killed, before that is written
        interrupted = trainer.strategy.reduce_boolean_decision(self._interrupted is not None, all=False)
        last = self._checkpoints.last_model_path  # of a trial there is none
        rest = "" if is_trial(trainer) else f" The same command with --ckpt_path last goes on from {last}."
        rank_zero_info(f"\n{self._received or 'A signal to another rank'}: stopped after step {self._step}.{rest}")
        raise Preempted(interrupted)

    def listen(self) -> None:
        """Take signals, from before training on."""
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            for number in SIGNALS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker, which ends when this process does
        if number == signal.SIGINT and self._interrupted is not None:
            if time.monotonic() - self._interrupted > SAME_SEC:
                os._exit(Preempted.INTERRUPTED)
            return
        if number == signal.SIGINT:
            self._interrupted = time.monotonic()
            told = TOLD_TRIAL if self._trial else TOLD
            os.write(2, told if self._training else TOLD_BEFORE)  # a print may lie inside another one
        if not self._training:
            raise Preempted(number == signal.SIGINT)
        self._received = signal.Signals(number).name

    def _marker(self, trainer: L.Trainer) -> Path:
        return run_folder(trainer) / MARKER
