"""Loss weightings: how much the squared error at time t counts in the training objective."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fm_stages.flow.timesteps import TimestepSampler, UniformTimesteps


class Weighting(ABC):
    """A weight for each sample's loss, with mean 1 under the density that t is drawn from."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """Weights (B,) for times ``t`` (B,)."""


class UniformWeighting(Weighting):
    """Every t counts alike: the density of t alone decides where the network learns."""

    def __call__(self, t: Tensor) -> Tensor:
        """See `Weighting`."""
        return torch.ones_like(t)


class StageWeighting(Weighting):
    """One weight for navigation and one for refinement, with a smooth hand-over at the boundary.

    w(t) is proportional to ``refinement + (navigation - refinement) sigmoid((logit(boundary) - logit(t)) / width)``.
    Only the ratio of the two weights counts: the mean over draws of t is 1.

    Args:
        boundary: between the stages, in (0, 1); `fm_stages.oracle.StageProfile` measures a data set's own.
        navigation: weight of early times, 0 or more.
        refinement: weight of late times, 0 or more.
        width: of the hand-over, in logit(t).
        timesteps: the density that t is drawn from; uniform by default.

    Raises:
        ValueError: if the boundary is not inside (0, 1), a weight is negative, or both are 0.
    """

    def __init__(
        self,
        boundary: float,
        navigation: float,
        refinement: float,
        width: float = 0.25,
        timesteps: TimestepSampler | None = None,
    ) -> None:
        if not 0 < boundary < 1 or not width > 0:
            raise ValueError(f"boundary={boundary} must lie in (0, 1) and width={width} be positive")
        if not all(0 <= weight < math.inf for weight in (navigation, refinement)) or navigation == refinement == 0:
            raise ValueError(f"navigation={navigation} and refinement={refinement} must be 0 or more, and not both 0")
        self.boundary, self.navigation, self.refinement, self.width = boundary, navigation, refinement, width
        u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        self._mean = self._unscaled((timesteps or UniformTimesteps()).icdf(u)).mean().item()

    def _unscaled(self, t: Tensor) -> Tensor:
        """Weights before their mean is made 1: (B,) float64."""
        logit_boundary = math.log(self.boundary / (1 - self.boundary))
        early = torch.sigmoid((logit_boundary - torch.logit(t.double())) / self.width)
        return self.refinement + (self.navigation - self.refinement) * early

    def __call__(self, t: Tensor) -> Tensor:
        """See `Weighting`."""
        return (self._unscaled(t) / self._mean).to(t.dtype)
