"""Pictures during training, of raw and EMA weights: images drawn from the same noise, and the prediction strip."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from fm_stages import plots
from fm_stages.data import TrainingData, pictures_of, to_model_range, whole_file
from fm_stages.flow import Guidance, sample, solver_named, time_grid
from fm_stages.training.logs.loggers import dispensable, is_trial, log_image, run_folder, write_table
from fm_stages.training.monitor.callback import OracleMonitor
from fm_stages.training.predictions import predict_data, prediction_figure

SMALLEST_SIDE = 32
"""Images of fewer pixels across are enlarged to this many or more."""

WITHOUT_CLASSES = 8
"""Columns of a grid of images where classes do not say it."""


class SampleGrid(L.Callback):
    """Draws at intervals and at the end, always from the same noise, and logs to wandb what it writes.

    Writes grids of images, ``<run>/samples/<weights>_<step>.png``, guided ones beside them, and, where the Trainer has
    an `OracleMonitor`, the prediction strip ``<run>/samples/predictions_<step>.png``: what the networks take noisy
    training images for in one step, beside the oracle. Rows that are no pictures have no strip. Beside a grid lie its
    settings as JSON, beside a strip the networks' distances to the oracle as CSV.

    Args:
        every_n_steps: optimizer steps between drawings; 0 = only at the end.
        num_samples: images in a grid, to whole rows; 0 = none; classes take turns.
        num_steps: solver steps.
        seed: of the noise.
        shift: of the solver's time grid; > 1 puts more steps near noise.
        solver: euler, heun, midpoint or dopri5 (which chooses its own steps).
        guidance_scale: other than 1 draws a second grid, ``<weights>_guided_<step>.png``.
        guidance_interval: of t, in which there is guidance.
        num_predictions: noisy training images in the strip, 0 = none.

    Raises:
        ValueError: if an argument lies outside its range.
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
        num_predictions: int = 4,
    ) -> None:
        if min(every_n_steps, num_samples, num_predictions) < 0 or num_steps < 1:
            raise ValueError(
                f"every_n_steps={every_n_steps}, num_samples={num_samples} and num_predictions={num_predictions} must "
                f"be 0 or more, num_steps={num_steps} 1 or more"
            )
        self.solver = solver_named(solver)
        self.guidance = Guidance(guidance_scale, guidance_interval)
        time_grid(num_steps, shift, self.guidance.nodes)  # refuses a bad shift now
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.num_steps = num_steps
        self.seed = seed
        self.shift = shift
        self.num_predictions = num_predictions
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be drawn, before training rather than after it."""
        if stage == "fit":
            self.check(pl_module, getattr(trainer, "datamodule", None))

    def check(self, pl_module: L.LightningModule, datamodule: Any) -> None:
        """Refuse a run that cannot be drawn as asked for.

        Raises:
            ValueError: if module or data do not say what to draw, or guidance has no null class to move away from.
        """
        if not isinstance(getattr(pl_module, "network", None), nn.Module):
            raise ValueError(
                f"SampleGrid draws with the module's `network`, and {type(pl_module).__name__} has none: name it so"
            )
        if isinstance(datamodule, TrainingData) and (self.num_samples or self.num_predictions):
            datamodule.picture_shape(datamodule.shape)  # loads what decodes, or says why it cannot
        if self.num_samples == 0:
            return
        if not (hasattr(datamodule, "shape") and hasattr(datamodule, "num_classes")):
            raise ValueError("SampleGrid needs a datamodule with `shape` (C, H, W) and `num_classes`")
        if not self.guidance.is_on:
            return
        asked = f"guidance_scale={self.guidance.scale:g} needs a network trained with and without labels, and "
        dropout = getattr(pl_module, "label_dropout", None)
        if datamodule.num_classes == 0:
            raise ValueError(f"{asked}the data has none: set guidance_scale to 1")
        if dropout in (0, 1):
            missing = "the null class is never trained" if dropout == 0 else "no label is ever seen"
            raise ValueError(
                f"{asked}with label_dropout={dropout:g} {missing}: set the module's label_dropout to 0.1, or "
                "guidance_scale to 1"
            )

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
        """Draw for the last time."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # every rank draws the same: a sharded network's forward is a collective, and so is a question to a sharded bank
        if trainer.global_step == self._last_step or is_trial(trainer):
            return
        self._last_step = trainer.global_step
        both = {"raw": pl_module.network, "EMA": getattr(pl_module, "network_ema", None)}
        networks = {name: network for name, network in both.items() if isinstance(network, nn.Module)}
        with evaluating(*networks.values()), trainer.precision_plugin.forward_context():
            if self.num_samples:
                self._draw_grids(trainer, pl_module, networks)
            if self.num_predictions:
                self._draw_predictions(trainer, networks)

    def _draw_grids(self, trainer: L.Trainer, pl_module: L.LightningModule, networks: dict[str, nn.Module]) -> None:
        """Grids from noise, in which classes take turns."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes = max(data.num_classes, 1)
        columns = min(classes, 10) if classes > 1 else min(self.num_samples, WITHOUT_CLASSES)
        num = max(self.num_samples // columns, 1) * columns
        labels = torch.arange(num, device=pl_module.device) % classes
        if data.num_classes == 0 or getattr(pl_module, "label_dropout", 0) == 1:
            labels = torch.full_like(labels, -1)  # classes whose embedding was never trained would be noise
        guidance = {"": Guidance(), **({"_guided": self.guidance} if self.guidance.is_on else {})}
        for weights, network in networks.items():
            for suffix, moved in guidance.items():
                images = sample(
                    network, labels, data.shape, self.seed, self.num_steps, self.shift, None, self.solver, moved
                )
                if trainer.is_global_zero:
                    name = f"{weights.lower()}{suffix}"
                    path, how = _file(trainer, name), self._drawn_how(moved, labels, columns)
                    with dispensable(trainer, path.name):
                        save_grid(as_images(images, data), path, columns)
                        with whole_file(path.with_suffix(".json")) as part:
                            part.write_text(json.dumps(how))
                        log_image(trainer, f"samples/{name}", path)

    def _drawn_how(self, guidance: Guidance, labels: Tensor, columns: int) -> dict[str, Any]:
        """What a grid shows, row after row, and by which settings: enough to draw it again from the weights."""
        return {
            "seed": self.seed,
            "solver": self.solver.__name__,
            "num_steps": self.num_steps,
            "shift": self.shift,
            "guidance_scale": guidance.scale,
            "guidance_interval": list(guidance.interval),
            "columns": columns,
            "labels": labels.tolist(),
        }

    def _draw_predictions(self, trainer: L.Trainer, networks: dict[str, nn.Module]) -> None:
        """The prediction strip, once the monitor has measured where the stages lie."""
        monitors = [callback for callback in trainer.callbacks if isinstance(callback, OracleMonitor)]  # type: ignore[attr-defined]
        if not monitors or monitors[0].profile is None:
            return
        oracle, profile = monitors[0].oracle, monitors[0].profile
        shown = pictures_of(oracle.bank, trainer.datamodule)  # type: ignore[attr-defined]
        if shown is None:
            return
        found = predict_data(networks, oracle, profile, self.num_predictions, self.seed)
        if trainer.is_global_zero:
            to_picture, note = shown
            figure = prediction_figure(found, to_picture, f"step {trainer.global_step}", note)
            write_table(trainer, f"samples/{_file(trainer, 'predictions').stem}", found.table())
            with dispensable(trainer, "samples/predictions"):
                log_image(trainer, "samples/predictions", plots.save(figure, _file(trainer, "predictions")))


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Networks in evaluation mode; afterwards each of their parts is in the mode that it was in."""
    training = {part: part.training for network in networks for part in network.modules()}
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def _file(trainer: L.Trainer, name: str) -> Path:
    return run_folder(trainer) / "samples" / f"{name}_{trainer.global_step:07d}.png"


def as_images(drawn: Tensor, data: object) -> Tensor:
    """What a network drew, (B, C, H, W), in [-1, 1] to be shown: decoded, where the data knows how to."""
    if not isinstance(data, TrainingData) or data.picture_shape(data.shape) in (None, data.shape):
        return drawn
    return to_model_range(data.to_pixels(drawn))


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a grid of images as PNG, making its folder; small ones are enlarged.

    Args:
        images: (B, C, H, W) in [-1, 1], what lies beyond is cut off; of other than 3 channels the first is shown.
        path: of the file.
        columns: images in a row.
    """
    images = images if images.shape[1] == 3 else images[:, :1]
    zoom = math.ceil(SMALLEST_SIDE / images.shape[-1])
    images = images.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    with whole_file(path) as part:
        save_image(images, part, nrow=columns, normalize=True, value_range=(-1, 1), format="png")
