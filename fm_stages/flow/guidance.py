"""Classifier-free guidance: v = v_null + scale (v_label - v_null), within an interval of t.

Source: arXiv 2207.12598, Eq. 6, for velocities; the interval arXiv 2404.07724.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fm_stages.flow.paths import expand_time
from fm_stages.flow.solvers import Velocity


@dataclass(frozen=True)
class Guidance:
    """How far, and where, the velocity is moved away from the one without a label.

    Attributes:
        scale: 1 leaves the velocity as it is; a tensor (B,) gives each sample its own.
        interval: of t, in which there is guidance.
        num_channels: how many channels it moves; None: all. 3 is what the published code of DiT and SiT does.

    Raises:
        ValueError: if the interval does not lie in [0, 1], or a number makes no sense.
    """

    scale: float | Tensor = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    num_channels: int | None = None

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"a guidance interval is two increasing times in [0, 1], got {low:g} {high:g}")
        scale = torch.as_tensor(self.scale)
        if not bool(((scale >= 0) & scale.isfinite()).all()):
            raise ValueError(f"a guidance scale must be 0 or more (1 is no guidance), got {self.scale}")
        if self.num_channels is not None and self.num_channels < 1:
            raise ValueError(f"guidance of num_channels={self.num_channels} channels: 1 or more, or None for all")

    @property
    def is_on(self) -> bool:
        """Whether it moves anything."""
        return bool((torch.as_tensor(self.scale) != 1).any())

    @property
    def nodes(self) -> tuple[float, ...]:
        """Times at which the velocity jumps, which the time grid needs as nodes."""
        return self.interval if self.is_on else ()

    def fields(self, network: nn.Module, labels: Tensor) -> list[tuple[float, Velocity]]:
        """The velocity as `integrate` takes it: plain, guided within the interval, plain again."""
        plain = (0.0, unguided(network, labels))
        if not self.is_on:
            return [plain]
        low, high = self.interval
        inside = (low, guided(network, labels, self.scale, self.num_channels))
        before = [plain] if low > 0 else []
        return [*before, inside, *([(high, plain[1])] if high < 1 else [])]


def unguided(network: nn.Module, labels: Tensor) -> Velocity:
    """The network's velocity for labels (B,), in float32."""
    return lambda x, t: network(x, t, labels).float()


def guided(network: nn.Module, labels: Tensor, scale: float | Tensor, num_channels: int | None = None) -> Velocity:
    """The guided velocity, in float32: one evaluation of the network, on a batch that holds guided samples twice.

    Args:
        network: ``network(x, t, y) -> velocity``, y = -1 for the null class.
        labels: (B,) int64; samples without a label (-1) are not guided.
        scale: one, or (B,); samples of scale 1 are not guided.
        num_channels: the first so many channels are moved, the others keep the label's velocity; None: all.
    """
    scales = torch.as_tensor(scale, dtype=torch.float32, device=labels.device).expand(len(labels))
    rows = ((labels != -1) & (scales != 1)).nonzero()[:, 0]
    twice = torch.cat([labels, torch.full_like(rows, -1)])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        both = network(torch.cat([x, x[rows]]), torch.cat([t, t[rows]]), twice).float()
        v, null = both[: len(x)], both[len(x) :, :num_channels]
        v[rows, :num_channels] = null + expand_time(scales[rows], null) * (v[rows, :num_channels] - null)
        return v

    return velocity
