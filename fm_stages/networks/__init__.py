"""Velocity networks: ``forward(x, t, y) -> velocity``, and nothing of paths, guidance or oracles."""

from fm_stages.networks.dit import DiT, DiT_B, DiT_L, DiT_S, DiT_XL

__all__ = ["DiT", "DiT_B", "DiT_L", "DiT_S", "DiT_XL"]
