"""Feature extractors, by which images are compared: what any network has to do to be one, and how it is used.

An extractor is an ``nn.Module``, given by its class path::

    forward(images)   # uint8 (B, C, H, W), as the data has them -> features (B, F), or a pair: features, logits (B, K)

Resizing, channels and units are its own business. It may have ``check(shape)``, which raises a ValueError for images
(C, H, W) that it cannot take, and ``record``, plain data that a report says of it; its ``warning`` goes to the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fm_stages.studies.features.weights import digest_of


@dataclass
class Extractor:
    """A network that was tried on images of a shape.

    Attributes:
        module: the network, in evaluation mode, on the device.
        shape: (C, H, W) of the images.
        device: where it runs.
        num_features: F.
        num_classes: K; None where it gives no logits.
        record: what a report says of it.
    """

    module: nn.Module
    shape: tuple[int, int, int]
    device: torch.device
    num_features: int
    num_classes: int | None
    record: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, shape: tuple[int, int, int], device: torch.device) -> Extractor:
        """Try a network on two black images.

        Raises:
            ValueError: if it cannot take such images, or what it gives are no features.
        """
        if check := getattr(module, "check", None):
            check(shape)
        name = type(module).__name__
        module = module.eval().requires_grad_(False).to(device)
        own = getattr(module, "record", None)
        record = {"class": f"{type(module).__module__}.{type(module).__qualname__}", **(own or {})}
        extractor = cls(module, shape, device, 0, None, record | {"weights_sha256": digest_of(module)})
        try:
            features, logits = extractor._forward(torch.zeros(2, *shape, dtype=torch.uint8))
        except ValueError:
            raise
        except Exception as error:  # another one's network fails in many ways
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{name} fails on images of {'x'.join(map(str, shape))} ({type(error).__name__}: {reason}): it is "
                "given uint8 images (B, C, H, W), and resizes and scales them itself"
            ) from error
        extractor.num_features = features.shape[1]
        extractor.num_classes = None if logits is None else logits.shape[1]
        extractor.record["num_features"] = extractor.num_features
        return extractor

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, F) and logits (B, K), float32 on the CPU, of images (B, C, H, W) uint8.

        Raises:
            ValueError: if they are not finite.
        """
        features, logits = self._forward(images)
        for name, values in (("features", features), ("logits", logits)):
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(
                    f"{type(self.module).__name__} gives {name} that are not finite: its weights are damaged, or its "
                    "input is not what it was trained on"
                )
        return features, logits

    @torch.no_grad()
    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        given = self.module(images.to(self.device))
        features, logits = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        for values in (features, logits):
            if values is None and features is not None:
                continue
            if not isinstance(values, Tensor) or values.ndim != 2 or len(values) != len(images) or not values.shape[1]:
                what = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"{type(self.module).__name__} gives {what} for {len(images)} images: features are (B, F), "
                    "alone or as a pair with logits (B, K)"
                )
        return features.float().cpu(), None if logits is None else logits.float().cpu()
