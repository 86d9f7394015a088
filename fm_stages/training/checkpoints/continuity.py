"""What a run needs, beside what Lightning keeps, to go on as if it had never stopped: draws and logged numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from fm_stages.training.checkpoints.files import CONTINUITY
from fm_stages.training.checkpoints.run_ids import new_id
from fm_stages.training.logs.metrics_table import MetricsTable
from fm_stages.training.ranks import gather


class Continuity(Checkpoint):
    """Lets a resumed run draw and log what it would have drawn and logged.

    A checkpoint of a step is written before the numbers of that step are logged, and before the validation that is due
    at it: both are made up for, when the run goes on. What a `MetricsTable` holds beyond the checkpoint is cut off.
    What Lightning does at the end of an epoch after the validation (means over an epoch, ``on_train_epoch_end``) is not
    made up for: none of it is in a run of this package.

    A `Checkpoint` in Lightning's sense comes after all other callbacks: nothing is drawn between it and the first step.

    Attributes:
        run_id: of the run; that of the checkpoint which it goes on from.

    Args:
        run_id: of a run that begins; None: a new one.
    """

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id or new_id()
        self._state: dict[str, Any] | None = None
        self._resumed = False  # and no batch has come since

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew, unless a checkpoint is loaded.

        Raises:
            ValueError: if nothing writes checkpoints; Lightning adds its own only where there is no `Checkpoint`.
        """
        self._state = None
        if stage == "fit" and not any(isinstance(c, ModelCheckpoint) for c in trainer.checkpoint_callbacks):
            raise ValueError("Continuity is for runs with checkpoints: add Checkpoints() to the callbacks")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Every rank calls this."""
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        done = loop.batch_progress.total.state_dict()
        in_step = done["completed"] < done["processed"]  # inside on_train_batch_end
        logs = in_step and not loop._should_accumulate() and connector.should_update_logs
        fetcher = trainer.fit_loop._data_fetcher
        seen = loop.val_loop.batch_progress.current.state_dict()
        in_validation = trainer.validating and seen["completed"] < seen["processed"]  # inside on_validation_batch_end
        checkpoint[CONTINUITY] = {
            "run": self.run_id,
            "random": gather(random_state(pl_module.device)),
            "tables": [table.place() for table in tables(trainer)],
            "row": _on_cpu(connector.metrics["log"]) if logs else {},
            "epoch": trainer.current_epoch,
            "metrics": _on_cpu(trainer.callback_metrics),
            "validation_due": in_validation
            or bool(in_step and fetcher is not None and loop._should_check_val_fx(fetcher)),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts; go on with the tables, if it is this run that is gone on with."""
        self._state = checkpoint.get(CONTINUITY)  # an older one has none
        if self._state is None or trainer.state.fn != "fit" or not _goes_on(trainer):
            return
        self.run_id = self._state.get("run", self.run_id)
        for table, place in zip(tables(trainer), self._state.get("tables", []), strict=False):
            table.go_on(place)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Number lines by steps: Lightning counts one too many after a checkpoint of a run's end with a validation."""
        if self._resumed:
            self._resumed = False
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on."""
        state, self._state = self._state, None
        self._resumed = bool(trainer.ckpt_path)
        if state is None:
            return
        connector = trainer._logger_connector
        connector._callback_metrics.update({k: x.to(pl_module.device) for k, x in state["metrics"].items()})
        if _goes_on(trainer):
            with _in_epoch(trainer, state["epoch"]):
                connector.log_metrics(dict(state["row"]))
        if len(state["random"]) == trainer.world_size:  # other ranks hold other parts of a batch
            set_random_state(state["random"][trainer.global_rank], pl_module.device)
        if state["validation_due"] and trainer.enable_validation:
            with _in_epoch(trainer, state["epoch"]):
                _validate(trainer)


def logged_so_far(trainer: L.Trainer) -> dict[str, Any]:
    """Replaces what a checkpoint knows of what is logged, where a run goes back to it and keeps its tables."""
    return {"tables": [table.place() for table in tables(trainer)], "row": {}, "validation_due": False}


def id_of(trainer: L.Trainer) -> str | None:
    """The run's id; None where there is no `Continuity`."""
    return next((c.run_id for c in trainer.checkpoint_callbacks if isinstance(c, Continuity)), None)


def tables(trainer: L.Trainer) -> list[MetricsTable]:
    """Those that this rank writes."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsTable) and trainer.is_global_zero]


def is_own(checkpoint: str | Path | None, folder: str | Path) -> bool:
    """Whether a checkpoint lies in a run's folder of checkpoints: it is gone on with, and not branched off from."""
    return bool(checkpoint) and Path(str(checkpoint)).resolve().parent == Path(folder).resolve()


def _goes_on(trainer: L.Trainer) -> bool:
    folders = [c.dirpath for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    return any(is_own(trainer.ckpt_path, folder) for folder in folders)


def random_state(device: torch.device) -> dict[str, Any]:
    """Of the generators that all code of a process shares: python's, numpy's and torch's."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    keys = torch.from_numpy(numpy["state"]["key"].astype(np.int64))  # arrays are no part of a checkpoint
    state = {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": keys}},
        "torch": torch.get_rng_state(),
    }
    return state if device.type != "cuda" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from `random_state`."""
    random.setstate(state["python"])
    keys = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": keys}})  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _on_cpu(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.as_tensor(x).detach().cpu() for name, x in metrics.items()}


@contextmanager
def _in_epoch(trainer: L.Trainer, epoch: int) -> Iterator[None]:
    """In the epoch that a checkpoint was written in: after one of an epoch's end Lightning is in the next one."""
    progress = trainer.fit_loop.epoch_progress.current
    now, progress.completed = progress.completed, epoch
    try:
        yield
    finally:
        progress.completed = now


def _validate(trainer: L.Trainer) -> None:
    """Validate as Lightning does after a batch, which counts as completed by then: also in what is saved meanwhile."""
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    loop, first_loop_iter = epoch_loop.val_loop, connector._first_loop_iter
    counts = epoch_loop.batch_progress.total, epoch_loop.batch_progress.current
    before = [count.completed for count in counts]
    for count in counts:
        count.completed = count.state_dict()["processed"]
    trainer.validating, loop.restarting = True, False
    loop.run()
    trainer.training, connector._first_loop_iter = True, first_loop_iter
    for count, completed in zip(counts, before, strict=True):
        count.completed = completed
    trainer.fit_loop.epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
