"""The command line of training: LightningCLI with the callbacks that every run has, and the config in the checkpoint."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fm_stages.training.checkpoints import Checkpoints, init_from
from fm_stages.training.ema import frozen_twin
from fm_stages.training.loggers import choose_wandb_mode, run_folder
from fm_stages.training.module import FlowMatching
from fm_stages.training.monitor import OracleMonitor
from fm_stages.training.samples import SampleGrid
from fm_stages.training.throughput import Throughput

BASE = str(files("fm_stages") / "base.yaml")
"""The default configuration, which configs/*.yaml and the command line lie on top of."""

CONFIG_KEY = "fm_stages_config"
"""Where a checkpoint keeps the YAML of the run that made it."""


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration into the run's folder, every checkpoint and the logger."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    @property
    def _yaml(self) -> str:
        return self.parser.dump(self.config, skip_none=False)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Called on rank 0 as the run starts."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(self._yaml)
        if trainer.logger is not None:
            trainer.logger.log_hyperparams(self.config.as_dict())

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint says how its network was built, in text: nothing to unpickle."""
        checkpoint[CONFIG_KEY] = self._yaml


class TrainingCLI(LightningCLI):
    """``fit`` and ``validate``: model, data and trainer from YAML, on top of the package's defaults."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        defaults = {"default_config_files": [BASE], "exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            FlowMatching,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"fit": defaults, "validate": defaults, "exit_on_error": False, "allow_abbrev": False}
            if run
            else defaults,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Which of the Trainer's methods are commands."""
        arguments = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": arguments, "validate": arguments}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks of every run, each a section of the config, and the weights to start from."""
        for callback, section in (
            (OracleMonitor, "monitor"),
            (SampleGrid, "samples"),
            (Throughput, "throughput"),
            (Checkpoints, "checkpoints"),
            (LearningRateMonitor, "learning_rate"),
        ):
            parser.add_lightning_class_args(callback, section)
        parser.add_argument(
            "--init-from", type=str | None, default=None, help="start from a checkpoint's weights alone (fit only)"
        )

    def before_instantiate_classes(self) -> None:
        """Give wandb a folder and a mode that cannot block."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        logger = config.trainer.logger
        if getattr(logger, "class_path", None) == f"{WandbLogger.__module__}.{WandbLogger.__name__}" or (
            getattr(logger, "class_path", "").endswith("WandbLogger")
        ):
            rank_zero_info(f"wandb: {choose_wandb_mode()}")
            if logger.init_args.get("save_dir") in (None, "."):
                logger.init_args.save_dir = config.trainer.default_root_dir

    def before_fit(self) -> None:
        """Load the weights that --init-from names."""
        source = self.config[self.subcommand].get("init_from")
        if source:
            rank_zero_info(init_from(self.model.network, source))
            if self.model.network_ema is not None:
                self.model.network_ema = frozen_twin(self.model.network)


def main() -> None:
    """Run ``fm-stages fit`` or ``fm-stages validate`` with the arguments of this process."""
    TrainingCLI(args=sys.argv[1:])
