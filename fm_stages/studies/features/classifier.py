"""A small classifier of small images, whose penultimate layer is an extractor: for data that Inception never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fm_stages.data import parse_json, to_model_range, whole_file, without_memory
from fm_stages.flow import keyed_generator
from fm_stages.studies.features.weights import digest_of, sha256_of

KIND = "fm-stages features"
"""What the header of a file says that it is."""


class Classifier(nn.Module):
    """Three convolutions, a layer of features, and one of logits.

    Args:
        in_channels: C of an image.
        image_size: its side, 4 or more.
        num_classes: K.
        num_features: F.
        widths: channels of the convolutions, each halving the side but the first.

    Raises:
        ValueError: if the image is smaller.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        num_features: int = 128,
        widths: tuple[int, int, int] = (16, 48, 64),
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"image_size={image_size} must be 4 or more: the side is halved twice")
        self.settings = {
            "in_channels": in_channels,
            "image_size": image_size,
            "num_classes": num_classes,
            "num_features": num_features,
            "widths": list(widths),
        }
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            pool = [nn.MaxPool2d(2)] if number else []
            layers += [*pool, nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        # no ReLU before what is compared: a feature that is nearly always 0 has hardly any variance
        self.features = nn.Sequential(nn.Linear(widths[-1] * (image_size // 4) ** 2, num_features), nn.SiLU())
        self.logits = nn.Linear(num_features, num_classes)

    def initialise(self, seed: int) -> None:
        """Draw the weights, which depend on the seed alone."""
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                nn.init.kaiming_normal_(
                    weight, nonlinearity="relu", generator=keyed_generator("classifier", seed, name)
                )
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F) and logits (B, K) of images (B, C, H, W), uint8, or float in [-1, 1]."""
        x = images if images.is_floating_point() else to_model_range(images)
        features = self.features(self.convolutions(x).flatten(1))
        return features, self.logits(features)


class ClassifierFeatures(nn.Module):
    """The penultimate layer of what ``fm-stages features`` trained.

    Args:
        file: that it wrote.
        sha256: that the file has to have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is another one.
    """

    def __init__(self, file: str, sha256: str | None = None) -> None:
        super().__init__()
        self.file = Path(file).expanduser()
        if not self.file.is_file():
            raise FileNotFoundError(
                f"there is no file {self.file}: fm-stages features trains a classifier and writes it"
            )
        digest = sha256_of(self.file)
        if sha256 is not None and digest != sha256.lower():
            raise ValueError(f"{self.file} has the sha256 {digest}, not {sha256}: it is another file, or was damaged")
        self.network, header = read_classifier(self.file)
        self.record: dict[str, Any] = {
            "file": str(self.file),
            "file_sha256": digest,
            "test_accuracy": header["test_accuracy"],
            "trained_on": header["training"]["data"],
            "input": "pixels in [-1, 1], at their own size",
        }

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise a ValueError for images of another size than those that it was trained on."""
        settings = self.network.settings
        own = (settings["in_channels"], settings["image_size"], settings["image_size"])
        if shape != own:
            raise ValueError(
                f"{self.file} was trained on images of {'x'.join(map(str, own))} (channels, height, width), these are "
                f"{'x'.join(map(str, shape))}: train another one on their data, as fm-stages features --config "
                f"configs/features_fashion_mnist.yaml --data.init_args.image_size {shape[1]} --out FILE"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F) and logits (B, K) of images (B, C, H, W) uint8."""
        features, logits = self.network(images)
        return features, logits


def write_classifier(path: Path, network: Classifier, test_accuracy: float, training: dict[str, Any]) -> None:
    """Write one ``.safetensors``: weights, and a header that says how the network is built and what it can do."""
    header = {
        "kind": KIND,
        "settings": json.dumps(network.settings),
        "test_accuracy": repr(test_accuracy),
        "training": json.dumps(training),
        "weights_sha256": digest_of(network),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with whole_file(path) as part:
        save_file(state, part, header)


def read_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """The network, and what the header says of it.

    Raises:
        ValueError: if the file is another one, or was damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("kind") != KIND:
                raise ValueError("its header names another kind of file")
            with without_memory(4 * path.stat().st_size, KIND, f"the file has {path.stat().st_size}"):
                network = Classifier(**parse_json(header["settings"], "its header"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            network.load_state_dict(weights, assign=True)
    except Exception as error:  # safetensors and torch fail in many ways
        raise ValueError(f"{path} is not what fm-stages features writes ({error})") from error
    if digest_of(network) != header.get("weights_sha256"):
        raise ValueError(f"{path} was damaged: its weights are not those that its header names; train it again")
    try:
        training = parse_json(header["training"], f"the header of {path}")
        said = {"test_accuracy": float(header["test_accuracy"]), "training": {"data": training["data"], **training}}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what fm-stages features writes ({error!r})") from error
    return network.eval(), header | said
