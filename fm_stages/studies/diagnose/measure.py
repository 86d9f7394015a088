"""Regular loss, gap and floor by t of a trained network, on noisy images that are the same for every network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fm_stages.data import TrainingData
from fm_stages.flow import keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.oracle import (
    Curves,
    StageProfile,
    TimestepCurves,
    decompose,
    linear_reference,
    oracle_of,
    timestep_bins,
)
from fm_stages.training import QUANTITIES, FlowMatching, HeldOut

SPLITS = ("training", "held-out")


def diagnose(
    module: FlowMatching,
    network: nn.Module,
    data: TrainingData,
    num_samples: int = 2048,
    seed: int = 0,
    profile: StageProfile | None = None,
    progress: bool = True,
    label_dropout: float | None = None,
) -> tuple[Curves, Curves, StageProfile]:
    """Measure a network against the exact oracle of its training set.

    Args:
        module: says path, label dropout and times.
        network: the weights to measure, of ``module``'s shape.
        data: training and held-out images.
        num_samples: images of each split (fewer if there are not as many), each with one noise and one t.
        seed: of the draws.
        profile: the stages of the data, if they were measured before.
        progress: whether to show a progress bar.
        label_dropout: share of the images that the network sees without label; None: as it was trained.

    Returns:
        Curves of training inputs (`QUANTITIES`) and of held-out inputs (regular, gap, wiener), and the profile.
    """
    device = next(network.parameters()).device
    network.eval()
    oracle = oracle_of(data.bank().to(device), module.path)
    profile = profile or StageProfile.measure(oracle, module.label_dropout, seed=seed)
    wiener = linear_reference(oracle.bank, oracle.path)
    edges = timestep_bins(boundary=profile.boundary)
    train = TimestepCurves(QUANTITIES, edges).to(device)
    held_out = HeldOut(edges, profile.boundary, device)
    for split in SPLITS:
        for seen in probe(module, data, split, num_samples, seed, device, progress, label_dropout):
            seen["prediction"] = predict(network, seen)
            if split == "held-out":
                held_out.update(oracle, wiener, seen)
                continue
            draws = {name: seen[name] for name in ("x0", "x1", "t", "prediction", "labels")}
            index = seen["index"] if oracle.collapses else None  # a row that is a distribution is not its x1
            parts = decompose(oracle, **draws, index=index, wiener=wiener)
            train.update(parts.t, **{name: getattr(parts, name) for name in QUANTITIES})
    return train.compute(), held_out.compute()[""], profile


def probe(
    module: FlowMatching,
    data: TrainingData,
    split: str,
    num_samples: int,
    seed: int,
    device: torch.device | str,
    progress: bool = True,
    label_dropout: float | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Noisy images of a split, with all that fixes them: the same for every network of the same data and seed.

    Args:
        module: says path, label dropout and times.
        data: training and held-out images.
        split: one of `SPLITS`.
        num_samples: images, fewer if there are not as many.
        seed: of noise, times and label dropout.
        device: where to put them.
        progress: whether to show a progress bar.
        label_dropout: share of images without label; None: the module's.

    Yields:
        Batches of ``x0, x1, x_t, t, labels`` (-1 = without) and, of training images, ``index``.
    """
    loader = data.val_dataloader() if split == "held-out" else data.train_dataloader()
    num = min(num_samples, data.num_val if split == "held-out" else len(loader) * data.batch_size)
    key, done = ("diagnose", split, seed), 0
    share = module.label_dropout if label_dropout is None else label_dropout
    with tqdm(total=num, desc=split, unit="image", disable=not progress) as bar:
        for batch in loader:
            size = min(len(batch["x1"]), num - done)
            if size == 0:
                return
            position = torch.arange(done, done + size)
            x1, labels = batch["x1"][:size].to(device), batch["labels"][:size].to(device)
            t = stratified_uniform(key, position, num).clamp(max=module.path.max_time).to(device)
            x0 = keyed_normal(key, position, tuple(x1.shape[1:])).to(device)
            dropped = keyed_uniform((*key, "labels"), position).to(device) < share
            labels = torch.where(dropped, -1, labels)
            seen = {"x0": x0, "x1": x1, "x_t": module.path.interpolate(x0, x1, t), "t": t, "labels": labels}
            yield {**seen, "index": batch["index"][:size].to(device)} if "index" in batch else seen
            done += size
            bar.update(size)


@torch.no_grad()
def predict(network: nn.Module, seen: dict[str, Tensor]) -> Tensor:
    """The network's velocity (B, ...) of a batch of `probe`, in float32."""
    prediction: Tensor = network(seen["x_t"], seen["t"], seen["labels"]).float()
    return prediction
