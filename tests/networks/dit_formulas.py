"""The formulas of SiT and LightningDiT, written from the description of their checkpoints, in float64 without torch.nn.

Sizes, and whether there are qk-norm, RMS norms and SwiGLU, are read off the weights.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, w[f"{name}.weight"]) + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """RMS norm with weight, layer norm with weight and bias, or layer norm without: what there are weights for."""
    weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    if weight is not None and bias is None:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight
    centred = x - x.mean(-1, keepdim=True)
    epsilon = 1e-6 if weight is None else 1e-5
    normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + epsilon)
    return normal if weight is None else normal * weight + bias


def position(row: int, column: int, width: int) -> list[float]:
    def code(place: int) -> list[float]:
        angles = [place / 10_000 ** (i / (width / 4)) for i in range(width // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return code(column) + code(row)


def turn(x: Tensor, side: int) -> Tensor:
    """Queries or keys (B, N, heads, head) with each pair of channels turned by its angle, as complex numbers."""
    head = x.shape[3]
    pairs = head // 4  # for each of row and column
    frequencies = [10_000 ** (-i / pairs) for i in range(pairs)]
    places = [(row, column) for row in range(side) for column in range(side)]
    angles = [[place * f for place in cell for f in frequencies] for cell in places]
    turned = torch.view_as_complex(x.reshape(*x.shape[:3], head // 2, 2))
    turned = turned * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))[None, :, None]
    return torch.view_as_real(turned).reshape(x.shape)


def velocity(
    weights: Weights, x: Tensor, t: Tensor, y: Tensor, num_heads: int, rotary: bool = False, time_scale: float = 1.0
) -> Tensor:
    """The forward pass; returns every channel of the last layer. y: -1 is the last row of the table."""
    w = {key: value.double() for key, value in weights.items()}
    x, t = x.double(), t.double()
    hidden, channels, patch = w["x_embedder.proj.weight"].shape[:3]
    batch, side, head = len(x), x.shape[2] // patch, hidden // num_heads

    frequencies = torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = time_scale * t[:, None] * frequencies
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    condition = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", features)))
    condition = silu(condition + w["y_embedder.embedding_table.weight"][y])  # row -1 is the last

    patches = x.reshape(batch, channels, side, patch, side, patch)
    tokens = torch.einsum("bcipjq,dcpq->bijd", patches, w["x_embedder.proj.weight"]) + w["x_embedder.proj.bias"]
    tokens = tokens.reshape(batch, side * side, hidden)
    places = [position(row, column, hidden) for row in range(side) for column in range(side)]
    tokens = tokens + torch.tensor(places, dtype=torch.float64)

    for i in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))):
        block = f"blocks.{i}"
        modulation = linear(w, f"{block}.adaLN_modulation.1", condition)[:, None, :]
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.split(hidden, dim=2)
        h = norm(w, f"{block}.norm1", tokens) * (1 + scale_msa) + shift_msa
        qkv = linear(w, f"{block}.attn.qkv", h).reshape(batch, side * side, 3, num_heads, head)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if f"{block}.attn.q_norm.weight" in w:
            q, k = norm(w, f"{block}.attn.q_norm", q), norm(w, f"{block}.attn.k_norm", k)
        if rotary:
            q, k = turn(q, side), turn(k, side)
        scores = torch.exp(torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(head))
        attended = torch.einsum("bhnm,bmhd->bnhd", scores / scores.sum(-1, keepdim=True), v)
        tokens = tokens + gate_msa * linear(w, f"{block}.attn.proj", attended.reshape(batch, -1, hidden))
        h = norm(w, f"{block}.norm2", tokens) * (1 + scale_mlp) + shift_mlp
        if f"{block}.mlp.w12.weight" in w:
            gate, value = linear(w, f"{block}.mlp.w12", h).chunk(2, dim=-1)
            h = linear(w, f"{block}.mlp.w3", silu(gate) * value)
        else:
            h = linear(w, f"{block}.mlp.fc2", gelu_tanh(linear(w, f"{block}.mlp.fc1", h)))
        tokens = tokens + gate_mlp * h

    shift, scale = linear(w, "final_layer.adaLN_modulation.1", condition)[:, None, :].split(hidden, dim=2)
    values = linear(w, "final_layer.linear", norm(w, "final_layer.norm_final", tokens) * (1 + scale) + shift)
    channels = values.shape[2] // patch**2
    out = torch.zeros(batch, channels, side * patch, side * patch, dtype=torch.float64)
    for row in range(side * patch):
        for column in range(side * patch):
            token = (row // patch) * side + column // patch
            first = ((row % patch) * patch + column % patch) * channels
            out[:, :, row, column] = values[:, token, first : first + channels]
    return out
