"""A weighting that is learned: the inverse of the error that is to be expected at each t."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fm_stages.flow.generators import keyed_generator
from fm_stages.flow.paths import Path
from fm_stages.flow.timesteps import TimestepSampler
from fm_stages.flow.weighting import Weighting, even_times, over_density

NUM_FEATURES = 128
NUM_TIMES = 1024
"""Quantiles of the density of t over which the mean weight is made 1, anew at every step."""


class LearnedWeighting(Weighting, nn.Module):
    """w = exp(-u(t)), where u minimises error exp(-u) + u: the logarithm of the expected error, one scalar per t.

    u is linear in random Fourier features of log(sigma / alpha) / 4. The network sees the weights, of mean 1, as
    constants, and u sees the errors as constants, so that neither's learning rate depends on the other.
    After the uncertainty weighting of EDM2 (arXiv 2312.02696).
    """

    frequency: Tensor  # (F)
    phase: Tensor  # (F)
    quantiles: Tensor  # (Q)

    def __init__(self) -> None:
        nn.Module.__init__(self)
        generator = keyed_generator("uncertainty features")
        self.register_buffer("frequency", 2 * math.pi * torch.randn(NUM_FEATURES, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(NUM_FEATURES, generator=generator))
        self.register_buffer("quantiles", (torch.arange(NUM_TIMES) + 0.5) / NUM_TIMES, persistent=False)
        self.linear = nn.Linear(NUM_FEATURES, 1)
        nn.init.zeros_(self.linear.weight)  # all weights begin as 1
        nn.init.zeros_(self.linear.bias)

    def log_error(self, t: Tensor) -> Tensor:
        """u(t) (B,), float32."""
        alpha, sigma = (x.double().clamp(min=1e-6) for x in (self._path.alpha(t), self._path.sigma(t)))
        place = ((sigma / alpha).log() / 4).float()
        features = math.sqrt(2) * torch.cos(place[:, None] * self.frequency + self.phase)  # (B, F)
        return self.linear(features)[:, 0]

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        return torch.exp(-self.log_error(t)).to(t.dtype)

    @torch.no_grad()
    def __call__(self, t: Tensor) -> Tensor:
        """See `Weighting`."""
        if not self._importance:
            return self.relative(t, self._path) / self.relative(self._timesteps.icdf(self.quantiles), self._path).mean()
        times, share = even_times(self.quantiles, self._timesteps)
        weight = self.relative(t, self._path) / (share * self.relative(times, self._path)).mean()
        return over_density(weight, t, self._timesteps)

    def own_loss(self, t: Tensor, error: Tensor) -> Tensor:
        """Mean of error exp(-u) + u, for errors (B,) at times (B,)."""
        log_error = self.log_error(t)
        return (error.detach() * torch.exp(-log_error) + log_error).mean()

    def prepare(self, path: Path, timesteps: TimestepSampler, importance: bool = False) -> None:
        """See `Weighting`; the mean follows the weights at every step."""
        self._path, self._timesteps, self._importance = path, timesteps, importance
