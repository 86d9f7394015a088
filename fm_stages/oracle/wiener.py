"""The Wiener reference: the best velocity that is linear in x_t.

It knows the bank's mean and covariance and nothing else, so a network that is no better has learnt no more than
second moments. Shapes: B queries, D values per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.flow import Path
from fm_stages.oracle.bank import DataBank
from fm_stages.oracle.exact import full_precision

MAX_DIMS = 8192
"""Largest D whose covariance (D x D, float64) is decomposed: 512 MiB and some minutes on a CPU."""


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
        self._centre = bank.mean.float()  # (D,)
        values, vectors = torch.linalg.eigh(bank.covariance())
        self._values = values.clamp(min=0)  # (D,) float64; rounding leaves tiny negative ones
        self._vectors = vectors.float()  # (D, D)

    @torch.no_grad()
    def mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Best linear estimate of the data given x_t (B, ...) at t (B,): (B, ...), float32."""
        a, s = self.path.alpha(t.double())[:, None], self.path.sigma(t.double())[:, None]
        # where both a directionless eigenvalue and s are 0 the estimate is the mean
        gain = (a * self._values / (a**2 * self._values + s**2).clamp(min=1e-30)).float()  # (B, D)
        with full_precision(x_t.device):
            centred = x_t.float().flatten(1) - a.float() * self._centre
            estimate = self._centre + ((centred @ self._vectors) * gain) @ self._vectors.T
        return estimate.reshape(x_t.shape)
