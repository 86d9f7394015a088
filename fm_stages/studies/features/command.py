"""``fm-stages features``: train a small classifier, whose penultimate layer measures images in ``fm-stages evaluate``.

For data that Inception and DINOv2 never saw, as grey images of 28x28. On a CPU the same seed gives the same file, with
as many threads.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from tqdm import tqdm

from fm_stages.data import TrainingData
from fm_stages.studies.commands import check_least, command_parser, interruptible, parse_options, refusing
from fm_stages.studies.features.classifier import Classifier, write_classifier
from fm_stages.studies.features.weights import sha256_of
from fm_stages.studies.ranks import Job
from fm_stages.training import instantiate


def features_command(arguments: list[str] | None = None) -> None:
    """The command: trains, measures the test accuracy, writes one file.

    Args:
        arguments: those after ``fm-stages features``; None: of this process.
    """
    parser = _parser()
    options = parse_options(parser, arguments)
    with refusing(parser):
        data: TrainingData = instantiate(parser, options).data
    _check(options)
    device, out = Job().device(options.device), Path(options.out)
    said = yaml.safe_load(parser.dump(options))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): give another file") from error
    data.prepare_data()
    data.setup()
    start = time.perf_counter()
    with interruptible("nothing was written"):
        network = train_classifier(
            data, options.num_features, options.num_epochs, options.lr, options.weight_decay, options.seed, device
        )
    accuracy = measure_accuracy(network, data, device)
    training = {name: said[name] for name in ("data", "num_epochs", "lr", "weight_decay", "seed")}
    write_classifier(out, network, accuracy, training)
    classes = data.num_classes
    print(
        f"test accuracy {100 * accuracy:.2f} % of {data.num_val} held-out images ({classes} classes, chance "
        f"{100 / classes:.3g} %), {time.perf_counter() - start:.0f} s on {device.type}\n"
        f"{out}: {options.num_features} features, sha256 {sha256_of(out)}"
    )


def _parser() -> ArgumentParser:
    parser = command_parser("features", __doc__)
    parser.add_argument("--config", action="config", help="YAML of the options below")
    parser.add_argument("--data", type=TrainingData, required=True, help="data module with labels, by class path")
    parser.add_argument("--num_features", type=int, default=128, help="units of the penultimate layer")
    parser.add_argument("--num_epochs", type=int, default=5, help="passes over the training images")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate of AdamW, reached at 30 %%")
    parser.add_argument("--weight_decay", type=float, default=0.05, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights; the data has its own")
    parser.add_argument("--device", type=str | None, default=None, help="default: the GPU if there is one")
    parser.add_argument("--out", type=str, required=True, help="the .safetensors to write")
    return parser


def _check(options: Namespace) -> None:
    check_least(options, 1, "num_features", "num_epochs")
    if not options.lr > 0 or not options.weight_decay >= 0:
        raise ValueError(f"--lr {options.lr} must be above 0 and --weight_decay {options.weight_decay} 0 or more")
    if Path(options.out).suffix != ".safetensors":
        raise ValueError(f"--out {options.out}: the file is a .safetensors, so let its name end with that")


def train_classifier(
    data: TrainingData,
    num_features: int = 128,
    num_epochs: int = 5,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Classifier:
    """Train a classifier on the training images; the learning rate rises and falls once.

    Raises:
        ValueError: if the data has no labels, or its rows are no square images.
    """
    channels, height, width = data.shape
    if data.num_classes < 2:
        raise ValueError(
            f"a classifier needs labels of 2 or more classes, {type(data).__name__} has {data.num_classes}"
        )
    if height != width or data.picture_shape(data.shape) != data.shape:
        raise ValueError(f"a classifier is of square images, {type(data).__name__} has {channels}x{height}x{width}")
    network = Classifier(channels, height, data.num_classes, num_features)
    network.initialise(seed)
    network.to(device).to(memory_format=torch.channels_last).train()  # a quarter faster on a CPU
    loader: Any = data.train_dataloader()
    total = num_epochs * len(loader)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total)
    with tqdm(total=total, desc="Training the classifier", unit="step", disable=not progress) as bar:
        for epoch in range(num_epochs):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                loss = nn.functional.cross_entropy(network(batch["x1"].to(device))[1], batch["labels"].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    return network.eval()


@torch.no_grad()
def measure_accuracy(network: Classifier, data: TrainingData, device: torch.device | str = "cpu") -> float:
    """Share of the held-out images whose class it finds."""
    right = 0
    for batch in data.val_dataloader():
        right += int((network(batch["x1"].to(device))[1].argmax(1).cpu() == batch["labels"]).sum())
    return right / data.num_val
