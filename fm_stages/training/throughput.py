"""How fast training goes and what it waits for."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.data import extract_batch_size

from fm_stages.training.logs.loggers import log_metrics


class Throughput(L.Callback):
    """Logs images per second over all ranks, the share of time spent waiting for data, and memory.

    Validation is not counted. What runs between two batches counts as waiting: callbacks after this one, and with them
    a checkpoint that is written. Numbers are of the time since the last line.

    Args:
        every_n_steps: optimizer steps between lines.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._last_step = 0
        self._reset()

    def _reset(self) -> None:
        self._images = 0
        self._busy_sec = self._waiting_sec = 0.0
        self._began = 0.0
        self._ended: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        self._last_step = trainer.global_step
        self._reset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget when the last batch ended: what follows is not waiting for data."""
        self._ended = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here."""
        self._began = time.perf_counter()
        if self._ended is not None:
            self._waiting_sec += self._began - self._ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The batch is done; log when it is time."""
        step = trainer.global_step
        due = step != self._last_step and step % self.every_n_steps == 0
        if due and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._ended = time.perf_counter()
        self._busy_sec += self._ended - self._began
        self._images += extract_batch_size(batch) * trainer.world_size
        if due:
            self._last_step = step
            total = self._busy_sec + self._waiting_sec
            log_metrics(
                trainer,
                {
                    "speed/images_per_sec": self._images / total,
                    "speed/data_wait": self._waiting_sec / total,
                    "speed/memory_bytes": _peak_memory_bytes(pl_module.device),
                },
            )
            self._reset()


def _peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
