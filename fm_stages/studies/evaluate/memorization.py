"""What ``fm-stages evaluate`` says of memorization: the study of it, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fm_stages.data import TrainingData
from fm_stages.studies.drawing import Drawing
from fm_stages.studies.evaluate.features import FeatureSet
from fm_stages.studies.memorization.study import study_memorization
from fm_stages.studies.ranks import Job

FILES = ("closest.png", "memorization_index.png", "memorization.json", "memorization.csv")
"""What the study leaves in a folder."""


def memorization_of(
    samples: FeatureSet,
    data: TrainingData,
    drawing: Drawing | None,
    out: Path,
    job: Job,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """The study's plain data, and its ``text``; every rank calls this.

    Args:
        samples: of which the first were kept as a network sees them.
        data: whose training images they may repeat.
        drawing: the network, whose memorization index is measured if it is one for all t; None of samples in files.
        out: folder of the study's files.
        job: the ranks.
        seed: of what the study draws.
        device: where it computes.
    """
    if samples.values is None:
        return {
            "text": "not measured: these are pixels, and the network draws latents, which rounded pixels do not give "
            "back; evaluate the checkpoint itself with --ckpt"
        }
    networks, notes = {}, [f"Held against the training images of {type(data).__name__}."]
    if drawing is not None and len(drawing.networks) > 1:
        notes.append("There is no memorization index: it is of one network for all t.")
    if drawing is not None and len(drawing.networks) == 1:
        kind = drawing.settings.plain["weights"]
        networks = {f"{'EMA' if kind == 'ema' else kind} weights": drawing.networks[0]}
    try:
        found = study_memorization(
            samples.values, data, drawing.module if drawing else None, networks, out,
            index=samples.values_index, seed=seed, device=device, job=job,
        )  # fmt: skip
    except ValueError as error:  # of all ranks; the other numbers are none the worse
        return {"text": f"not measured: {error}"}
    return {**found.plain(), "data": type(data).__name__, "text": "\n".join([*notes, "", found.text()])}


def numbers_of(memorization: dict[str, Any]) -> dict[str, float]:
    """Shares and distances by ``kind/name``, for a logger."""
    return {
        f"{kind}/{name}": value["value"] if isinstance(value, dict) else value
        for kind, summary in memorization.get("summaries", {}).items()
        for name, value in summary.items()
    }
