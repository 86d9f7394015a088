"""Several checkpoints on one probe: in which stage does a larger network, or longer training, change the gap?

All networks see the same noisy images with the same labels, so that what differs is the networks, and differences to
the first one have errors much smaller than those of the gaps themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fm_stages.data import TrainingData
from fm_stages.oracle import (
    Oracle,
    StageProfile,
    TimestepCurves,
    Wiener,
    linear_reference,
    mean_square,
    oracle_of,
    timestep_bins,
)
from fm_stages.studies.diagnose.comparison import CheckpointComparison, CheckpointCurves
from fm_stages.studies.diagnose.measure import predict, probe
from fm_stages.studies.models import Trained, load_trained

TRAINING = ("gap", "regular", "wiener", "gap_change", "regular_change")
HELD_OUT = ("regular", "regular_change")

DATA_KEYS = ("batch_size", "val_batch_size", "micro_batch_size", "num_workers", "shard_bank", "residency")
"""Arguments of data that change no image."""


def compare_checkpoints(
    trained: Mapping[str, Trained],
    files: Mapping[str, str],
    data: TrainingData,
    num_samples: int = 2048,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> CheckpointComparison:
    """Measure several networks of the same data on the same draws; the oracle is asked once for all of them.

    Args:
        trained: by name; see `load_checkpoints`, which refuses what cannot be compared.
        files: where each comes from.
        data: of all of them, set up.
        num_samples: images of each split (fewer if there are not as many), each with one noise and one t.
        seed: of the draws.
        device: where to compute.
        progress: whether to show bars.

    Returns:
        Curves of each, and the stages.
    """
    module = next(iter(trained.values())).module
    oracle = oracle_of(data.bank().to(torch.device(device)), module.path)
    profile = StageProfile.measure(oracle, module.label_dropout, seed=seed)
    wiener = linear_reference(oracle.bank, oracle.path)
    edges = timestep_bins(boundary=profile.boundary)
    sums = {name: (TimestepCurves(TRAINING, edges), TimestepCurves(HELD_OUT, edges)) for name in trained}
    networks = {name: one.network.to(device) for name, one in trained.items()}

    def draws(split: str) -> Iterator[dict[str, Tensor]]:
        return probe(module, data, split, num_samples, seed, device, progress)

    num = 0
    for seen in draws("training"):
        num += len(seen["t"])
        index = seen.get("index") if oracle.collapses else None
        best = oracle.target(seen["x0"], seen["x1"], seen["t"], seen["labels"], index)
        linear = _linear_gap(oracle, wiener, seen, best)
        found = {name: _errors(oracle, seen, predict(network, seen), best) for name, network in networks.items()}
        first = next(iter(found.values()))
        for name, (regular, gap) in found.items():
            sums[name][0].update(
                seen["t"].cpu(),
                gap=gap, regular=regular, wiener=linear, gap_change=gap - first[1], regular_change=regular - first[0],
            )  # fmt: skip
    for seen in draws("held-out"):
        losses = {name: _errors(oracle, seen, predict(network, seen), None)[0] for name, network in networks.items()}
        first_loss = next(iter(losses.values()))
        for name, loss in losses.items():
            sums[name][1].update(seen["t"].cpu(), regular=loss, regular_change=loss - first_loss)
    measured = {
        name: CheckpointCurves(
            files[name], one.weights, one.step, sum(p.numel() for p in one.network.parameters()),
            sums[name][0].compute(), sums[name][1].compute(),
        )
        for name, one in trained.items()
    }  # fmt: skip
    return CheckpointComparison(measured, profile, num, seed)


def load_checkpoints(files: Mapping[str, str], weights: str | None = None) -> dict[str, Trained]:
    """Read checkpoints of one data set, path and label dropout.

    Args:
        files: by name.
        weights: ``ema`` or ``raw``; None: EMA where they are kept.

    Raises:
        ValueError: if they differ in what fixes the oracle, or hold weights of different kinds.
    """
    trained = {name: load_trained(file, weights) for name, file in files.items()}
    first, *others = trained
    for name in others:
        for what, here, there in zip(
            ("weights", "data", "path", "label_dropout"), _facts(trained[first]), _facts(trained[name]), strict=True
        ):
            if here != there:
                raise ValueError(
                    f"--ckpt {files[first]} and {files[name]} cannot be compared, they differ in {what}: {here} and "
                    f"{there}. All have to be of one training set, path and label dropout"
                )
    if trained[first].data is None:
        raise ValueError(f"--ckpt {files[first]} was imported and does not say on which data it was trained")
    return trained


def _facts(trained: Trained) -> tuple[Any, ...]:
    """What has to be the same, as plain data."""
    data = dict(trained.config.get("data") or {})
    arguments = {k: v for k, v in dict(data.get("init_args") or {}).items() if k not in DATA_KEYS}
    path = trained.module.path
    return (
        trained.weights,
        {**data, "init_args": arguments} if data else None,
        f"{type(path).__name__}{dict(vars(path)) or ''}",
        trained.module.label_dropout,
    )


def _errors(oracle: Oracle, seen: dict[str, Tensor], prediction: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor]:
    """Regular loss and gap, each (B,) on the CPU; the gap is NaN without the oracle's velocity."""
    conditional = oracle.path.velocity(seen["x0"], seen["x1"], seen["t"])
    regular = mean_square(prediction - conditional)
    gap = torch.full_like(regular, torch.nan) if best is None else mean_square(prediction - best)
    return regular.cpu(), gap.cpu()


def _linear_gap(oracle: Oracle, wiener: Wiener | None, seen: dict[str, Tensor], best: Tensor) -> Tensor:
    """The gap (B,) of the best linear model, on the CPU; NaN where there is none."""
    if wiener is None:
        return torch.full((len(best),), torch.nan)
    linear = oracle.target_from_mean(wiener.mean(seen["x_t"], seen["t"]), seen["x0"], seen["x1"], seen["t"])
    return mean_square(linear - best).cpu()
