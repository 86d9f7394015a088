"""Checkpoints of a run: when they are written, where they go, and what becomes of older ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.data import remove_parts
from fm_stages.training.checkpoints.background import Writer
from fm_stages.training.checkpoints.files import WholeFiles, unreadable
from fm_stages.training.logs.loggers import is_trial, run_folder

WRITTEN_TO = ("oracle", "oracle_val", "oracle_train", "memorization", "stages", "samples", "version_*")
"""Folders in that of a run, in which a killed one may have left files half written."""


class NotSaved(SystemExit):
    """The run ended for a checkpoint that could not be written. The status is EX_IOERR of sysexits.h."""

    STATUS = 74

    def __init__(self) -> None:
        super().__init__(self.STATUS)


class Checkpoints(ModelCheckpoint):
    """`ModelCheckpoint` with a fixed place, ``<run>/checkpoints``: the best by ``monitor``, and last.ckpt.

    Whenever a run is killed, its files are whole: see `WholeFiles`, which the strategy uses unless it has its own way.
    Training stands still while a checkpoint is copied, and a thread writes it: whoever needs the file asks `settle`. An
    older one is removed after the new one has been read back. A file that cannot be written ends the run.

    Args:
        monitor: number that decides which is best; the smallest is.
        save_top_k: how many of the best to keep.
        every_n_train_steps: steps between checkpoints; None = at each validation, or in a run without any as often
            as it would be validated.
        dirpath: the folder, if another one.
    """

    def __init__(
        self,
        monitor: str | None = "val/loss",
        save_top_k: int = 1,
        every_n_train_steps: int | None = None,
        dirpath: str | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            monitor=monitor,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            save_last=True,
            filename="step_{step:07d}",
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._step = self._interval = 0
        self._written: int | None = None
        self._writer: Writer | None = None
        self._writing = False  # the same on all ranks; only rank 0 has something to write
        self._fresh = ""  # the file that holds what a checkpoint would hold now

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Fix the folder: a new one for each start would lose sight of the last checkpoint."""
        self.dirpath = self.dirpath or checkpoint_folder(trainer.default_root_dir)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()
        files = trainer.strategy.checkpoint_io
        self._writer = Writer(files) if isinstance(files, WholeFiles) else None
        self._written, self._writing, self._fresh = None, False, ""
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; Lightning forgets the number of the last validation."""
        with warnings.catch_warnings():
            # from another run's, whose best one is none of this run's
            warnings.filterwarnings("ignore", "The dirpath has changed from")
            super().load_state_dict(state_dict)
        self.current_score = state_dict.get("current_score")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove what a run before this one was writing when it was killed; nobody is writing yet."""
        if trainer.is_global_zero and not is_trial(trainer):
            # and nowhere else: the run's folder may be one in which other people's runs and files lie
            written_to = (folder for name in WRITTEN_TO for folder in run_folder(trainer).glob(name))
            for folder in (Path(str(self.dirpath)), run_folder(trainer), *written_to):
                remove_parts(folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse now what the first checkpoint would end the run for, maybe hours later.

        Raises:
            ValueError: on every rank, naming a state that could not be read back.
        """
        super().on_train_start(trainer, pl_module)
        self._step = trainer.global_step
        self._interval = self._every_n_train_steps or _interval_without_validation(trainer)
        if found := trainer.strategy.broadcast(next(unreadable(_small_states(trainer)), "")):
            raise ValueError(f"a checkpoint of this run could not be read again: {found}")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """While a file is being written, ask whether it is there."""
        self._fresh = ""
        if self._writing:
            self._ask(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After it a checkpoint is another one."""
        self._fresh = ""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save every n steps, each of them as soon as it is whole.

        `ModelCheckpoint` waits for the next validation where it knows no number that says which is best, and at the end
        of an epoch for the next batch, which may lie inside an optimizer step: what was lost was not seen until a kill.
        """
        if trainer.global_step == self._step:
            return  # gradients of a part of a batch are in no checkpoint
        self._step = trainer.global_step
        every = self._interval
        if not every or self._step % every or not _trains(trainer):
            return
        if self.monitor is None:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self._step != trainer.max_steps:
            self.write_last(trainer, wait=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best while the number that tells them apart is fresh; without an interval, last.ckpt."""
        if not _trains(trainer):
            return
        if self.monitor is not None or not self._interval:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if not self._interval and trainer.global_step != trainer.max_steps:
            self.write_last(trainer, wait=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let last.ckpt be the last step, also of a run that ends between two checkpoints.

        It comes after figures and tables, which a run that is found at its end would not make any more.
        """
        self._fresh = ""
        self.write_last(trainer)

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Let what is being written be written; other ranks may be elsewhere."""
        if self._writer is not None:
            self._writer.wait()

    def settle(self, trainer: L.Trainer) -> None:
        """Wait until all files are there, on all ranks; every rank calls this.

        Raises:
            NotSaved: on every rank, if one could not be written.
        """
        if self._writing:
            if self._writer is not None:
                self._writer.wait()
            self._ask(trainer)

    def write_last(self, trainer: L.Trainer, wait: bool = True) -> None:
        """Write last.ckpt, unless it is of this step already or the run is a trial.

        Args:
            trainer: of the run.
            wait: until it is there.
        """
        if not is_trial(trainer) and self._written != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._written = trainer.global_step
        if wait:
            self.settle(trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Begin to write a checkpoint, which rank 0 does."""
        if self._fresh and self._writer is not None:
            if trainer.is_global_zero:
                self._writer.copy(self._fresh, filepath)
        else:
            self.settle(trainer)  # two copies would be too much for some memories
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            if self._writer is None:  # files of another kind
                trainer.strategy.save_checkpoint(checkpoint, filepath)
            elif trainer.is_global_zero:
                self._writer.write(checkpoint, filepath)
            self._fresh = filepath
        self._writing = True
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Remove an older file, after those that are being written are there."""
        if self._writer is None:
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            self._writer.remove(filepath)

    def _ask(self, trainer: L.Trainer) -> None:
        """Let all ranks know how far rank 0 is."""
        busy, failure = (False, "") if self._writer is None else (self._writer.busy, self._writer.failure)
        self._writing, failure = trainer.strategy.broadcast((busy, failure))
        if failure:
            rank_zero_info(
                f"\nStopped at step {trainer.global_step}: the checkpoint {failure}. Files that were there before are "
                "as they were: with that mended, --ckpt_path last goes on from the newest."
            )
            raise NotSaved
        if not self._writing and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


def _trains(trainer: L.Trainer) -> bool:
    """Whether this is the training of a real run, and no sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not is_trial(trainer)


def _interval_without_validation(trainer: L.Trainer) -> int:
    """Steps between checkpoints where there is no validation to save at; 0: there is one, or nothing to go by."""
    if trainer.enable_validation or not _trains(trainer):
        return 0
    interval = trainer.val_check_interval
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is not None:
        rank_zero_info(
            "Without a validation last.ckpt is written at the end alone: give --checkpoints.every_n_train_steps."
        )
        return 0
    steps = max(interval // trainer.accumulate_grad_batches, 1)
    rank_zero_info(
        f"Without a validation last.ckpt is written every {steps} steps, of val_check_interval; "
        "--checkpoints.every_n_train_steps gives another interval."
    )
    return steps


def _small_states(trainer: L.Trainer) -> dict[str, Any]:
    """What callbacks, module and data put into a checkpoint beside the weights; every rank calls this."""
    states: dict[str, Any] = {
        "callbacks": {c.state_key: c.state_dict() for c in trainer.callbacks},  # type: ignore[attr-defined]
    }
    if (data := getattr(trainer, "datamodule", None)) is not None:
        states["data"] = data.state_dict()
    for part in (trainer.lightning_module, data):
        if part is not None and getattr(part, "hparams", None):
            states[part.CHECKPOINT_HYPER_PARAMS_KEY] = dict(part.hparams)
    return states


def checkpoint_folder(run_folder: str) -> str:
    """Where a run's checkpoints go."""
    return str(Path(run_folder).absolute() / "checkpoints")
