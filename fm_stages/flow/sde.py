"""The flow's SDE: dx = (v + w/2 score) dt + sqrt(w) dW has the marginals of the ODE dx = v dt for any w(t) >= 0.

Source: arXiv 2401.08740 (SiT) and its published code, whose time runs as ours. What that code calls the diffusion is
w / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import torch
from torch import Tensor

from fm_stages.flow.generators import keyed_normal
from fm_stages.flow.paths import Path, expand_time
from fm_stages.flow.solvers import Solver, Velocity


def _sbdm(path: Path, t: Tensor) -> Tensor:
    return path.d_alpha(t) / path.alpha(t) * path.sigma(t) ** 2 - path.sigma(t) * path.d_sigma(t)


DIFFUSIONS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "constant": lambda path, t: torch.ones_like(t),
    "sbdm": _sbdm,
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
}
"""w / 2 by its name in SiT. ``sbdm`` is that of the diffusion whose forward process adds noise to alpha-scaled data; it
is infinite where alpha is 0."""


@dataclass(frozen=True)
class EulerMaruyama:
    """Solver of the SDE by Euler-Maruyama steps: one evaluation per step, none at the end.

    The step that ends at t = 1, and one that starts where w is infinite, is an Euler step of the ODE without noise: at
    t = 1 the score is undefined; and at t = 0 the state has its marginal law already.

    Attributes:
        path: that the velocity was trained on, which gives the score.
        diffusion: one of `DIFFUSIONS`.
        scale: multiplies w; 0 is the ODE.

    Raises:
        ValueError: if the diffusion is unknown, or the scale negative.
    """

    path: Path
    diffusion: str = "sigma"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.diffusion not in DIFFUSIONS:
            raise ValueError(f"there is no diffusion {self.diffusion!r}; there are {', '.join(DIFFUSIONS)}")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"the diffusion's scale must be 0 or more, got {self.scale}")

    def w(self, t: Tensor) -> Tensor:
        """The SDE's squared coefficient of noise at times (B,): (B,)."""
        return 2 * self.scale * DIFFUSIONS[self.diffusion](self.path, t)

    def seeded(self, seed: int, index: Tensor) -> Solver:
        """A solver of one batch, from its start to its end, whose noise depends on seed, sample and step alone.

        Args:
            seed: of the noise.
            index: (B,) int64, the number of each sample.
        """
        steps = count()  # goes on from one part of the grid to the next

        def noise(x: Tensor) -> Iterator[Tensor]:
            for step in steps:
                # drawn on the CPU, so that one seed means one picture on every machine
                yield keyed_normal(("sde", seed, step), index, tuple(x.shape[1:])).to(x)

        return lambda velocity, x0, grid: self.solve(velocity, x0, grid, noise(x0))

    def solve(self, velocity: Velocity, x0: Tensor, grid: Tensor, noise: Iterator[Tensor]) -> Tensor:
        """From the state (B, ...) at ``grid[0]`` to that at ``grid[-1]``, with one of ``noise`` (B, ...) per step."""
        x = x0
        for start, end in pairwise(grid.to(x0)):
            t = start.expand(len(x))
            step, v, w, normal = end - start, velocity(x, t), self.w(t), next(noise)
            if end < 1 and bool(w.isfinite().all()):
                drift = v + expand_time(w / 2, x) * self.path.score(v, x, t)
                x = x + step * drift + expand_time((step * w).sqrt(), x) * normal
            else:
                x = x + step * v
        return x
