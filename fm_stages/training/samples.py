"""A grid of generated images during training, from the same noise each time, of raw and EMA weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from fm_stages.flow import Guidance, sample, solver_named, time_grid
from fm_stages.training.loggers import is_trial, log_image, run_folder

SMALLEST_SIDE = 32
"""Images of fewer pixels are enlarged."""


class SampleGrid(L.Callback):
    """Draws images at intervals and at the end; writes ``<run>/samples/<weights>_<step>.png``, guided ones beside it.

    Args:
        every_n_steps: optimizer steps between grids; 0 = only at the end.
        num_samples: images in a grid; classes take turns.
        num_steps: solver steps.
        seed: of the noise.
        shift: of the solver's time grid; > 1 puts more steps near noise.
        solver: euler, heun, midpoint or dopri5 (which chooses its own steps).
        guidance_scale: other than 1 draws a second grid, ``<weights>_guided_<step>.png``, where there are labels.
        guidance_interval: of t, in which there is guidance.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        num_samples: int = 64,
        num_steps: int = 50,
        seed: int = 0,
        shift: float = 1.0,
        solver: str = "euler",
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if every_n_steps < 0 or num_samples < 1 or num_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps} must be 0 or more, num_samples={num_samples} and "
                f"num_steps={num_steps} 1 or more"
            )
        self.solver = solver_named(solver)
        self.guidance = Guidance(guidance_scale, guidance_interval)
        time_grid(num_steps, shift, self.guidance.nodes)  # refuses a bad shift now
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.num_steps = num_steps
        self.seed = seed
        self.shift = shift
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make sure that the shape of an image is known, before training rather than after it."""
        data = getattr(trainer, "datamodule", None)
        if stage == "fit" and not (hasattr(data, "shape") and hasattr(data, "num_classes")):
            raise ValueError("SampleGrid needs a datamodule with `shape` (C, H, W) and `num_classes`")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where the run starts."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when it is time."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last grid."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # every rank draws the same grid: under sharding a network's forward is a collective
        if trainer.global_step == self._last_step or is_trial(trainer):
            return
        self._last_step = trainer.global_step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes = max(data.num_classes, 1)
        columns = min(classes, 10)
        num = max(self.num_samples // columns, 1) * columns
        labels = torch.arange(num, device=pl_module.device) % classes
        if data.num_classes == 0 or getattr(pl_module, "label_dropout", 0) == 1:
            labels = torch.full_like(labels, -1)  # classes whose embedding was never trained would be noise
        guidance = {"": Guidance()}
        if self.guidance.is_on and bool((labels != -1).any()):
            guidance["_guided"] = self.guidance
        for weights, network in (("raw", pl_module.network), ("ema", pl_module.network_ema)):
            if not isinstance(network, nn.Module):
                continue
            training = network.training
            network.eval()
            for suffix, moved in guidance.items():
                with trainer.precision_plugin.forward_context():
                    images = sample(
                        network, labels, data.shape, self.seed, self.num_steps, self.shift, None, self.solver, moved
                    )
                if trainer.is_global_zero:
                    name = f"{weights}{suffix}"
                    path = run_folder(trainer) / "samples" / f"{name}_{trainer.global_step:07d}.png"
                    save_grid(images, path, columns)
                    log_image(trainer, f"samples/{name}", path)
            network.train(training)


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a grid of images as PNG, making its folder; small ones are enlarged.

    Args:
        images: (B, C, H, W) in [-1, 1], what lies beyond is cut off; of other than 3 channels the first is shown.
        path: of the file.
        columns: images in a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images = images if images.shape[1] == 3 else images[:, :1]
    zoom = max(1, SMALLEST_SIDE // images.shape[-1])
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    save_image(images, path, nrow=columns, normalize=True, value_range=(-1, 1), format="png")
