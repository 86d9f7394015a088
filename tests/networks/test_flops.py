"""The arithmetic of networks, against products counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from fm_stages.networks import DiT, UNet, forward_flops


def inputs(batch: int, channels: int = 1, side: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, channels, side, side), torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize("batch", [1, 5])
def test_a_dit_by_hand(batch):
    """N tokens of p p C values, width D: two for each multiplication."""
    width, depth, patch, channels, side = 24, 3, 2, 3, 8
    network = DiT(side, patch, channels, width, depth, num_heads=3, num_classes=4)
    tokens, values = (side // patch) ** 2, patch**2 * channels
    time = 256 * width + width * width  # 256 sines and cosines
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    mlp = 2 * tokens * width * 4 * width
    block = width * 6 * width + attention + mlp  # the first sets shifts, scales and gates, once for all tokens
    last = width * 2 * width + tokens * width * values
    products = tokens * values * width + time + depth * block + last
    assert forward_flops(network, *inputs(batch, channels, side)) == 2 * batch * products


@pytest.mark.parametrize("options", [{"rotary": True}, {"swiglu": True, "rms_norm": True, "qk_norm": True}])
def test_grows_with_the_batch_and_with_depth(options):
    one, two = (forward_flops(DiT(8, 2, 1, 32, depth, 2, num_classes=3, **options), *inputs(1)) for depth in (1, 2))
    assert one < two < 2 * one
    assert forward_flops(DiT(8, 2, 1, 32, 1, 2, num_classes=3, **options), *inputs(7)) == 7 * one


def test_a_unet_is_counted():
    network = UNet(input_size=8, in_channels=1, num_classes=3, channels=(32, 32), head_size=32)
    one = forward_flops(network, *inputs(1))
    assert one > 2 * 9 * 32 * 32 * 64  # one of its 3 x 3 convolutions alone
    assert forward_flops(network, *inputs(3)) == 3 * one


def test_unknown_where_it_cannot_be_counted():
    class NeedsData(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return x * float(t.sum())

    assert forward_flops(NeedsData(), *inputs(1)) is None
