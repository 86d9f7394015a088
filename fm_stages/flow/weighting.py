"""Loss weightings: how much the squared error of the velocity at time t counts in the training objective.

A weighting says only how weights compare; `Weighting.prepare` divides by their mean, so that a learning rate means the
same under all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fm_stages.flow.paths import LinearPath, Path
from fm_stages.flow.timesteps import TimestepSampler, UniformTimesteps

NUM_QUANTILES = 2**16
"""Of the density of t, over which weights are averaged."""

WIDTH = 0.25
"""Of the hand-over between the stages, in logit(t)."""


class Weighting(ABC):
    """A weight for each sample's loss, with mean 1 under the density that t is drawn from.

    Prepared for uniform t on the linear path until `prepare` says otherwise.
    """

    _path: Path = LinearPath()
    _timesteps: TimestepSampler = UniformTimesteps()
    _importance = False
    _mean: float | None = None

    @abstractmethod
    def relative(self, t: Tensor, path: Path) -> Tensor:
        """Weights (B,) at times (B,), in their dtype, before their mean is made 1."""

    def prepare(self, path: Path, timesteps: TimestepSampler, importance: bool = False) -> None:
        """Make the mean 1 for this path and density.

        Args:
            path: between noise and data.
            timesteps: the density that t is drawn from.
            importance: whether weights are divided by the density, so that the objective is the one of uniform t
                wherever t is drawn; of uniform t where it can be drawn, if the density is 0 somewhere.

        Raises:
            ValueError: if the mean is infinite, as that of 1 / sigma^2 under uniform t.
        """
        self._path, self._timesteps, self._importance = path, timesteps, importance
        coarse, fine = (self._average(num) for num in (NUM_QUANTILES // 64, NUM_QUANTILES))
        if not 0 < fine < math.inf or fine > 1.2 * coarse:  # a mean that grows with the number of quantiles is infinite
            density = UniformTimesteps if importance else type(timesteps)
            raise ValueError(
                f"the mean of {type(self).__name__} is infinite under {density.__name__} (or 0): give it a "
                "largest weight, where it takes one, or choose another density"
            )
        self._mean = fine

    def __call__(self, t: Tensor) -> Tensor:
        """Weights (B,) for times ``t`` (B,), in their dtype."""
        if self._mean is None:
            self.prepare(self._path, self._timesteps, self._importance)
        assert self._mean is not None
        wide = t.double()
        weight = self.relative(wide, self._path) / self._mean
        return (over_density(weight, wide, self._timesteps) if self._importance else weight).to(t.dtype)

    def own_loss(self, t: Tensor, error: Tensor) -> Tensor | float:
        """What a weighting with weights of its own minimises, given the errors (B,) at times (B,)."""
        return 0.0

    def _average(self, num: int) -> float:
        u = (torch.arange(num, dtype=torch.float64) + 0.5) / num
        t, share = even_times(u, self._timesteps) if self._importance else (self._timesteps.icdf(u), torch.ones_like(u))
        return (share * self.relative(t.clamp(max=self._path.max_time), self._path)).mean().item()


def even_times(u: Tensor, timesteps: TimestepSampler) -> tuple[Tensor, Tensor]:
    """Times (Q), even over where draws can fall, and what each counts (Q): means are integrals dt over these times.

    Args:
        u: even over (0, 1) (Q).
        timesteps: the density that draws come from; it may be 0 somewhere, as one that is truncated is.
    """
    low, high = timesteps.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64, device=u.device)).to(u)
    t = low + (high - low) * u
    return t, torch.where(timesteps.log_prob(t) > -math.inf, high - low, 0.0)


def over_density(weight: Tensor, t: Tensor, timesteps: TimestepSampler) -> Tensor:
    """Importance weights (B,); 0 for a draw that rounding has moved to where the density is 0."""
    log_prob = timesteps.log_prob(t)
    return torch.where(log_prob > -math.inf, weight * torch.exp(-log_prob), 0.0)


class UniformWeighting(Weighting):
    """Every t counts alike: the density of t alone decides where the network learns."""

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        return torch.ones_like(t)


class MinSNRWeighting(Weighting):
    """The error of the data prediction times min(SNR, gamma): w = min(alpha^2 / sigma^2, gamma) / A_t^2.

    After arXiv 2303.09556, carried over to velocities: a velocity's error is A_t times that of the data.

    Args:
        gamma: where the signal-to-noise ratio is cut off.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        # A_t = w / sigma: multiplied through by sigma^2, for at t = 1 both SNR and A_t are infinite
        alpha, sigma = path.alpha(t), path.sigma(t)
        return torch.minimum(alpha.square(), self.gamma * sigma.square()) / (path.mean_coefficient(t) * sigma).square()


class SigmaSqrtWeighting(Weighting):
    """w = 1 / sigma^2: "sigma_sqrt" in diffusers' `compute_loss_weighting_for_sd3`.

    Args:
        largest: of 1 / sigma^2, before the mean is made 1. Its mean under uniform t would be infinite without one.
    """

    def __init__(self, largest: float = 100.0) -> None:
        if not largest > 1:
            raise ValueError(f"the largest weight must be above 1, its smallest; got {largest}")
        self.largest = largest

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        return (1 / path.sigma(t).square()).clamp(max=self.largest)


class CosMapWeighting(Weighting):
    """w = 2 / (pi (1 - 2 sigma + 2 sigma^2)), most in the middle: "cosmap" in diffusers, after arXiv 2403.03206."""

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        sigma = path.sigma(t)
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))


class InverseErrorWeighting(Weighting):
    """w = 1 / error(t) of a measured error, such as floor + gap: all times contribute alike to the loss.

    Args:
        t: increasing times (K).
        error: measured there, positive (K); linear between them, constant beyond.
    """

    def __init__(self, t: Sequence[float], error: Sequence[float]) -> None:
        if len(t) < 1 or len(t) != len(error) or any(b <= a for a, b in zip(t, t[1:], strict=False)):
            raise ValueError(f"need increasing times and an error for each: got {len(t)} times, {len(error)} errors")
        if not all(0 < e < math.inf for e in error):
            raise ValueError(f"errors must be positive, got {list(error)}")
        self.t, self.error = list(t), list(error)

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        return torch.as_tensor(1 / np.interp(t.cpu().numpy(), self.t, self.error)).to(t)


class StageWeighting(Weighting):
    """One weight for navigation and one for refinement, with a smooth hand-over at the boundary.

    w = refinement + (navigation - refinement) sigmoid((logit(boundary) - logit(t)) / width). Only their ratio counts.

    Args:
        boundary: between the stages, in (0, 1); `fm_stages.oracle.StageProfile` measures a data set's own.
        navigation: weight of early times, 0 or more.
        refinement: weight of late times, 0 or more.
        width: of the hand-over, in logit(t).

    Raises:
        ValueError: if the boundary is not inside (0, 1), a weight is negative, or both are 0.
    """

    def __init__(self, boundary: float, navigation: float, refinement: float, width: float = WIDTH) -> None:
        if not 0 < boundary < 1 or not width > 0:
            raise ValueError(f"boundary={boundary} must lie in (0, 1) and width={width} be positive")
        if not all(0 <= weight < math.inf for weight in (navigation, refinement)) or navigation == refinement == 0:
            raise ValueError(f"navigation={navigation} and refinement={refinement} must be 0 or more, and not both 0")
        self.boundary, self.navigation, self.refinement, self.width = boundary, navigation, refinement, width

    def relative(self, t: Tensor, path: Path) -> Tensor:
        """See `Weighting`."""
        early = _hand_over(t, self.boundary, self.width)
        return self.refinement + (self.navigation - self.refinement) * early


def weights_for_share(
    share: float, boundary: float, width: float = WIDTH, timesteps: TimestepSampler | None = None
) -> tuple[float, float]:
    """Weights with which `StageWeighting` gives navigation a share of the weight, hand-over included.

    With e(t) the sigmoid of the hand-over and k = navigation / refinement - 1, the share is
    (P(t < b) + k E[e; t < b]) / (1 + k E[e]), solved for k.

    Args:
        share: of the weight before the boundary, in (0, 1).
        boundary: between the stages, in (0, 1).
        width: of the hand-over, in logit(t).
        timesteps: the density that t is drawn from; uniform by default.

    Returns:
        Weights of navigation and refinement, of mean 1.

    Raises:
        ValueError: if no two weights do that, with the shares that can be had.
    """
    if not 0 < boundary < 1:
        raise ValueError(f"the boundary must lie in (0, 1), got {boundary}")
    u = (torch.arange(NUM_QUANTILES, dtype=torch.float64) + 0.5) / NUM_QUANTILES
    t = (timesteps or UniformTimesteps()).icdf(u)
    early = _hand_over(t, boundary, width)
    before = t < boundary
    draws, early_before, mean = (x.mean().item() for x in (before.double(), early * before, early))
    least, most = (draws - early_before) / max(1 - mean, 1e-12), early_before / max(mean, 1e-12)
    if not least < share < most:
        raise ValueError(
            f"with a hand-over of width {width} navigation can have {least:.1%} to {most:.1%} of the weight, not "
            f"{share:.1%}: choose another share or a smaller width"
        )
    k = (share - draws) / (early_before - share * mean)
    refinement = 1 / (1 + k * mean)
    return (1 + k) * refinement, refinement


def _hand_over(t: Tensor, boundary: float, width: float) -> Tensor:
    """From 1 at t = 0 to 0 at t = 1, and one half at the boundary: the sigmoid of the distance in logit(t)."""
    return torch.sigmoid((math.log(boundary / (1 - boundary)) - torch.logit(t)) / width)
