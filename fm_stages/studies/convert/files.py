"""Files of weights that other projects wrote, and the file that an import leaves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from fm_stages.data import load_tensors, whole_file
from fm_stages.training import CONFIG_KEY

Weights = dict[str, Tensor]

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of a key that DDP, torch.compile, FSDP and activation checkpointing put before a module's own name."""

SECTIONS = {
    "ema": ("ema", "model_ema", "ema_model", "network_ema"),
    "raw": ("model", "state_dict", "network"),
}
"""Names under which training scripts keep averaged and raw weights."""


def read_weights(path: str | Path, kind: str | None = None, unpickle: bool = False) -> tuple[Weights, str]:
    """Read one set of weights from a file of another project.

    Args:
        path: a file of torch.save, or .safetensors: a state_dict, or several under the names in `SECTIONS`.
        kind: ``ema`` or ``raw``, of several; what the only set is, for a file that does not say so. None: EMA if
            there is such a set, and raw for a file that does not say.
        unpickle: whether a file may be read that holds more than tensors and plain values. That can run any code.

    Returns:
        Weights by their names without wrappers, and which they are, ``ema`` or ``raw``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or holds no such weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}")
    found = _sets(_read(path, unpickle), path)
    if "" in found:
        return found[""], kind or "raw"
    chosen = kind or ("ema" if "ema" in found else "raw")
    if chosen not in found:
        raise ValueError(f"{path} holds no {chosen} weights, only {' and '.join(found)} ones")
    return found[chosen], chosen


def _read(path: str | Path, unpickle: bool) -> dict[str, Any]:
    """The dictionary that a file holds."""
    unreadable = f"{path} cannot be read: it is damaged, or neither a file of torch.save nor .safetensors"
    if Path(path).suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                own = {CONFIG_KEY: ""} if CONFIG_KEY in (file.metadata() or {}) else {}
                return own | {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dictionary
        except SafetensorError as error:
            raise ValueError(f"{unreadable} ({error})") from error
    try:
        tree = torch.load(path, map_location="cpu", weights_only=False) if unpickle else load_tensors(path)
    except Exception as error:  # torch raises many kinds for foreign or truncated files
        if not unpickle and (names := _unsafe(path, error)):
            raise ValueError(
                f"{path} holds more than weights ({', '.join(names)}), and to unpickle that can run any code: if you "
                "trust its origin, add --unpickle"
            ) from error
        if isinstance(error, ImportError | AttributeError):  # which only unpickling raises
            raise ValueError(f"{path} needs the code that it was saved with, which is not here: {error}") from error
        raise ValueError(f"{unreadable} ({type(error).__name__})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, not a dictionary of weights")
    return tree


def _unsafe(path: str | Path, error: Exception) -> list[str]:
    """What torch refused to unpickle; none for a file that it cannot look into."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch lists them for its newer format alone, and names the first one in its message
        return re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))


def _sets(tree: dict[str, Any], path: str | Path) -> dict[str, Weights]:
    """The sets of weights in a file: ``ema`` and ``raw``, or one that goes by no name."""
    if CONFIG_KEY in tree:
        raise ValueError(f"{path} is a checkpoint of fm-stages: it needs no import")
    found: dict[str, Weights] = {}
    for kind, names in SECTIONS.items():
        for name in names:
            if isinstance(tree.get(name), dict):
                inside = _split(_stripped(tree[name], path))
                for inner, weights in inside.items():
                    found.setdefault(inner or kind, weights)
    return found or _split(_stripped(tree, path))


def _split(weights: Weights) -> dict[str, Weights]:
    """The sets in one dictionary whose keys all begin with the name of a set; else the dictionary, by no name."""
    found = {
        kind: {key.partition(".")[2]: value for key, value in weights.items() if key.partition(".")[0] in names}
        for kind, names in SECTIONS.items()
    }
    whole = sum(map(len, found.values())) == len(weights)
    return {kind: part for kind, part in found.items() if part} if whole else {"": weights}


def _stripped(tree: dict[str, Any], path: str | Path) -> Weights:
    """Weights by their names without wrappers."""
    strange = [f"{key} ({type(value).__name__})" for key, value in tree.items() if not isinstance(value, Tensor)]
    if strange or not tree:
        raise ValueError(f"{path} is not a dictionary of weights: it holds {', '.join(strange[:10]) or 'nothing'}")
    weights = {".".join(part for part in key.split(".") if part not in WRAPPERS): tree[key] for key in tree}
    if len(weights) < len(tree):
        raise ValueError(f"{path} holds weights twice, with and without the names of wrappers: keep one of them")
    return weights


def write_network(path: str | Path, weights: Weights, kind: str, config: str, step: int = 0) -> None:
    """Write a network as a checkpoint that every command reads, .safetensors by its ending; never over a file.

    Args:
        path: of the file; its folder is made.
        weights: of the network.
        kind: ``ema`` or ``raw``.
        config: YAML that says how the network is built.
        step: of the weights.

    Raises:
        ValueError: if there is a file already.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already: choose another --out, or remove it")
    prefix = "network_ema." if kind == "ema" else "network."
    named = {prefix + key: value.contiguous() for key, value in weights.items()}
    with whole_file(path) as part:
        if path.suffix == ".safetensors":
            save_file(named, part, metadata={CONFIG_KEY: config, "global_step": str(step), "weights": kind})
        else:
            torch.save({"state_dict": named, CONFIG_KEY: config, "global_step": step}, part)
