"""The networks of a call of ``fm-stages sample``: one for all t, or two experts that have to fit together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from fm_stages.oracle import StageProfile
from fm_stages.studies.models import Trained, load_trained

REACH = 0.001
"""How far from the times that it was trained on a network may draw without a word."""


def load_networks(files: Sequence[str], weights: str | None = None) -> list[Trained]:
    """Read checkpoints whose networks are to draw the same images.

    Args:
        files: of the checkpoints, in the order of their stages.
        weights: ``ema`` or ``raw``; None: EMA where they are kept.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if one is no such checkpoint, or they differ in what they draw.
    """
    networks = [load_trained(file, weights) for file in files]
    for (first, one), (second, other) in pairwise(zip(files, networks, strict=True)):
        for what, a, b in zip(("shape", "path", "classes", "data"), _kind(one), _kind(other), strict=True):
            if a != b and None not in (a, b):
                raise ValueError(
                    f"the experts differ in {what}: {first} has {a}, {second} has {b}; they draw the same images, so "
                    "train both on the same data, path and labels"
                )
    return networks


def _kind(trained: Trained) -> tuple[object, ...]:
    """What networks that take turns have in common; None where a checkpoint does not say it."""
    data = type(trained.data).__name__ if trained.data else None
    return trained.shape, StageProfile.name_of(trained.module.path), trained.num_classes, data


def check_stages(files: Sequence[str], networks: Sequence[Trained], split: float | None) -> list[str]:
    """Hold the times that networks were trained on against those that they are to draw.

    Args:
        files: of the checkpoints.
        networks: of them.
        split: t between the two stages, if there are two.

    Returns:
        What is to be said of those that draw at times of which they saw nothing.

    Raises:
        ValueError: if one saw nothing of its whole stage.
    """
    times = [0.0, split, 1.0] if split is not None and len(networks) == 2 else [0.0, 1.0]
    notes = []
    for file, trained, (start, end) in zip(files, networks, pairwise(times), strict=True):
        # the ends of the density: an interval for `TruncatedTimesteps`, all of [0, 1] for most others
        low, high = trained.module.timesteps.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        seen = f"{file} was trained on t in [{low:.3g}, {high:.3g}]"
        if low >= end or high <= start:
            raise ValueError(
                f"{seen} and should draw from {start:.3g} to {end:.3g}: give first the expert of the stage near noise "
                "(t = 0), and a --split between the stages"
            )
        if low > start + REACH or high < end - REACH:
            notes.append(f"{seen} and draws from {start:.3g} to {end:.3g}, so also where it saw nothing")
    return notes
