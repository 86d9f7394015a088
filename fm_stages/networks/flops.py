"""How much arithmetic a network's forward pass is, so that what is measured beside it can be held against it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(network: nn.Module, x: Tensor, t: Tensor, labels: Tensor) -> int | None:
    """Floating point operations of ``network(x, t, labels)``: two for each product that is summed up.

    Those of matrix products, convolutions and attention; norms, activations and other element-wise operations are not
    counted. Counted on tensors without data, so nothing is computed.

    Args:
        network: any.
        x: (B, ...), whose values do not matter.
        t: (B,).
        labels: (B,) int64.

    Returns:
        The number; None for a network that needs the data, and under FSDP.
    """
    if any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in network.modules()):
        return None  # its hooks would gather the weights for this forward, and be left half-way
    counter = FlopCounterMode(display=False)
    try:
        weights = {name: w.to("meta") for name, w in network.state_dict(keep_vars=True).items()}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), counter:
            functional_call(network, weights, tuple(z.to("meta") for z in (x, t, labels)), strict=False)
    except Exception:  # what somebody else's network does without data is anybody's guess
        return None
    return counter.get_total_flops() or None
