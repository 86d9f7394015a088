"""One progress bar for the whole run: small data sets have epochs of a few steps, and a bar for each says nothing."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgressBar(TQDMProgressBar):
    """Counts optimizer steps up to ``max_steps``, with loss, held-out loss and gap beside them."""

    def __init__(self) -> None:
        self._is_file = not sys.stdout.isatty()
        super().__init__(refresh_rate=200 if self._is_file else 1)

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Open the bar, at the step that a resumed run starts from."""
        super().on_train_start(trainer)
        self.train_progress_bar.total = trainer.max_steps if trainer.max_steps > 0 else None
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step
        self.train_progress_bar.set_description("Training")
        # a file is read afterwards, where a line for every step would bury the rest; a short run shows that it moves
        if self._is_file and trainer.max_steps > 0:
            self._refresh_rate = min(200, max(1, trainer.max_steps // 20))

    def on_train_epoch_start(self, *_: Any) -> None:
        """Let the bar run on."""

    def on_train_epoch_end(self, *_: Any) -> None:
        """Let the bar run on."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Move the bar to the current step."""
        step = trainer.global_step
        if step != self.train_progress_bar.n and self._should_update(step, self.train_progress_bar.total or 0):
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            self.train_progress_bar.n = step
            self.train_progress_bar.refresh()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """What is logged with ``prog_bar=True``, without the logger's version."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        return metrics
