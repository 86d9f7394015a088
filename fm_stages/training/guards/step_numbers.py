"""Loss and gradient norm of an optimizer step, the same on all ranks, for one all-reduce and one wait."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class StepNumbers(NamedTuple):
    """Equal on all ranks, and NaN or infinite there if they are so on one.

    Attributes:
        loss: of the step, the mean over ranks.
        norm: of the whole gradient.
        own_norm: the same as a tensor, as `torch.nn.utils.clip_grad_norm_` would compute it; None where it is sharded.
    """

    loss: float
    norm: float
    own_norm: Tensor | None


def measure_step(loss: Tensor, optimizer: Optimizer, num_ranks: int) -> StepNumbers:
    """Loss and gradient norm of a step, the same on all ranks.

    Args:
        loss: of this rank's part of the step, a scalar on the device.
        optimizer: whose parameters' gradients count: whole and equal on all ranks, or sharded over them.
        num_ranks: of the run.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    sharded = any(isinstance(gradient, DTensor) for gradient in gradients)
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norm = get_total_norm(own) if own else loss.new_zeros(())
    # in float64 the square of a float32 is finite
    both = torch.stack([loss.double() / num_ranks, norm.double().square() / (1 if sharded else num_ranks)])
    if num_ranks > 1:
        torch.distributed.all_reduce(both)
    mean, square = both.tolist()  # waits for the device
    return StepNumbers(mean, math.sqrt(square) if square >= 0 else math.nan, None if sharded else norm)
