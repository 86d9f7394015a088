"""Networks and settings, ready to draw: what ``fm-stages sample`` writes and ``fm-stages evaluate`` measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse import Namespace
from torch import Tensor, nn

from fm_stages.data import TrainingData
from fm_stages.flow import sample
from fm_stages.studies.experts import check_stages, load_networks
from fm_stages.studies.models import labels_of
from fm_stages.studies.sample.options import Settings
from fm_stages.training import FlowMatching


@dataclass
class Drawing:
    """What draws image i.

    Attributes:
        files: checkpoints of the networks, one or two.
        networks: of these, on the device.
        module: of the first, which says path and label dropout.
        settings: checked against the networks.
        shape: (C, H, W) of what they draw.
        num_classes: labels that they know.
        data: that they were trained on, not read yet; None of imported networks.
        device: where they draw.
        notes: what is to be said of them.
    """

    files: Sequence[str]
    networks: Sequence[nn.Module]
    module: FlowMatching
    settings: Settings
    shape: tuple[int, int, int]
    num_classes: int
    data: TrainingData | None
    device: torch.device
    notes: Sequence[str]

    @classmethod
    def of(cls, options: Namespace, device: torch.device) -> Drawing:
        """From options of `add_drawing_options`, which were checked.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it is none, or its network cannot do what is asked for.
        """
        files = options.expert or [options.ckpt]
        trained = load_networks(files, options.weights)
        settings = Settings.of(options, trained)
        notes = check_stages(files, trained, settings.split)
        data = next((one.data for one in trained if one.data), None)
        networks = [one.network.to(device) for one in trained]
        first = trained[0]
        return cls(
            files, networks, first.module, settings, first.shape, first.num_classes, data, device, notes
        )  # fmt: skip

    def labels(self, index: Tensor) -> Tensor:
        """Labels (B,) of images (B,) by their numbers, -1 = without."""
        plain = self.settings.plain
        return labels_of(index, plain["labels"], self.num_classes, plain["seed"])

    def draw(self, index: Tensor) -> Tensor:
        """Images (B, *shape) with these numbers (B,), in the units of the network.

        Raises:
            ValueError: if they are not finite.
        """
        plain, settings = self.settings.plain, self.settings
        starts = [0.0, settings.split or 0.0]  # of which one network takes the first
        experts = list(zip(starts, self.networks, strict=False))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=plain["precision"] == "bf16"):
            images = sample(
                experts, self.labels(index).to(self.device), self.shape, plain["seed"], index=index,
                solver=settings.solver, guidance=settings.guidance, grid=settings.grid,
            )  # fmt: skip
        if not bool(images.isfinite().all()):
            raise ValueError(
                f"{' and '.join(self.files)} with these settings draws values that are not finite, which are no image: "
                "its training may have diverged"
            )
        return images
