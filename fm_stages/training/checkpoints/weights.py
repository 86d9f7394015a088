"""Checkpoints read back: what they hold, their weights, and a network that starts from them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from fm_stages.data import load_tensors, read_yaml
from fm_stages.training.checkpoints.files import check_sums

CONFIG_KEY = "fm_stages_config"
"""Where a checkpoint keeps the YAML of the run that made it."""

SAME_FUNCTION = {"num_classes", "activation_checkpointing", "compile_blocks"}
"""Arguments of networks that do not change what they compute of the same weights."""

LABEL_TABLE = "y_embedder.embedding_table.weight"
"""The weight whose shape depends on the number of classes."""


def read_checkpoint(path: str | Path, values: bool = True) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Args:
        path: of the file.
        values: whether to read all values, and hold them against their checksums; else tensors stay on the disk, for
            whoever asks for names and shapes alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint of this package.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = _read_safetensors(path) if Path(path).suffix == ".safetensors" else load_tensors(path, not values)
        if values and isinstance(checkpoint, dict) and "pytorch-lightning_version" in checkpoint:
            check_sums(Path(path))  # which torch does not; other projects may write none
    except OSError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    except ValueError as error:  # it claims what it does not hold
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    except Exception as error:  # torch raises many kinds for foreign or truncated files
        raise ValueError(f"{path} is not a checkpoint that can be read ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(
            f"{path} is not a checkpoint of fm-stages: it has no state_dict. `fm-stages import` converts weights of "
            "some other projects"
        )
    strange = [key for key, x in checkpoint["state_dict"].items() if not isinstance(x, Tensor) or type(key) is not str]
    if strange:
        raise ValueError(f"{path} is damaged: its state_dict holds {strange[0]!r:.80}, which is no tensor with a name")
    step = checkpoint.setdefault("global_step", 0)
    if not re.fullmatch(r"\d{1,15}", str(step)) or not isinstance(checkpoint.get(CONFIG_KEY, ""), str):
        raise ValueError(f"{path} is damaged: its step is {step!r:.50}, or its configuration is no text")
    return checkpoint


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """Weights, and in their metadata what else the file says in text."""
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        return {"state_dict": weights, "global_step": 0, **(file.metadata() or {})}


def network_weights(checkpoint: dict[str, Any], ema: bool) -> dict[str, Tensor] | None:
    """The network's state_dict out of a checkpoint, raw or EMA; None if there are no such weights."""
    prefix = "network_ema." if ema else "network."
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    return weights or None


def init_from(network: nn.Module, path: str | Path, model: Mapping[str, Any] | None = None) -> str:
    """Start a network from a checkpoint's weights alone: EMA where there are some, else raw.

    Another number of classes is allowed: the label table then keeps its fresh values.

    Args:
        network: takes the weights.
        path: of the checkpoint.
        model: how ``network`` and the ``path`` between noise and data are configured here, each with ``class_path`` and
            ``init_args``; None: not to be held against what the checkpoint says.

    Returns:
        One line on what was loaded, and on what differs although the shapes fit.

    Raises:
        ValueError: if anything else does not fit.
    """
    checkpoint = read_checkpoint(path)
    weights, kind = network_weights(checkpoint, ema=True), "EMA"
    if weights is None:
        weights, kind = network_weights(checkpoint, ema=False), "raw"
    if weights is None:
        raise ValueError(f"{path} holds no weights named network.*")
    own = network.state_dict()
    kept = ""
    if LABEL_TABLE in own and LABEL_TABLE in weights and weights[LABEL_TABLE].shape != own[LABEL_TABLE].shape:
        kept = f"; the label table starts fresh ({len(weights[LABEL_TABLE])} rows there, {len(own[LABEL_TABLE])} here)"
        weights[LABEL_TABLE] = own[LABEL_TABLE]
    wrong = [
        f"{k} {tuple(weights[k].shape)} there, {tuple(own[k].shape)} here"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    wrong += [f"{k} missing there" for k in own if k not in weights] + [
        f"{k} unknown here" for k in weights if k not in own
    ]
    if wrong:
        raise ValueError(f"{path} does not fit the network ({len(wrong)} weights differ), first: {wrong[0]}")
    network.load_state_dict(weights)
    text = read_yaml(checkpoint.get(CONFIG_KEY, "{}"), f"the configuration in {path}")
    differences = "; ".join(_differences(text, model or {}))
    warning = f" Careful, the same weights may be another function here: {differences}." if differences else ""
    return f"Started from the {kind} weights of {path}{kept}.{warning}"


def _differences(text: Any, model: Mapping[str, Any]) -> Iterator[str]:
    """What the checkpoint's configuration and this one say otherwise, of network and path."""
    theirs = text.get("model") if isinstance(text, dict) else None
    for part, here in model.items():
        there = theirs.get(part) if isinstance(theirs, dict) else None
        if not isinstance(there, dict) or not here:
            continue
        if there.get("class_path") != here["class_path"]:
            yield f"{part} {there.get('class_path')} there, {here['class_path']} here"
            continue
        ours = here.get("init_args") or {}
        for name, value in (there.get("init_args") or {}).items():
            if name not in SAME_FUNCTION and name in ours and ours[name] != value:
                yield f"{name} {value} there, {ours[name]} here"
