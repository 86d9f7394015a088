"""Loss weightings: how much the squared error at time t counts in the training objective."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
