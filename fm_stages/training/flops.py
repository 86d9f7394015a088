"""How much arithmetic a training step is, so that what is measured beside it can be held against it."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def step_flops(module: L.LightningModule, x_t: Tensor, t: Tensor, labels: Tensor | None) -> int | None:
    """Floating point operations of a step of ``module.network`` on a batch: forward, and twice as many backward.

    Counted on tensors without data, so nothing is computed. None for a module without a ``network(x_t, t, labels)``,
    for a network that needs the data, and under FSDP.
    """
    network = getattr(module, "network", None)
    if not isinstance(network, nn.Module):
        return None
    if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in network.modules()):
        return None  # its hooks would gather the weights for this forward, and be left half-way
    labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
    counter = FlopCounterMode(display=False)
    try:
        weights = {name: x.to("meta") for name, x in network.state_dict(keep_vars=True).items()}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
            functional_call(network, weights, tuple(x.to("meta") for x in (x_t, t, labels)), strict=False)
    except Exception:  # what somebody else's network does without data is anybody's guess
        return None
    return 3 * counter.get_total_flops() or None
