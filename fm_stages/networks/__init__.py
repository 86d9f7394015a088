"""Velocity networks: ``forward(x, t, y) -> velocity``, and nothing of paths, guidance or oracles."""

from fm_stages.networks.dit import DiT, DiT_B, DiT_L, DiT_S, DiT_XL
from fm_stages.networks.embeddings import LabelEmbedding, null_row_is_untrained, time_frequencies
from fm_stages.networks.flops import forward_flops
from fm_stages.networks.unet import UNet

__all__ = [
    "DiT",
    "DiT_B",
    "DiT_L",
    "DiT_S",
    "DiT_XL",
    "LabelEmbedding",
    "UNet",
    "forward_flops",
    "null_row_is_untrained",
    "time_frequencies",
]
