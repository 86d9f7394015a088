"""Affine Gaussian probability paths x_t = alpha(t) x_1 + sigma(t) x_0 between noise x_0 and data x_1.

The time convention, stated here and nowhere else: **t = 0 is noise, t = 1 is data**, as in SiT and the flow-matching
papers. SD3, FLUX, REPA, RAE and diffusers run time the other way: their time (or sigma) is 1 - t on the linear path,
and a velocity read in their convention changes its sign. Their ``shift`` is the same number as ours
(`fm_stages.flow.shift_time`); the shift of LightningDiT and of arXiv 2512.02826 is 1 / ours.

Shapes: B batch; x is (B, ...), t is (B,).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,), or any per-sample number, shaped to multiply ``x`` (B, ...): (B, 1, ...).

    Raises:
        ValueError: if ``t`` is not one number per sample. Broadcasting would otherwise mis-scale in silence where
            the batch is as large as an image side.
    """
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(f"need one time per sample: t has shape {tuple(t.shape)}, x has shape {tuple(x.shape)}")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def check_time(t: Tensor) -> None:
    """Raise ValueError unless every time lies in [0, 1] (NaN does not)."""
    inside = (t >= 0) & (t <= 1)
    if not bool(inside.all()):
        wrong = t[~inside].flatten()[0].item()
        raise ValueError(f"times must lie in [0, 1] (0 is noise, 1 is data), got {wrong}")


class Path(ABC):
    """An affine Gaussian path, given by alpha, sigma and their derivatives in t, each (B,) -> (B,)."""

    max_time: float = 1.0
    """Training draws are capped here: where a derivative diverges at t = 1, slightly below it."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data: 0 (nearly, for `VPPath`) at t = 0, 1 at t = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the noise: 1 (nearly, for `VPPath`) at t = 0, exactly 0 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha in t."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma in t."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t, between noise ``x0`` (B, ...) and data ``x1`` (B, ...) at times ``t`` (B,): (B, ...)."""
        return expand_time(self.alpha(t), x1) * x1 + expand_time(self.sigma(t), x1) * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Conditional target u_cond = alpha' x_1 + sigma' x_0: (B, ...)."""
        return expand_time(self.d_alpha(t), x1) * x1 + expand_time(self.d_sigma(t), x1) * x0

    def mean_coefficient(self, t: Tensor) -> Tensor:
        """A_t in u = A_t m + B_t x_t, m the mean of the data given x_t: A = alpha' - alpha sigma' / sigma, (B,).

        Infinite where sigma is 0. Source: arXiv 2512.02826, Theorem 2.1.
        """
        return self._wronskian(t) / self.sigma(t)

    def velocity_from_mean(self, mean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity A_t m + B_t x_t towards ``mean`` (B, ...); B_t = sigma' / sigma. Undefined at t = 1."""
        towards = expand_time(self._wronskian(t), x_t) * mean + expand_time(self.d_sigma(t), x_t) * x_t
        return towards / expand_time(self.sigma(t), x_t)

    def predict_data(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """One-step prediction of the data, (v - B_t x_t) / A_t: (B, ...). On the linear path x_t + (1 - t) v."""
        # multiplied through by sigma, so that nothing diverges at t = 1
        scaled = expand_time(self.sigma(t), x_t) * velocity - expand_time(self.d_sigma(t), x_t) * x_t
        return scaled / expand_time(self._wronskian(t), x_t)

    def score(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Gradient of the log density of x_t, (alpha v - alpha' x_t) / (A sigma^2): (B, ...). Undefined at t = 1.

        From any velocity, as `predict_data`: minus the noise that it implies, over sigma. Source: arXiv 2401.08740.
        """
        scaled = expand_time(self.alpha(t), x_t) * velocity - expand_time(self.d_alpha(t), x_t) * x_t
        return scaled / expand_time(self.sigma(t) * self._wronskian(t), x_t)

    def _wronskian(self, t: Tensor) -> Tensor:
        """alpha' sigma - alpha sigma', which is A_t sigma_t and stays finite wherever sigma' does: (B,)."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)


class LinearPath(Path):
    """Rectified flow: alpha = t, sigma = 1 - t.  Source: arXiv 2209.03003; the path of SiT, SD3 and FLUX."""

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return -torch.ones_like(t)


class CosinePath(Path):
    """Generalised variance preserving (GVP): sin(pi t / 2) and cos(pi t / 2).  Source: arXiv 2401.08740."""

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return torch.sin(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path`."""
        # not cos(pi t / 2): its float32 value at t = 1 is negative
        return torch.sin((1 - t) * (math.pi / 2))

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return self.sigma(t) * (math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return self.alpha(t) * (-math.pi / 2)


class VPPath(Path):
    """Variance preserving diffusion with a linear beta schedule, read as a path.  Source: arXiv 2011.13456, Eq. 33.

    log alpha = L(t) = -(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2, sigma^2 = 1 - alpha^2. The derivative of
    sigma diverges at t = 1, so training draws stop at ``max_time``.

    Args:
        beta_min: noise rate at the data end.
        beta_max: noise rate at the noise end.
    """

    max_time = 1 - 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        r = 1 - t
        return -0.25 * r**2 * (self.beta_max - self.beta_min) - 0.5 * r * self.beta_min

    def _d_log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """See `Path`."""
        # expm1, because sqrt(1 - alpha^2) loses all its digits near t = 1
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        """See `Path`."""
        return self.alpha(t) * self._d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """See `Path`; minus infinity at t = 1."""
        return -torch.exp(2 * self._log_alpha(t)) * self._d_log_alpha(t) / self.sigma(t)

    def _wronskian(self, t: Tensor) -> Tensor:
        # alpha' sigma - alpha sigma' = alpha L' / sigma here: the generic form subtracts infinity from 0 at t = 1
        return self.alpha(t) * self._d_log_alpha(t) / self.sigma(t)
