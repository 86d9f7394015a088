"""Timestep samplers: the training density of t, as a map from uniform numbers.

A sampler turns u ~ U(0,1) into t = icdf(u), so that two runs can share one stream of u, and stratified u give
stratified t. It never imports the oracle: what steers a density reaches it as numbers.
"""

import math
from abc import ABC, abstractmethod

import scipy.special
import torch
from torch import Tensor

LARGEST_TIME = 1 - 2**-24
"""The float32 just below 1: a draw of t never rounds to 1, where sigma is 0."""


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = t / (t + s (1 - t)): s > 1 moves mass towards noise; the inverse is the shift 1 / s.

    The same number as ``shift`` in diffusers and SD3 (arXiv 2403.03206, Eq. 23, there with time reversed).

    Args:
        t: any shape, in [0, 1].
        shift: s > 0.

    Returns:
        Shifted times, in the shape of ``t``.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"a shift must be positive and finite (1 leaves time as it is), got {shift}")
    return t / (t + shift * (1 - t))


class TimestepSampler(ABC):
    """A density on (0, 1), given by its quantile function, its distribution function and its logarithm."""

    @abstractmethod
    def icdf(self, u: Tensor) -> Tensor:
        """Quantiles t of ``u`` (any shape, in [0, 1)), in [0, 1)."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """Probability of a draw below ``t``."""

    @abstractmethod
    def log_prob(self, t: Tensor) -> Tensor:
        """Log density at ``t``."""

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Independent draws (num_samples,), float32, on the generator's device."""
        return self.icdf(torch.rand(num_samples, generator=generator, device=generator.device))


class UniformTimesteps(TimestepSampler):
    """t ~ U(0, 1), the choice of SiT."""

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return u.clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return t.clamp(0, 1)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return torch.where((t >= 0) & (t <= 1), 0.0, -math.inf).to(t.dtype)


class LogitNormalTimesteps(TimestepSampler):
    """logit(t) ~ N(mean, std^2).  Source: arXiv 2403.03206, Section 3.1.

    Args:
        mean: mean of logit(t); negative moves mass towards noise.
        std: standard deviation of logit(t).
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not math.isfinite(mean):
            raise ValueError(f"the mean of logit(t) must be a finite number, got {mean}")
        if not 0 < std < math.inf:
            raise ValueError(f"the standard deviation of logit(t) must be positive and finite, got {std}")
        self.mean = mean
        self.std = std

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        normal = torch.special.ndtri(u.double())
        return torch.sigmoid(self.mean + self.std * normal).to(u.dtype).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return torch.special.ndtr((torch.logit(t.double()) - self.mean) / self.std).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        z = (torch.logit(t.double()) - self.mean) / self.std
        jacobian = torch.log(t.double()) + torch.log1p(-t.double())
        log_prob = -0.5 * z**2 - math.log(self.std * math.sqrt(2 * math.pi)) - jacobian
        return torch.where((t > 0) & (t < 1), log_prob, -math.inf).to(t.dtype)  # both terms are infinite at the ends


class ModeTimesteps(TimestepSampler):
    """Mass near the middle (scale > 0) or near the ends (scale < 0): t = u + s (cos^2(pi u / 2) - 1 + u).

    Source: arXiv 2403.03206, Eq. 20, there with time reversed.

    Args:
        scale: s in [-1, 2 / (pi - 2)], where t rises with u; 1.29 did best there.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"the scale must lie in [-1, {2 / (math.pi - 2):.3f}], where t rises with u; got {scale}")
        self.scale = scale

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return self._quantile(u.double()).clamp(0, 1).to(u.dtype).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        wide = t.double().clamp(0, 1)
        low, high = torch.zeros_like(wide), torch.ones_like(wide)
        for _ in range(60):  # bisection, to the last digit: the quantile function has no inverse in closed form
            middle = (low + high) / 2
            below = self._quantile(middle) < wide
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high.where(wide > 0, 0.0).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        u = self.cdf(t.double())
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * u))  # dt / du
        return torch.where((t >= 0) & (t <= 1), -slope.clamp(min=0).log(), -math.inf).to(t.dtype)

    def _quantile(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


class BetaTimesteps(TimestepSampler):
    """t ~ Beta(alpha, beta). Quantiles come from scipy, on the CPU.

    Args:
        alpha: above 1 takes mass away from noise, below 1 puts it there.
        beta: likewise for data.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        if not min(alpha, beta) > 0 or not max(alpha, beta) < math.inf:
            raise ValueError(f"alpha={alpha} and beta={beta} must be positive")
        self.alpha, self.beta = alpha, beta

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        wide = u.double().cpu()
        t = torch.as_tensor(scipy.special.betaincinv(self.alpha, self.beta, wide.numpy()))
        # Below 1e-90 scipy gives up. There the distribution is the first term of its series, t^alpha / (alpha B).
        first = ((wide.log() + math.log(self.alpha) + scipy.special.betaln(self.alpha, self.beta)) / self.alpha).exp()
        return torch.where(t.isnan(), first, t).to(u).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        u = scipy.special.betainc(self.alpha, self.beta, t.double().clamp(0, 1).cpu().numpy())
        return torch.as_tensor(u).to(t)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        wide = t.double()
        log_prob = torch.special.xlogy(self.alpha - 1, wide) + torch.special.xlog1py(self.beta - 1, -wide)
        inside = (t >= 0) & (t <= 1)
        return torch.where(inside, log_prob - scipy.special.betaln(self.alpha, self.beta), -math.inf).to(t.dtype)
