"""A fixed part of the training set, measured as held-out images are: the same weights, the same kind of draws."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from fm_stages.flow import keyed_generator, keyed_normal
from fm_stages.oracle import Curves, DataBank, GaussianMixtureBank, Oracle, TimestepCurves, mean_square
from fm_stages.training.monitor.checks import SUFFIXES, outputs_of


def measure_probe(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    oracle: Oracle,
    edges: list[float],
    num_images: int,
    num_batches: int,
) -> dict[str, Curves]:
    """Regular loss by timestep of a fixed probe of training images; `FlowMatching.predict_fixed` says under what noise.

    Every rank calls this, inside a validation. All ranks make the same number of calls of the network, of about equal
    size, none of them empty.

    Args:
        trainer: says which rank this is, and in what precision networks are called.
        pl_module: whose weights are measured.
        oracle: of the training set, whose bank and path are meant.
        edges: of the timestep bins.
        num_images: of the probe over all ranks, the same on each. If there are fewer, they come in turns, each time
            under another noise.
        num_batches: calls of each rank; fewer where there would not be an image for each.

    Returns:
        Curves of ``regular``, reduced over ranks, by the suffix of the weights; none if the module has no
        ``predict_fixed``, or there is less than an image for each rank.
    """
    predict = getattr(pl_module, "predict_fixed", None)
    bank, ranks = oracle.bank, trainer.world_size
    if predict is None or num_images < ranks:
        return {}
    sums = {suffix: TimestepCurves(("regular",), edges).to(pl_module.device) for suffix in SUFFIXES}
    seen: set[str] = set()
    parts = torch.arange(num_images).tensor_split(min(num_batches, num_images // ranks) * ranks)
    for position in parts[trainer.global_rank :: ranks]:
        with trainer.precision_plugin.val_step_context():
            outputs = predict(_batch(bank, position, pl_module.device))
        outputs = outputs_of(outputs, pl_module)
        target = oracle.path.velocity(outputs["x0"], outputs["x1"], outputs["t"])
        for suffix in SUFFIXES:
            if (prediction := outputs.get(f"prediction{suffix}")) is not None:
                sums[suffix].update(outputs["t"], regular=mean_square(prediction - target))
                seen.add(suffix)
    return {suffix: sums[suffix].compute() for suffix in SUFFIXES if suffix in seen}


def _batch(bank: DataBank | GaussianMixtureBank, position: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Training images at places (B,) of the probe: the same ones whatever its size, the weights and the ranks are."""
    index = torch.randperm(bank.num_rows, generator=keyed_generator("probe"))[position % bank.num_rows]
    if isinstance(bank, GaussianMixtureBank):  # a row is a distribution; of each one draw, always the same
        mean, std = bank.moments_of(index).unbind(1)
        x1 = mean + std * keyed_normal(("probe draw",), position, tuple(mean.shape[1:])).to(mean)
    else:
        x1 = bank.rows(index)
    return {"x1": x1.to(device), "labels": bank.labels_of(index).to(device), "position": position}
