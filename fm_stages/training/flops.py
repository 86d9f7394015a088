"""How much arithmetic a training step is, so that what is measured beside it can be held against it."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn

from fm_stages.networks import forward_flops


def step_flops(module: L.LightningModule, x_t: Tensor, t: Tensor, labels: Tensor | None) -> int | None:
    """Floating point operations of a step of ``module.network`` on a batch: forward, and twice as many backward.

    None where `forward_flops` is, and for a module without a ``network(x_t, t, labels)``.
    """
    network = getattr(module, "network", None)
    if not isinstance(network, nn.Module):
        return None
    labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
    forward = forward_flops(network, x_t, t, labels)
    return None if forward is None else 3 * forward
