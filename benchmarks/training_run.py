"""A training run as a configuration describes it, without the callbacks that a benchmark does not ask for."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from fm_stages.data import TrainingData
from fm_stages.training import FlowMatching, TrainingCLI

CONFIG = Path(__file__).parents[1] / "configs" / "fashion_mnist_dit.yaml"


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """The option that names the configuration; what the parser does not know goes to the configuration."""
    parser.add_argument("--config", default=str(CONFIG), help=f"the run (default: {CONFIG.name})")
    parser.epilog = "All other options change the configuration: --data.init_args.batch_size 32"


def from_config(config: str, overrides: list[str], trainer: dict[str, Any], folder: str) -> TrainingCLI:
    """Model, data and Trainer of a configuration.

    Args:
        config: YAML file.
        overrides: options on top of it, as ``fm-stages fit`` takes them.
        trainer: Trainer arguments of the benchmark, which win.
        folder: for what the run writes.

    Returns:
        ``.model``, ``.datamodule`` with the data read, ``.trainer`` without callbacks, and ``.config``.

    Raises:
        SystemExit: if the data is not there.
    """
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # the benchmark's own options are in sys.argv
    warnings.filterwarnings("ignore", ".*does not have many workers")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # which devices there are
    settings = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        **trainer,
    }
    flags = [f"--trainer.{name}={'null' if value is None else value}" for name, value in settings.items()]
    cli = TrainingCLI(args=["--config", config, *overrides, *flags], run=False)
    cli.trainer.callbacks.clear()  # checkpoints among them
    try:
        cli.datamodule.setup()
    except FileNotFoundError as error:
        raise SystemExit(f"This benchmark needs the data of {config}: {error}") from error
    return cli


def parts(cli: TrainingCLI) -> tuple[FlowMatching, TrainingData, L.Trainer]:
    """What `from_config` made, with types."""
    assert isinstance(cli.model, FlowMatching)
    assert isinstance(cli.datamodule, TrainingData)
    return cli.model, cli.datamodule, cli.trainer
