"""Timestep samplers: the training density of t, as a map from uniform numbers.

A sampler turns u ~ U(0,1) into t = icdf(u), so that two runs can share one stream of u, and stratified u give
stratified t. It never imports the oracle: what steers a density reaches it as numbers.
"""

import math
from abc import ABC, abstractmethod

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
    if not shift > 0:
        raise ValueError(f"a shift must be positive (1 leaves time as it is), got {shift}")
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
        if not std > 0:
            raise ValueError(f"the standard deviation of logit(t) must be positive, got {std}")
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


class ShiftedTimesteps(TimestepSampler):
    """The draws of another sampler, moved by `shift_time`.

    Args:
        shift: s > 0; above 1 moves mass towards noise.
        base: the sampler whose draws are shifted; uniform by default.
    """

    def __init__(self, shift: float, base: TimestepSampler | None = None) -> None:
        shift_time(torch.zeros(1), shift)  # refuses a bad shift now, before any training
        self.shift = shift
        self.base = base if base is not None else UniformTimesteps()

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return shift_time(self.base.icdf(u).double(), self.shift).to(u.dtype).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return self.base.cdf(shift_time(t, 1 / self.shift))

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        inverse = 1 / self.shift
        jacobian = math.log(inverse) - 2 * torch.log(t + inverse * (1 - t))  # log of d(unshifted t) / dt
        return self.base.log_prob(shift_time(t, inverse)) + jacobian


def shift_for_share(share: float, time: float, base: TimestepSampler | None = None) -> float:
    """The shift s with which ``share`` of the draws fall before ``time``; of a time grid, that share of the steps.

    A draw t of the base becomes t / (t + s (1 - t)), which is below ``time`` where t is below the base's quantile q of
    the share: s = q (1 - time) / ((1 - q) time). With a uniform base q is the share.

    Args:
        share: of the draws, in (0, 1).
        time: in (0, 1).
        base: the sampler whose draws are shifted; uniform by default.

    Returns:
        s > 0.

    Raises:
        ValueError: if share or time is not inside (0, 1).
    """
    if not 0 < share < 1 or not 0 < time < 1:
        raise ValueError(f"no shift puts a share of {share} of the draws before t = {time}: both must lie in (0, 1)")
    q = (base or UniformTimesteps()).icdf(torch.tensor(share, dtype=torch.float64)).item()
    return q * (1 - time) / ((1 - q) * time)
