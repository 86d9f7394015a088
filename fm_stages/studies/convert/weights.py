"""Changes of a DiT's weights that turn one convention into another, exactly.

Shapes: D hidden size, p side of a patch, C channels, F frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.networks import time_frequencies

Weights = dict[str, Tensor]

FIRST = "t_embedder.mlp.0.weight"
LAST = ("final_layer.linear.weight", "final_layer.linear.bias")


def reverse_time(weights: Weights, time_scale: float = 1.0) -> Weights:
    """Weights of the network that gives -v(x, 1 - t) where the given one gives v(x, t).

    Time enters through cosines and sines, and those of w (1 - t) are linear in those of w t:
    cos(w - wt) = cos w cos wt + sin w sin wt, and sin(w - wt) = sin w cos wt - cos w sin wt.
    The first layer takes that map in; the last one takes the sign.
    """
    frequencies = time_scale * time_frequencies().double()  # (F,)
    cosines, sines = frequencies.cos(), frequencies.sin()
    of_cosines, of_sines = weights[FIRST].double().chunk(2, dim=1)  # (D, F) each
    reversed_ = [of_cosines * cosines + of_sines * sines, of_cosines * sines - of_sines * cosines]
    return {
        **weights,
        FIRST: torch.cat(reversed_, dim=1).to(weights[FIRST].dtype),
        **{name: -weights[name] for name in LAST},
    }


def drop_sigma(weights: Weights, patch_size: int, in_channels: int) -> Weights:
    """Weights without the second half of the last layer's channels, which nothing reads: (p*p*2C, ...) to (p*p*C, ...).

    The channel is the fastest index of a patch's values.
    """

    def kept(values: Tensor) -> Tensor:
        channels = values.view(patch_size**2, 2 * in_channels, *values.shape[1:])
        return channels[:, :in_channels].reshape(patch_size**2 * in_channels, *values.shape[1:])

    return {**weights, **{name: kept(weights[name]) for name in LAST}}
