"""The published extractors: the Inception network that FID was defined with, and DINOv2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fm_stages.studies.features.weights import find_weights, read_weights

INSTALL = "pip install 'fm-stages[eval]'"
"""How torch-fidelity gets here."""

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""Where torch-fidelity publishes the weights; the last part of the name is how their sha256 begins."""

GREY = "grey images repeated to 3 channels"


class InceptionFeatures(nn.Module):
    """The 2048 features behind the last pooling of the Inception network of 2015, by torch-fidelity.

    Images are resized to 299x299 bilinearly as TensorFlow 1 did it, without antialiasing, and scaled to (x - 128) /
    128; grey ones are repeated to three channels. Its logits, without their bias, make the Inception score.

    Args:
        weights: torch-fidelity's file; None: from among torch's downloads, or from the network.
        sha256: that the file has to have.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if torch-fidelity is not installed, or the file is another one.
    """

    def __init__(self, weights: str | None = None, sha256: str | None = None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ValueError(f"InceptionFeatures is torch-fidelity's network, which is missing: {INSTALL}") from error
        name = INCEPTION.rpartition("/")[2]
        path, digest = find_weights(weights, sha256, INCEPTION, name)
        read_weights(path)  # torch-fidelity unpickles whatever the file holds: here it is seen to be tensors alone
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} holds the weights of another network than {INCEPTION}") from error
        published = digest.startswith(name.removesuffix(".pth").rpartition("-")[2])
        self.record: dict[str, Any] = {
            "file": str(path),
            "file_sha256": digest,
            "input": f"resized to 299x299 (bilinear, as TensorFlow 1), (x - 128) / 128, {GREY}",
        }
        if not published:
            self.record["warning"] = (
                f"{path} is not the published file, by its sha256: no FID by it compares to others."
            )

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise a ValueError for images that are neither grey nor RGB."""
        check_channels(self, shape)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and logits (B, 1008) of images (B, C, H, W) uint8."""
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


class DinoFeatures(nn.Module):
    """The class token of DINOv2 after the last norm, by timm.

    Images are resized to a square bicubically, with antialiasing, and normalised with the mean and deviation of
    ImageNet; grey ones are repeated to three channels.

    Source: arXiv 2306.04675 compares with the features of ViT-L/14 at 224x224.

    Args:
        weights: file of timm or of the authors; None: from among torch's downloads, or from the network.
        sha256: that the file has to have.
        model: timm's name of a DINOv2.
        image_size: side of the square, a multiple of the patch.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if there is no such model, or the file is of another one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str | None = None,
        sha256: str | None = None,
        model: str = "vit_large_patch14_dinov2.lvd142m",
        image_size: int = 224,
    ) -> None:
        super().__init__()
        import timm  # takes a second to import
        from timm.models.vision_transformer import checkpoint_filter_fn

        names = timm.list_pretrained("*dinov2*")
        if model not in names:
            raise ValueError(f"model {model!r} is no DINOv2 of timm: there are {', '.join(names)}")
        url = f"https://huggingface.co/timm/{model}/resolve/main/model.safetensors"
        path, digest = find_weights(weights, sha256, url, f"{model}.safetensors")
        state = read_weights(path)
        try:
            network: Any = timm.create_model(model, num_classes=0, img_size=image_size)
        except AssertionError as error:
            raise ValueError(f"image_size={image_size} does not divide into the patches of {model}: {error}") from error
        try:
            network.load_state_dict(checkpoint_filter_fn(state, network))
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path} holds the weights of another network than {model}") from error
        self.network, self.size = network, image_size
        config = network.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1), persistent=False)
        self.record: dict[str, Any] = {
            "model": model,
            "file": str(path),
            "file_sha256": digest,
            "input": f"resized to {image_size}x{image_size} (bicubic, antialiased), ImageNet's mean and std, {GREY}",
        }

    def check(self, shape: tuple[int, int, int]) -> None:
        """Raise a ValueError for images that are neither grey nor RGB."""
        check_channels(self, shape)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W) uint8."""
        x = images.float()
        if x.shape[-2:] != (self.size, self.size):
            x = nn.functional.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 255)
        return self.network((x.expand(-1, 3, -1, -1) / 255 - self.mean) / self.std)


def check_channels(module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise a ValueError for images (C, H, W) that are neither grey nor RGB."""
    if shape[0] not in (1, 3):
        raise ValueError(f"{type(module).__name__} takes images of 1 or 3 channels, these have {shape[0]}")
