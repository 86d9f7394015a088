"""The whole configuration of a run: in its folder, in every checkpoint, and with its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback

from fm_stages.data import whole_file
from fm_stages.training.checkpoints.callback import checkpoint_folder
from fm_stages.training.checkpoints.continuity import id_of
from fm_stages.training.checkpoints.files import LAST
from fm_stages.training.checkpoints.run_ids import keep_id
from fm_stages.training.checkpoints.weights import CONFIG_KEY
from fm_stages.training.logs.loggers import run_folder


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration into the run's folder, every checkpoint and the logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    @property
    def _yaml(self) -> str:
        """The configuration; what follows from the run's folder is left to follow from another one's as well."""
        config = self.config.clone()
        root = config.trainer.default_root_dir
        if config.ckpt_path == str(Path(config.checkpoints.dirpath) / LAST):
            config.ckpt_path = "last"
        if config.checkpoints.dirpath == checkpoint_folder(root):
            config.checkpoints.dirpath = None
        for arguments in logger_arguments(config):
            if arguments.get("save_dir") == root:
                arguments["save_dir"] = "."
        return self.parser.dump(config, skip_none=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing is written yet: other set-ups may still find mistakes."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the configuration."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called on rank 0 as the run starts."""
        folder = run_folder(trainer)
        with whole_file(folder / "config.yaml") as part:
            part.write_text(self._yaml)
        if (run_id := id_of(trainer)) is not None:
            keep_id(trainer, run_id)
        if trainer.logger is not None:
            trainer.logger.log_hyperparams(self.config.as_dict())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how its network was built, in text: nothing to unpickle."""
        checkpoint[CONFIG_KEY] = self._yaml


def loggers_of(config: Namespace) -> list[Namespace]:
    """The loggers of a configuration that are given by class path."""
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [logger for logger in loggers if getattr(logger, "class_path", "")]


def logger_arguments(config: Namespace) -> list[Namespace]:
    """Their arguments."""
    return [logger.init_args for logger in loggers_of(config)]
