"""What is measured of every run of a comparison: the same probe of inputs, noise and times, and samples from one noise.

Nothing here depends on the arm or on its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.kid import poly_mmd

from fm_stages.data import TrainingData
from fm_stages.flow import keyed_generator, sample
from fm_stages.oracle import Curves, StageProfile, oracle_of
from fm_stages.studies.diagnose.measure import diagnose
from fm_stages.training import FlowMatching, network_weights, read_checkpoint

METRICS = {
    "gap": "gap, all t",
    "gap_navigation": "gap, navigation",
    "gap_refinement": "gap, refinement",
    "regular": "regular loss, training",
    "held_out_regular": "regular loss, held-out",
    "held_out_gap_navigation": "held-out gap, navigation",
    "pixel_mmd": "pixel MMD (not FID)",
}
"""Names of the numbers in words; of all of them less is better."""

PROGRESS = [name for name in METRICS if name != "pixel_mmd"]
"""What is measured along the way, too."""

NUM_SUBSETS = 10
"""Disjoint parts of the samples, whose spread gives the error of the mean."""

CHUNK = 250
"""Samples that are drawn together, so that memory does not grow with their number."""


@dataclass(frozen=True)
class ProbeSettings:
    """How much is measured. Part of what a comparison is: numbers of different probes cannot be paired.

    Attributes:
        num_probe: training images and held-out images, each with one noise and one t.
        num_samples: generated images.
        solver_steps: Euler steps of each.
        milestones: times along the run at which it is measured, the last one being its end.
        seed: of noise, times and labels.
    """

    num_probe: int = 2048
    num_samples: int = 1000
    solver_steps: int = 50
    milestones: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("num_probe", 2), ("num_samples", 2 * NUM_SUBSETS), ("solver_steps", 1), ("milestones", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be {least} or more")


class Probe:
    """Measures networks on inputs that are the same for all of them.

    Args:
        module: of the base: says path and label dropout.
        data: of the base.
        profile: the stages of the data.
        settings: how much.
        device: where to measure.
    """

    def __init__(
        self, module: FlowMatching, data: TrainingData, profile: StageProfile, settings: ProbeSettings, device: str
    ) -> None:
        self.module, self.data, self.profile, self.settings, self.device = module, data, profile, settings, device
        held_out: Any = data.val_dataloader().dataset
        num = min(settings.num_samples, len(held_out)) // NUM_SUBSETS * NUM_SUBSETS
        if num < 2 * NUM_SUBSETS:
            raise ValueError(f"{len(held_out)} held-out images are too few to compare samples with: hold out 20")
        chosen = torch.randperm(len(held_out), generator=keyed_generator("pixel mmd", settings.seed))[:num]
        batch = held_out[chosen, torch.arange(num)]
        self.images: Tensor = batch["x1"]  # (N, C, H, W)
        labelled = data.num_classes > 0 and module.label_dropout < 1
        self.labels: Tensor = batch["labels"] if labelled else torch.full_like(batch["labels"], -1)

    def measure(self, network: nn.Module, checkpoint: dict[str, Any], milestones: Sequence[Path]) -> dict[str, Any]:
        """All numbers of one run.

        Args:
            network: of the run's shape; its weights are replaced.
            checkpoint: of the run's end, as `read_checkpoint` gives it.
            milestones: checkpoints along the way.

        Returns:
            ``weights``: by kind (raw and, where they are kept, ema) the final `METRICS`, ``floor`` and ``curves``;
            ``milestones``: what `PROGRESS` names, by ``step``. Samples and milestones are of the averaged weights, or
            of the raw ones where there are no others.
        """
        network.to(self.device)
        states = {"raw": network_weights(checkpoint, ema=False), "ema": network_weights(checkpoint, ema=True)}
        kinds = {kind: state for kind, state in states.items() if state is not None}
        found: dict[str, Any] = {}
        for kind, state in kinds.items():
            train, held_out = self._curves(network, state)
            found[kind] = {**self._numbers(train, held_out), "curves": {"train": asdict(train)}}
            found[kind]["curves"]["held_out"] = asdict(held_out)
        last = list(kinds)[-1]
        value, error = pixel_mmd(self.images, self._draw(network))
        found[last].update(pixel_mmd=value, pixel_mmd_sem=error)
        along = {checkpoint["global_step"]: {name: found[last][name] for name in PROGRESS}}
        for earlier in map(read_checkpoint, milestones):
            if earlier["global_step"] not in along:
                numbers = self._numbers(*self._curves(network, network_weights(earlier, ema=last == "ema") or {}))
                along[earlier["global_step"]] = {name: numbers[name] for name in PROGRESS}
        self.data.bank().to("cpu")  # the next run needs the memory
        network.cpu()
        return {"weights": found, "milestones": [{"step": step, **along[step]} for step in sorted(along)]}

    def _curves(self, network: nn.Module, state: dict[str, Tensor]) -> tuple[Curves, Curves]:
        network.load_state_dict(state)
        probe = self.settings.num_probe, self.settings.seed, self.profile, False
        return diagnose(self.module, network, self.data, *probe)[:2]

    def _numbers(self, train: Curves, held_out: Curves) -> dict[str, float]:
        b = self.profile.boundary
        return {
            "gap": train.average("gap"),
            "gap_navigation": train.average("gap", 0, b),
            "gap_refinement": train.average("gap", b, 1),
            "regular": train.average("regular"),
            "floor": train.average("floor"),
            "held_out_regular": held_out.average("regular"),
            "held_out_gap_navigation": held_out.average("gap", 0, b),
        }

    def _draw(self, network: nn.Module) -> Tensor:
        """As many images as there are to compare with, of the same classes, from one noise."""
        network.eval()
        shape, seed, num_steps = self.data.shape, self.settings.seed, self.settings.solver_steps
        drawn = [
            sample(network, self.labels[index].to(self.device), shape, seed, num_steps, index=index)
            for index in torch.arange(len(self.labels)).split(CHUNK)
        ]
        return torch.cat(drawn).cpu()


def pixel_mmd(real: Tensor, drawn: Tensor) -> tuple[float, float]:
    """Squared maximum mean discrepancy of pixels, with the kernel (x.y / D + 1)^3. No FID: nothing looks at content.

    The estimator is unbiased, so that a perfect model is at 0 on average and some numbers are negative. Source: the
    kernel and the estimator of KID (arXiv 1801.01401), on pixels in place of features.

    Args:
        real: (N, ...) images.
        drawn: (N, ...) others.

    Returns:
        Mean over `NUM_SUBSETS` disjoint parts, and its standard error.
    """
    pairs = zip(real.flatten(1).double().chunk(NUM_SUBSETS), drawn.flatten(1).double().chunk(NUM_SUBSETS), strict=True)
    parts = torch.stack([poly_mmd(x, y) for x, y in pairs])
    return parts.mean().item(), parts.std().item() / len(parts) ** 0.5


def measure_stages(module: FlowMatching, data: TrainingData, device: str, say: Callable[[str], None]) -> StageProfile:
    """The stages of the base's data, for the mix of labels that the base's network sees."""
    say("Measuring the stages of the data, once for all runs ...")
    bank = data.bank()
    profile = StageProfile.measure(oracle_of(bank.to(device), module.path), module.label_dropout, num_queries=512)
    bank.to("cpu")
    return profile
