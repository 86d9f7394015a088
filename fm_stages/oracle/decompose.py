"""Regular loss = gap + floor, sample by sample: what a loss value is made of.

    E||v - u_cond||^2 = E||v - u*||^2 + E||u_cond - u*||^2

All numbers are per value: squared norms divided by D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_stages.oracle import ranks
from fm_stages.oracle.exact import Oracle
from fm_stages.oracle.wiener import Wiener


@dataclass
class Decomposition:
    """What the oracle says about a batch of predictions, each (B,) float32.

    Attributes:
        t: times.
        regular: ||v - u_cond||^2 / D, the loss that everybody logs.
        gap: ||v - u*||^2 / D, what a better model can still win.
        floor: A_t^2 variance / D, what no model can win: the expectation of ||u_cond - u*||^2 / D given x_t.
        residual: 2 <v - u*, u* - u_cond> / D, which has mean zero if the bank is the training distribution.
        identity: residual / (gap + floor). Its mean is zero as well, for the divisor depends on x_t alone; and near
            t = 1, where A_t^2 multiplies every mistake, no sample outweighs the others.
        top1: largest posterior weight.
        ess: effective number of rows.
        zero: the gap that predicting 0 would have, ||u*||^2 / D.
        wiener: the gap of the best linear velocity; NaN if no `Wiener` was given.
    """

    t: Tensor
    regular: Tensor
    gap: Tensor
    floor: Tensor
    residual: Tensor
    identity: Tensor
    top1: Tensor
    ess: Tensor
    zero: Tensor
    wiener: Tensor


@torch.no_grad()
def decompose(
    oracle: Oracle,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    prediction: Tensor,
    labels: Tensor | None = None,
    index: Tensor | None = None,
    wiener: Wiener | None = None,
) -> Decomposition:
    """Split the regular loss of predicted velocities into gap and floor.

    On inputs made from held-out images only ``regular`` and ``gap`` have a meaning, and the gap only before the
    boundary: there is no floor and no identity there.

    Args:
        oracle: of the training set and of the path that made x_t.
        x0: (B, ...) noise.
        x1: (B, ...) data.
        t: (B,) times.
        prediction: (B, ...) the model's velocity at x_t = interpolate(x0, x1, t).
        labels: (B,) int64 that the model saw, after label dropout; -1 = unconditional.
        index: (B,) int64 rows of the training set; x1 is then read from the bank, and the oracle may skip samples that
            have certainly collapsed on their row (`Oracle.posterior`).
        wiener: the linear reference, if its gap is wanted.

    Returns:
        One number per sample for each part.

    Raises:
        ValueError: if the shapes do not fit, or as `Oracle.posterior` does.
    """
    with ranks.together(oracle.bank.group) as meeting:
        if prediction.shape != x1.shape or x0.shape != x1.shape:
            raise ValueError(
                f"noise, data and prediction need one shape: they have {tuple(x0.shape)}, {tuple(x1.shape)} and "
                f"{tuple(prediction.shape)}"
            )
        if prediction.device != x0.device:
            raise ValueError(f"the noise is on {x0.device}, the prediction on {prediction.device}: move one of them")
        # all of it before the first collective, where an error on one rank is one on all
        oracle.check(meeting, x0, t, labels, index, x1 if index is None else None)
    if index is not None:
        x1 = oracle.bank.rows(index)
    x0, x1, t, prediction = x0.float(), x1.float(), t.float(), prediction.float()
    path = oracle.path
    x_t = path.interpolate(x0, x1, t)
    conditional = path.velocity(x0, x1, t)
    posterior = oracle.posterior(x_t, t, labels, index)
    best = oracle.target_from_mean(posterior.mean, x0, x1, t)

    scale = path.mean_coefficient(t.double())
    linear = torch.full_like(t, torch.nan)
    if wiener is not None:
        linear = mean_square(oracle.target_from_mean(wiener.mean(x_t, t), x0, x1, t) - best)
    gap = mean_square(prediction - best)
    # where the variance is 0 the floor is 0, also at t = 1 where the scale is infinite
    floor = torch.where(posterior.variance == 0, 0.0, scale**2 * posterior.variance / oracle.bank.num_dims).float()
    residual = 2 * ((prediction - best) * (best - conditional)).flatten(1).mean(1)
    return Decomposition(
        t=t,
        regular=mean_square(prediction - conditional),
        gap=gap,
        floor=floor,
        residual=residual,
        identity=residual / (gap + floor).clamp(min=1e-12),  # a perfect model at no floor has residual 0, too
        top1=posterior.top1,
        ess=posterior.ess,
        zero=mean_square(best),
        wiener=linear,
    )


def mean_square(x: Tensor) -> Tensor:
    """Mean of squares over all but the batch: (B, ...) -> (B,)."""
    return x.flatten(1).square().mean(1)
