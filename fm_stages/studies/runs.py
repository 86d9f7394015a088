"""A run's module and data, rebuilt from the configuration that its checkpoint carries."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from fm_stages.data import TrainingData, read_yaml
from fm_stages.training import (
    CONFIG_KEY,
    FlowMatching,
    check_network,
    explain,
    instantiate,
    network_weights,
    read_checkpoint,
)


def load_run(path: str | Path, data: str | None = None) -> tuple[dict[str, Any], FlowMatching, TrainingData]:
    """Rebuild module and data of a checkpoint from the configuration that it carries.

    Args:
        path: checkpoint of ``fm-stages fit``.
        data: class path of other data, with defaults for its arguments; None: the run's own.

    Returns:
        The checkpoint, the module (its weights not yet loaded) and the data.

    Raises:
        ValueError: if the file carries no configuration, or was imported and no data is given.
    """
    checkpoint, module, images = open_run(path, data)
    if images is None:
        raise ValueError(f"{path} was imported and does not say on which data it was trained: name it with --data")
    images.setup()
    return checkpoint, module, images


def open_run(path: str | Path, data: str | None = None) -> tuple[dict[str, Any], FlowMatching, Any]:
    """As `load_run`, without reading the data; None for that of an imported network, which names none."""
    checkpoint = read_checkpoint(path)
    if CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} carries no configuration: only what `fm-stages` fit, import or export wrote does")
    config = read_yaml(checkpoint[CONFIG_KEY], f"the configuration in {path}")
    if not isinstance(config, dict) or not config.get("model"):
        raise ValueError(f"{path} carries a configuration without a model: it is damaged")
    try:
        weights = network_weights(checkpoint, ema=False) or network_weights(checkpoint, ema=True)
        images = {"class_path": data} if data else config.get("data")
        module, images = build_run({**config, "data": images}, weights)
    except (ArgumentError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: {explain(str(error))}") from error
    if images is not None and not hasattr(images, "bank"):
        raise ValueError(f"{path} names {type(images).__name__} as its data, which has no bank()")
    return checkpoint, module, images


def build_run(config: dict[str, Any], weights: Mapping[str, Tensor] | None = None) -> tuple[FlowMatching, Any]:
    """Module, with fresh weights, and data (or None) of a whole configuration as plain data; nothing is read yet.

    Args:
        config: the configuration.
        weights: that the network is to hold, which it is compared with before memory is taken for it.

    Raises:
        ValueError: if it does not fit them, or memory.
        ArgumentError: if the configuration is none.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(FlowMatching, "model")
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
    given = {name: config[name] for name in ("model", "data") if config[name] is not None}
    parsed = parser.parse_object(given)
    check_network(parsed.model.network, weights)
    run = instantiate(parser, parsed)
    return run.model, run.get("data")
