"""Densities of t made from others: shifted, or cut to an interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fm_stages.flow.timesteps import LARGEST_TIME, TimestepSampler, UniformTimesteps, shift_time


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


class ResolutionShiftedTimesteps(ShiftedTimesteps):
    """Shifted by the root of the number of values over that of a reference: more values need more noise.

    Source: arXiv 2403.03206, Eq. 23, where m and n are numbers of pixels; arXiv 2510.11690 takes all values of a
    latent and 4096 as the reference.

    Args:
        num_dims: values per training row.
        reference_dims: number of values at which the base serves as it is.
        base: the sampler whose draws are shifted; uniform by default.
    """

    def __init__(self, num_dims: int, reference_dims: int = 4096, base: TimestepSampler | None = None) -> None:
        if num_dims < 1 or reference_dims < 1:
            raise ValueError(f"num_dims={num_dims} and reference_dims={reference_dims} must be 1 or more")
        super().__init__(math.sqrt(num_dims / reference_dims), base)


class TruncatedTimesteps(TimestepSampler):
    """The draws of another sampler that fall into an interval: what trains a specialist for one stage.

    Args:
        low: start of the interval, in [0, 1).
        high: its end, in (0, 1].
        base: the sampler that is cut; uniform by default.

    Raises:
        ValueError: if this is no interval, or the base has less than a millionth of its draws there.
    """

    def __init__(self, low: float, high: float, base: TimestepSampler | None = None) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"[{low}, {high}] is no interval in [0, 1]")
        self.low, self.high = low, high
        self.base = base if base is not None else UniformTimesteps()
        ends = torch.tensor([low, high], dtype=torch.float64)
        self._below, above = self.base.cdf(ends).tolist()
        self._mass = above - self._below
        if not self._mass > 1e-6:
            raise ValueError(
                f"{type(self.base).__name__} has no draws to speak of in [{low}, {high}] ({self._mass:.1e} of them): "
                "choose another base or interval"
            )

    def icdf(self, u: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        t = self.base.icdf(self._below + self._mass * u.double())
        return t.clamp(self.low, self.high).to(u.dtype).clamp(max=LARGEST_TIME)

    def cdf(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        return ((self.base.cdf(t.double()) - self._below) / self._mass).clamp(0, 1).to(t.dtype)

    def log_prob(self, t: Tensor) -> Tensor:
        """See `TimestepSampler`."""
        inside = (t >= self.low) & (t <= self.high)
        return torch.where(inside, self.base.log_prob(t) - math.log(self._mass), -math.inf).to(t.dtype)


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
