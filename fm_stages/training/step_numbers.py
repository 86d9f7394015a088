"""Loss and gradient norm of an optimizer step, the same on all ranks, for one all-reduce and one wait."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


def measure_step(loss: Tensor, optimizer: Optimizer, num_ranks: int) -> tuple[float, float]:
    """Loss of the step, the mean over ranks, and norm of the whole gradient: equal on all ranks, NaN if it is on one.

    Args:
        loss: of this rank's part of the step, a scalar on the device.
        optimizer: whose parameters' gradients count: whole and equal on all ranks, or sharded over them.
        num_ranks: of the run.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = get_total_norm(own, foreach=True) if own else loss.new_zeros(())
    # in float64 the square of a float32 is finite
    both = torch.stack([loss.double() / num_ranks, norm.double().square() / (1 if sharded else num_ranks)])
    if num_ranks > 1:
        torch.distributed.all_reduce(both)
    mean, square = both.tolist()  # waits for the device
    return mean, math.sqrt(square) if square >= 0 else math.nan
