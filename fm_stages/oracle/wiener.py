"""The Wiener reference: the best velocity that is linear in x_t.

It knows the bank's mean and covariance and nothing else, so a network that is no better has learnt no more than
second moments. Shapes: B queries, D values per row.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle.bank import DataBank

MAX_DIMS = 8192
"""Largest D whose covariance (D x D, float64) is decomposed: 512 MiB and some minutes on a CPU."""


def linear_reference(bank: DataBank, path: Path) -> Wiener | None:
    """The Wiener reference, or None with a warning where the rows are too long for one."""
    try:
        return Wiener(bank, path)
    except ValueError as error:
        warnings.warn(f"No linear reference and so no `closed`: {error}.", stacklevel=2)
        return None


class Wiener:
    """Posterior mean m_W = mu + a C (a^2 C + s^2 I)^-1 (x_t - a mu) of a Gaussian with the bank's mean and covariance.

    Of the whole bank, whatever the labels: a covariance per class would need more rows than a class has.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.

    Raises:
        ValueError: if the rows have more than `MAX_DIMS` values.
    """

    def __init__(self, bank: DataBank, path: Path) -> None:
        if bank.num_dims > MAX_DIMS:
            raise ValueError(f"the Wiener reference decomposes a D x D covariance: D = {bank.num_dims} > {MAX_DIMS}")
        self.path = path
        self._centre = bank.mean  # (D,) float64, like all that follows
        values, self._vectors = torch.linalg.eigh(bank.covariance())  # (D,), (D, D)
        self._values = values.clamp(min=0)  # rounding leaves tiny negative ones

    @torch.no_grad()
    def mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Best linear estimate of the data given x_t (B, ...) at t (B,): (B, ...), float64, for A_t multiplies it."""
        a, s = self.path.alpha(t.double())[:, None], self.path.sigma(t.double())[:, None]
        # where both a directionless eigenvalue and s are 0 the estimate is the mean
        gain = a * self._values / (a**2 * self._values + s**2).clamp(min=1e-30)  # (B, D)
        with torch.autocast(x_t.device.type, enabled=False):
            centred = x_t.double().flatten(1) - a * self._centre
            estimate = self._centre + ((centred @ self._vectors) * gain) @ self._vectors.T
        return estimate.reshape(x_t.shape)
