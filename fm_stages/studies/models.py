"""A trained network out of a checkpoint, ready to draw images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fm_stages.data import TrainingData, read_yaml
from fm_stages.flow import keyed_uniform
from fm_stages.studies.runs import open_run
from fm_stages.training import CONFIG_KEY, FlowMatching, network_weights

WEIGHTS = ("ema", "raw")


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        network: in evaluation mode, with its weights.
        module: says path and label dropout.
        data: that it was trained on, not read yet; None for an imported network.
        shape: (C, H, W) of an image.
        num_classes: labels that it knows; 0 where it never saw one.
        weights: of which kind.
        digest: tells other weights apart.
        step: of the weights.
        config: of the run, whole, as plain data.
    """

    network: nn.Module
    module: FlowMatching
    data: TrainingData | None
    shape: tuple[int, int, int]
    num_classes: int
    weights: str
    digest: str
    step: int
    config: dict[str, Any]


def load_trained(path: str | Path, weights: str | None = None) -> Trained:
    """Read a network from a checkpoint of ``fm-stages fit``.

    The data set is read only where the network does not say for which images it was built.

    Args:
        path: of the checkpoint.
        weights: ``ema`` or ``raw``; None: EMA where they are kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such checkpoint, holds no such weights, or nothing says for which images it is.
    """
    checkpoint, module, data = open_run(path)
    kept = {kind: network_weights(checkpoint, ema=kind == "ema") for kind in WEIGHTS}
    kind = weights or next((kind for kind in WEIGHTS if kept[kind] is not None), "raw")
    state = kept.get(kind)
    if state is None:
        there = " and ".join(name for name, value in kept.items() if value is not None) or "no"
        raise ValueError(f"{path} holds no {kind} weights, only {there} ones")
    if wrong := [name for name, x in state.items() if not bool(x.isfinite().all())]:
        raise ValueError(f"{path}: {len(wrong)} of its {kind} weights are NaN or infinity, {wrong[0]} first")
    try:
        module.network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: its {kind} weights do not fit the network that it describes ({error})") from error
    shape, num_classes = _built_for(module.network, data)
    return Trained(
        network=module.network.eval().requires_grad_(False),
        module=module,
        data=data,
        shape=shape,
        num_classes=0 if module.label_dropout == 1 else num_classes,
        weights=kind,
        digest=_digest(state),
        step=int(checkpoint.get("global_step", 0)),
        config=read_yaml(checkpoint[CONFIG_KEY], path),
    )


def _built_for(network: nn.Module, data: TrainingData | None) -> tuple[tuple[int, int, int], int]:
    """Shape of an image and number of classes, by the network or else by the data."""
    channels, side, num_classes = (
        getattr(network, name, None) for name in ("in_channels", "input_size", "num_classes")
    )
    if isinstance(channels, int) and isinstance(side, int) and isinstance(num_classes, int):
        return (channels, side, side), num_classes
    if data is None:
        raise ValueError(f"{type(network).__name__} does not say for which images, and the checkpoint names no data")
    data.setup()
    return data.shape, data.num_classes


def _digest(state: dict[str, Tensor]) -> str:
    """Twelve digits that other weights do not have."""
    digest = hashlib.blake2b(digest_size=6)
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def labels_of(index: Tensor, rule: str, num_classes: int, seed: int) -> Tensor:
    """The label of each image, by its number alone.

    Args:
        index: (B,) int64, numbers of images.
        rule: ``balanced`` (classes take turns), ``drawn`` (uniformly, by the seed), ``null`` (none), or classes
            separated by commas, which take turns.
        num_classes: of the network.
        seed: of the draws.

    Returns:
        (B,) int64, -1 = without.
    """
    if rule == "null":
        return torch.full_like(index, -1)
    if rule == "balanced":
        return index % num_classes
    if rule == "drawn":
        return (keyed_uniform(("sample labels", seed), index) * num_classes).long().clamp(max=num_classes - 1)
    return torch.tensor([int(label) for label in rule.split(",")])[index % len(rule.split(","))]


def label_rule(rule: str | None, trained: Trained, option: str = "--labels") -> str:
    """A rule of `labels_of` that fits the network; None: balanced classes, or none where it knows none.

    Raises:
        ValueError: if it is no rule, or names labels that the network was not trained on.
    """
    num_classes, dropout = trained.num_classes, trained.module.label_dropout
    if rule is None:
        return "balanced" if num_classes else "null"
    if rule == "null":
        if num_classes and dropout == 0:
            raise ValueError(f"{option} null: the network was trained without label dropout and knows labels only")
        return rule
    if not num_classes:
        raise ValueError(f"{option} {rule}: the network was trained without labels, leave it out")
    if rule in ("balanced", "drawn"):
        return rule
    classes = [part.strip() for part in rule.split(",")]
    if not all(part.isdecimal() for part in classes):
        raise ValueError(f"{option} {rule}: give balanced, drawn, null, a class, or classes separated by commas")
    if wrong := [part for part in classes if int(part) >= num_classes]:
        raise ValueError(f"{option} {rule}: there is no class {wrong[0]}, the network knows 0 to {num_classes - 1}")
    return ",".join(str(int(part)) for part in classes)


def check_guidance(scale: float, trained: Trained) -> None:
    """Refuse a guidance scale for a network that lacks the velocity with labels, or the one without.

    Raises:
        ValueError: with what it was trained on.
    """
    if scale != 1 and not (trained.num_classes and 0 < trained.module.label_dropout < 1):
        raise ValueError(
            f"--guidance_scale {scale} needs a network that was trained with labels and without; this one's label "
            f"dropout was {trained.module.label_dropout}, with {trained.num_classes} classes"
        )
