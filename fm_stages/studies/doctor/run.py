"""A run as ``fm-stages fit`` would build it, on one process: ranks that the job would have are only planned for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from torch import Tensor

from fm_stages.data import TrainingData
from fm_stages.oracle import DataBank, GaussianMixtureBank, Oracle, oracle_of
from fm_stages.training import FlowMatching, TrainingCLI, check_strategy

HERE = {
    **{"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "plugins": None},
    **{"enable_progress_bar": False, "enable_model_summary": False},
}
"""In place of what the configuration says of machines."""


class PlannedTrainer(L.Trainer):
    """A Trainer on this process that speaks as one of the ranks that a job will have, at any step of it."""

    planned_ranks = 1
    planned_rank = 0
    planned_step = 0

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.planned_ranks

    @property
    def global_rank(self) -> int:
        """The rank that is spoken for."""
        return self.planned_rank

    @property
    def global_step(self) -> int:
        """The step that is spoken of."""
        return self.planned_step

    @contextmanager
    def speaking_for(self, rank: int, step: int = 0) -> Iterator[None]:
        """Answer as this rank at this step."""
        before = self.planned_rank, self.planned_step
        self.planned_rank, self.planned_step = rank, step
        try:
            yield
        finally:
            self.planned_rank, self.planned_step = before


class _Builder(TrainingCLI):
    """Parses and builds as ``fit`` does, refuses what ``fit`` refuses before it begins, and does not begin."""

    loggers: list[str]
    trainer: PlannedTrainer

    def before_instantiate_classes(self) -> None:
        """Remember what would log, and make no logger: some make a folder, or wait for a network."""
        config = self.config.fit
        given = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        self.loggers = [one.class_path for one in given if getattr(one, "class_path", "")]
        self.loggers += ["lightning.pytorch.loggers.CSVLogger"] * (config.trainer.logger in (True, None))
        config.trainer.logger = False
        self.asked_for = config.trainer.accelerator
        self.ranks = planned_ranks(config)
        super().before_instantiate_classes()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        check_strategy(config["strategy"])
        self.trainer_class = PlannedTrainer
        trainer = super()._instantiate_trainer({**config, **HERE}, callbacks)
        assert isinstance(trainer, PlannedTrainer)
        trainer.planned_ranks = self.ranks
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Only what comes before it."""
        self.before_fit()


@dataclass
class PlannedRun:
    """What a run is made of.

    Attributes:
        config: of ``fit``, whole.
        module: with the weights that training would start from.
        data: read.
        trainer: speaks for the ranks of the job.
        loggers: class paths.
        accelerator: that was asked for.
    """

    config: Namespace
    module: FlowMatching
    data: TrainingData
    trainer: PlannedTrainer
    loggers: list[str]
    accelerator: str

    @property
    def num_ranks(self) -> int:
        """Of the job."""
        return self.trainer.planned_ranks

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.trainer.accumulate_grad_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return self.data.num_train // self.data.batch_size

    @property
    def max_steps(self) -> float:
        """Optimizer steps of the run; infinite where nothing ends it."""
        ends = [float(self.trainer.max_steps)] if self.trainer.max_steps and self.trainer.max_steps > 0 else []
        if (epochs := self.trainer.max_epochs) is not None and epochs > 0:
            ends.append(float(epochs * self.steps_per_epoch))
        return min(ends, default=float("inf"))

    @property
    def bank(self) -> DataBank | GaussianMixtureBank:
        """The training set."""
        return self.data.bank()

    @property
    def oracle(self) -> Oracle:
        """Of the bank."""
        return oracle_of(self.bank, self.module.path)

    def callback(self, kind: type) -> Any:
        """The run's callback of a kind; None if it has none."""
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((one for one in callbacks if isinstance(one, kind)), None)

    def batches(self, rank: int = 0) -> Iterator[Any]:
        """The micro-batches that a rank trains on, from the start."""
        with self.trainer.speaking_for(rank):
            yield from self.data.train_dataloader()

    def first_batch(self) -> dict[str, Tensor]:
        """What the first training step of rank 0 sees: ``x0, x1, x_t, t, labels`` and ``index``."""
        batch = next(self.batches())
        x1 = batch["x1"]
        t, x0, labels = self.module.draw(x1, batch["labels"], batch["position"])
        seen = {"x0": x0, "x1": x1, "x_t": self.module.path.interpolate(x0, x1, t), "t": t, "labels": labels}
        return {**seen, "index": batch["index"]} if "index" in batch else seen


def planned_ranks(config: Namespace) -> int:
    """Ranks that ``--trainer.devices`` and ``--trainer.num_nodes`` ask for; "auto": as many GPUs as there are here.

    Raises:
        ValueError: if they ask for none.
    """
    devices = config.trainer.devices
    if devices in ("auto", -1, "-1"):
        on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
        return max(torch.cuda.device_count() if on_gpu else 1, 1) * config.trainer.num_nodes
    if isinstance(devices, str):  # one number, or the numbers of some devices
        numbers = devices.strip(",").split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            raise ValueError(f"--trainer.devices {devices}: give how many on each node, or auto")
        devices = int(devices) if "," not in devices else numbers
    ranks: int = (len(devices) if isinstance(devices, list) else devices) * config.trainer.num_nodes
    if ranks < 1:
        raise ValueError(f"--trainer.devices {devices} --trainer.num_nodes {config.trainer.num_nodes}: give 1 or more")
    return ranks


def plan_run(arguments: list[str]) -> PlannedRun:
    """Build what ``fm-stages fit`` with these arguments would train.

    Raises:
        ValueError: if it would refuse them, with its message; or as one of several processes.
        FileNotFoundError: likewise.
    """
    # which arguments that are not the command line's would raise, and these differ from it
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "the doctor is one process: start it without torchrun, and name the ranks of the job with "
            "--trainer.devices and --trainer.num_nodes"
        )
    built = _Builder(["fit", *arguments])
    if not isinstance(built.datamodule, TrainingData):
        raise ValueError(
            f"{type(built.datamodule).__name__} is no data module of fm-stages, a TrainingData: how it deals batches "
            "to ranks is not known here"
        )
    built.model.trainer = built.trainer  # whose ranks and steps its draws depend on
    return PlannedRun(built.config.fit, built.model, built.datamodule, built.trainer, built.loggers, built.asked_for)
