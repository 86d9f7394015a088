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
from lightning.pytorch.callbacks import Checkpoint

from fm_stages.training.flight import gather
from fm_stages.training.metrics_table import MetricsTable

KEY = "continuity"
"""Of a checkpoint."""


class Continuity(Checkpoint):
    """Lets a resumed run draw and log what it would have drawn and logged.

    A checkpoint of a step is written before the numbers of that step are logged, and before the validation that is due
    at it: both are made up for, when the run goes on. What a `MetricsTable` holds beyond the checkpoint is cut off.

    A `Checkpoint` in Lightning's sense comes after all other callbacks: nothing is drawn between it and the first step.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._resumed = False  # and no batch has come since

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew, unless a checkpoint is loaded."""
        self._state = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Every rank calls this."""
        loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
        done = loop.batch_progress.total.state_dict()
        in_step = done["completed"] < done["processed"]  # inside on_train_batch_end
        logs = in_step and not loop._should_accumulate() and connector.should_update_logs
        fetcher = trainer.fit_loop._data_fetcher
        seen = loop.val_loop.batch_progress.current.state_dict()
        in_validation = trainer.validating and seen["completed"] < seen["processed"]  # inside on_validation_batch_end
        checkpoint[KEY] = {
            "random": gather(random_state(pl_module.device)),
            "table_rows": [table.num_rows for table in tables(trainer)],
            "row": _on_cpu(connector.metrics["log"]) if logs else {},
            "epoch": trainer.current_epoch,
            "metrics": _on_cpu(trainer.callback_metrics),
            "validation_due": in_validation
            or bool(in_step and fetcher is not None and loop._should_check_val_fx(fetcher)),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts; go on with the tables, if it is this run that is gone on with."""
        self._state = checkpoint.get(KEY)  # an older one has none
        if trainer.state.fn == "fit" and goes_on(trainer):
            for table in tables(trainer):
                table.go_on()

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
        if goes_on(trainer):
            for table, num_rows in zip(tables(trainer), state["table_rows"], strict=False):
                table.cut(num_rows)
            with _in_epoch(trainer, state["epoch"]):
                connector.log_metrics(dict(state["row"]))
        if len(state["random"]) == trainer.world_size:  # other ranks hold other parts of a batch
            set_random_state(state["random"][trainer.global_rank], pl_module.device)
        if state["validation_due"] and trainer.enable_validation:
            with _in_epoch(trainer, state["epoch"]):
                _validate(trainer)


def logged_so_far(trainer: L.Trainer) -> dict[str, Any]:
    """Replaces what a checkpoint knows of what is logged, where a run goes back to it and keeps its tables."""
    return {"table_rows": [table.num_rows for table in tables(trainer)], "row": {}, "validation_due": False}


def tables(trainer: L.Trainer) -> list[MetricsTable]:
    """Those that this rank writes."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsTable) and trainer.is_global_zero]


def goes_on(trainer: L.Trainer) -> bool:
    """Whether this is the run that wrote the checkpoint, not another one that branches off."""
    folders = (trainer.default_root_dir, getattr(trainer.checkpoint_callback, "dirpath", None))
    return is_within(trainer.ckpt_path, *folders)


def is_within(file: str | Path | None, *folders: str | None) -> bool:
    """Whether a file lies in one of some folders."""
    if not file:
        return False
    return any(Path(file).resolve().is_relative_to(Path(folder).resolve()) for folder in folders if folder)


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
