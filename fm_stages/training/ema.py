"""The exponential moving average of a network's weights: a frozen twin beside it.

A twin rather than a weight-swapping callback, so that raw and EMA weights can both be measured in one validation and a
checkpoint always says which is which.
"""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def frozen_twin(network: nn.Module) -> nn.Module:
    """A copy of the network that receives no gradient."""
    return copy.deepcopy(network).requires_grad_(False).eval()


def ramped_decay(decay: float, step: int) -> float:
    """Decay at an optimizer step: rises to ``decay``, so that the random start is forgotten early in training."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_twin(twin: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the twin's weights towards the network's: w_ema <- decay w_ema + (1 - decay) w; buffers are copied."""
    average = get_ema_multi_avg_fn(decay)
    average(list(twin.parameters()), list(network.parameters()), None)
    for kept, current in zip(twin.buffers(), network.buffers(), strict=True):
        kept.copy_(current)
