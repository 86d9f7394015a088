"""Which network weights of another project belong to: kind, sizes and parts, read off names and shapes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_stages.networks import DiT

LABELS = "y_embedder.embedding_table.weight"
LAST = "final_layer.linear.weight"
NEEDED = {
    "pos_embed": 3, "x_embedder.proj.weight": 4, "t_embedder.mlp.0.weight": 2, LABELS: 2, "blocks.0.attn.qkv.weight": 2,
    LAST: 2,
}  # fmt: skip
"""What sizes are read off, beside the first layer of an MLP, each with its number of dimensions."""

MLP, GATED_MLP = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.w12.weight"

HEADS = {(12, 384): 6, (12, 768): 12, (24, 1024): 16, (28, 1152): 16, (24, 1536): 24, (28, 1792): 28}
"""Attention heads of the published sizes, by depth and width: no weight's shape tells them."""


@dataclass(frozen=True)
class Layout:
    """Weights and the network they belong to.

    Attributes:
        kind: ``sit`` (or DiT, which has the same weights), ``repa`` or ``lightningdit``.
        arguments: of `DiT`.
        weights: by the names of `DiT`.
        null_class: whether there was a row for the null class; else it is the mean of the classes.
    """

    kind: str
    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    null_class: bool


def recognize(weights: dict[str, Tensor], num_heads: int | None = None, num_classes: int | None = None) -> Layout:
    """Find the `DiT` that weights belong to.

    Args:
        weights: by their names in the project they come from.
        num_heads: attention heads, for sizes that nobody published.
        num_classes: labels, the null class not counted; None: all rows of the label table but the last.

    Raises:
        ValueError: if the weights are of no layout that is known, with the names that do not fit; or if a size is
            needed that they do not tell.
    """
    kind = (
        "lightningdit" if any(re.match(r"feat_rope|blocks\.0\.(mlp\.w12|norm1)\.", key) for key in weights) else "sit"
    )
    if any(key.startswith("projectors.") for key in weights):
        kind = "repa"
        weights = {key: value for key, value in weights.items() if not key.startswith("projectors.")}
    weights = _joined_blocks(weights)
    needed = {**NEEDED, (GATED_MLP if GATED_MLP in weights else MLP): 2}
    if missing := [key for key in needed if key not in weights]:
        raise ValueError(
            f"no layout that is known (SiT, DiT, REPA, LightningDiT): {', '.join(missing)} not among "
            f"{_listed(sorted(weights))}"
        )
    shaped = [f"{key} {tuple(weights[key].shape)}" for key, ndim in needed.items() if weights[key].ndim != ndim]
    if shaped:
        raise ValueError(f"no layout that is known has these shapes: {', '.join(shaped)}")
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"the weights are not finite numbers: {_listed(broken)}")
    weights, classes, null_class = _label_table(weights, num_classes)
    arguments = {**_sizes(weights, num_heads), "num_classes": classes}
    _compare(weights, arguments)
    return Layout(kind, arguments, weights, null_class)


def _joined_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of early REPA files, which count the blocks after its projectors anew, with one count."""
    first = 1 + max((int(key.split(".")[1]) for key in weights if re.match(r"blocks\.\d+\.", key)), default=-1)

    def renamed(key: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + first}", key)

    return {renamed(key): value for key, value in weights.items()}


def _label_table(weights: dict[str, Tensor], num_classes: int | None) -> tuple[dict[str, Tensor], int, bool]:
    """Weights whose last label row is the null class, the number of classes, and whether there was such a row."""
    table = weights[LABELS]
    rows = len(table)
    if num_classes is None or num_classes == rows - 1:
        return weights, rows - 1, True
    if num_classes != rows:
        raise ValueError(f"--num_classes {num_classes}: the label table has {rows} rows, so {rows - 1} or {rows} fit")
    return {**weights, LABELS: torch.cat([table, table.mean(0, keepdim=True)])}, rows, False


def _sizes(weights: dict[str, Tensor], num_heads: int | None) -> dict[str, Any]:
    """Arguments of `DiT` but for the number of classes."""
    hidden, channels, patch = weights["x_embedder.proj.weight"].shape[:3]
    tokens = weights["pos_embed"].shape[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"pos_embed has {tokens} places, which are no square grid: only square inputs are known")
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "num_heads": _heads(weights, hidden, depth, num_heads),
        "mlp_ratio": _mlp_ratio(weights, hidden),
        "learn_sigma": len(weights[LAST]) == 2 * channels * patch**2,
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "rms_norm": "blocks.0.norm1.weight" in weights,
        "swiglu": GATED_MLP in weights,
        "rotary": "feat_rope.freqs_cos" in weights,
    }


def _mlp_ratio(weights: dict[str, Tensor], hidden: int) -> float:
    """Width of the MLP over that of the tokens; of a gated one, whose width was rounded, one that gives it back."""
    if GATED_MLP not in weights:
        return len(weights[MLP]) / hidden
    width = len(weights[GATED_MLP]) // 2
    ratios = (4.0, 1.5 * width / hidden, (1.5 * width + 1) / hidden)
    return next((ratio for ratio in ratios if int(2 / 3 * int(hidden * ratio)) == width), 4.0)


def _heads(weights: dict[str, Tensor], hidden: int, depth: int, given: int | None) -> int:
    """Attention heads: as the width of one head tells, as given, or as in the published network of this size."""
    per_head = weights.get("feat_rope.freqs_cos", weights.get("blocks.0.attn.q_norm.weight"))
    told = hidden // per_head.shape[-1] if per_head is not None else None
    if told is not None and given not in (None, told):
        raise ValueError(f"--num_heads {given}: the weights have heads of {hidden // told} channels, which are {told}")
    num_heads = told or given or HEADS.get((depth, hidden))
    if num_heads is None:
        raise ValueError(
            f"no weight tells the number of attention heads, and no published network has depth {depth} and width "
            f"{hidden}: give it with --num_heads"
        )
    return num_heads


def _compare(weights: dict[str, Tensor], arguments: dict[str, Any]) -> None:
    """Refuse weights that the network does not have, or has in another shape."""
    with torch.device("meta"):
        own = DiT(**arguments).state_dict()
    if unknown := sorted(weights.keys() - own.keys()):
        raise ValueError(f"{len(unknown)} weights that no known layout has: {_listed(unknown)}")
    if missing := sorted(own.keys() - weights.keys()):
        raise ValueError(f"{len(missing)} weights are missing: {_listed(missing)}")
    wrong = [
        f"{key} {tuple(weights[key].shape)} where {tuple(own[key].shape)} belongs"
        for key in own
        if weights[key].shape != own[key].shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} weights have another shape: {_listed(wrong)}")


def _listed(names: list[str], limit: int = 20) -> str:
    """Names for a message, not all of hundreds."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
