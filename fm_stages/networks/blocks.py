"""The parts of a `DiT`: its blocks with adaLN-Zero modulation, and the last layer.

The names of the weights are those of SiT, and of LightningDiT where SiT has no such part.

Shapes: B batch, N tokens, D hidden size.
"""

from functools import partial

import torch
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import Mlp
from timm.layers.norm import RmsNormFp32
from torch import Tensor, nn
from torch.nn import functional


def make_norm(width: int, rms_norm: bool) -> nn.Module:
    """The norm before a modulation: layer norm without weights, or RMS norm with one weight for each channel."""
    return RmsNormFp32(width) if rms_norm else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202), tokens (B, N, D) to (B, N, D).

    timm's has the same arithmetic; ``w12`` (gate, then value) and ``w3`` are the names in published checkpoints.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden_size)
        self.w3 = nn.Linear(hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * value)


class Block(nn.Module):
    """Attention and MLP, each between a shift and scale and a gate that the condition sets (adaLN-Zero)."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        rms_norm: bool,
        swiglu: bool,
        rotary: bool,
    ) -> None:
        super().__init__()
        # timm's two attentions have the same weights; the one that rotates sets apart tokens without a place
        attention = partial(AttentionRope, num_prefix_tokens=0) if rotary else Attention
        head_norm = RmsNormFp32 if rms_norm else nn.LayerNorm
        mlp_size = int(hidden_size * mlp_ratio)
        self.norm1 = make_norm(hidden_size, rms_norm)
        self.attn = attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=head_norm)
        self.norm2 = make_norm(hidden_size, rms_norm)
        if swiglu:  # three matrices in place of two: two thirds of the width keep the number of weights
            self.mlp: nn.Module = SwiGLU(hidden_size, int(2 / 3 * mlp_size))
        else:
            self.mlp = Mlp(hidden_size, mlp_size, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor, rotation: Tensor | None = None) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, 1, D) each
        place = () if rotation is None else (rotation,)
        # addcmul: a gate or a scale and its sum in one pass over memory, which a CPU feels
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1), *place))  # (B, N, D)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to the values of their patches (B, N, patch_values)."""

    def __init__(self, hidden_size: int, patch_values: int, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = make_norm(hidden_size, rms_norm)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(self.norm_final(x) * (1 + scale) + shift)
