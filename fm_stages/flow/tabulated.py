"""A density of t given by a table: the one that controllers write to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fm_stages.flow.timesteps import LARGEST_TIME, TimestepSampler


class TabulatedTimesteps(TimestepSampler):
    """A density that is linear between nodes.  K + 1 nodes make K bins.

    Args:
        nodes: increasing times, from 0 to 1.
        density: at the nodes, 0 or more, of any scale; uniform by default.

    Raises:
        ValueError: if the nodes do not rise from 0 to 1, or the density is negative, not finite, or 0 everywhere.
    """

    def __init__(self, nodes: Sequence[float], density: Sequence[float] | None = None) -> None:
        if (
            len(nodes) < 2
            or nodes[0] != 0
            or nodes[-1] != 1
            or any(b <= a for a, b in zip(nodes, nodes[1:], strict=False))
        ):
            raise ValueError(f"nodes must increase from 0 to 1, got {list(nodes)}")
        self.nodes = [float(t) for t in nodes]
        self.write([1.0] * len(nodes) if density is None else density)

    def write(self, density: Sequence[float]) -> None:
        """Replace the density; what is drawn from now on follows it.

        Args:
            density: at the nodes (K + 1), 0 or more, of any scale.
        """
        if len(density) != len(self.nodes) or not all(0 <= p < math.inf for p in density) or not sum(density) > 0:
            raise ValueError(
                f"a density has one number of 0 or more for each of {len(self.nodes)} nodes, and not 0 for all: got "
                f"{list(density)}"
            )
        t, p = (torch.tensor(values, dtype=torch.float64) for values in (self.nodes, density))
        mass = (t[1:] - t[:-1]) * (p[1:] + p[:-1]) / 2  # (K)
        if not mass.sum() > 0:
            raise ValueError(f"the density {list(density)} has no mass between its nodes")
        self._t, self._p = t, p / mass.sum()
        self._cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), (mass / mass.sum()).cumsum(0)])  # (K + 1)
        self._cumulative[-1] = 1.0

    @property
    def density(self) -> list[float]:
        """At the nodes (K + 1), of integral 1."""
        return self._p.tolist()

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        wide = u.double()
        t, p, cumulative = (x.to(u.device) for x in (self._t, self._p, self._cumulative))
        k = (torch.searchsorted(cumulative, wide, right=True) - 1).clamp(0, len(t) - 2)  # bins without mass are skipped
        width, start, slope = t[k + 1] - t[k], p[k], p[k + 1] - p[k]
        mass = (wide - cumulative[k]) / width
        # mass = start x + slope x^2 / 2 for x in [0, 1], solved without cancellation
        root = (start.square() + 2 * slope * mass).clamp(min=0).sqrt()
        x = (2 * mass / (start + root).clamp(min=1e-300)).clamp(0, 1)
        return (t[k] + width * x).to(u.dtype).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        wide = t.double().clamp(0, 1)
        k, x = self._place(wide)
        nodes, p, cumulative = (values.to(t.device) for values in (self._t, self._p, self._cumulative))
        mass = (nodes[k + 1] - nodes[k]) * (p[k] * x + (p[k + 1] - p[k]) * x.square() / 2)
        return (cumulative[k] + mass).clamp(0, 1).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        k, x = self._place(t.double().clamp(0, 1))
        p = self._p.to(t.device)
        log = torch.log(p[k] + (p[k + 1] - p[k]) * x)
        return torch.where((t >= 0) & (t <= 1), log, -math.inf).to(t.dtype)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The bin of each time, and where in it, in [0, 1]."""
        nodes = self._t.to(t.device)
        k = (torch.searchsorted(nodes, t, right=True) - 1).clamp(0, len(nodes) - 2)
        return k, (t - nodes[k]) / (nodes[k + 1] - nodes[k])
