"""Diffusion transformer with adaLN-Zero blocks, as a velocity network.

The architecture is DiT (arXiv 2212.09748); the names, shapes and order of the weights are those of SiT
(arXiv 2401.08740, https://github.com/willisma/SiT), so that a published checkpoint loads with ``load_state_dict`` and
gives the same numbers.

Shapes: B batch, C channels, S side of the input, p side of a patch, g = S / p patches along a side, N = g * g tokens,
D hidden size.
"""

import math
from contextlib import nullcontext

import torch
from timm.layers.activations import GELUTanh
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

TIME_FEATURES = 256
MAX_PERIOD = 10_000.0


def time_features(t: Tensor) -> Tensor:
    """Cosines, then sines, of ``t`` (B,) at geometrically spaced frequencies from 1 down: (B, 256) float32.

    t enters as it is, in [0, 1], so that only the highest frequencies tell two times apart. That is SiT's choice, and
    every published weight depends on it.
    """
    num_frequencies = TIME_FEATURES // 2
    steps = torch.arange(num_frequencies, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(MAX_PERIOD) / num_frequencies * steps)
    angles = t.float()[:, None] * frequencies  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_positions(side: int, hidden_size: int) -> Tensor:
    """Fixed sine-cosine code of each cell of a square grid, row by row: (1, side * side, hidden_size) float32.

    The first half of the channels codes the column and the second half the row, each as sines followed by cosines.
    """
    # float64 until the end, as the published positions were made
    num_frequencies = hidden_size // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
    angles = torch.arange(side, dtype=torch.float64)[:, None] / MAX_PERIOD**exponents  # (g, D/4)
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, D/2)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, dim=0)  # (N, D/2) each
    return torch.cat([columns, rows], dim=1)[None].float()  # (1, N, D)


class TimeEmbedding(nn.Module):
    """Times (B,) to (B, D), in float32 whatever the autocast."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        # features rounded to bfloat16 move t by up to 9e-4, which near t = 1 is much of 1 - t
        device = t.device.type
        # there is none to switch off on the meta device; to ask torch for that breaks the graph under torch 2.11
        autocast_off = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with autocast_off:
            return self.mlp(time_features(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """Labels (B,) to (B, D). Row ``num_classes`` of the table stands for the null class, label -1."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        valid = (y >= 0) & (y < self.num_classes)
        wrong = ~valid & (y != -1)
        # reading the answer on a GPU would make the host wait for it, at every step
        if y.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong.any()):
            raise ValueError(
                f"label {y[wrong][0].item()} is outside [-1, {self.num_classes}): pass labels that count from 0, "
                f"-1 for the null class, or build the network with more than num_classes={self.num_classes}"
            )
        # a wrong label must end past the table, where the GPU's own assert stops it: as it is, num_classes would pass
        # for the null class, and a negative one for a row counted from the end
        return self.embedding_table(torch.where(valid, y, self.num_classes + wrong.long()))


class Block(nn.Module):
    """Attention and MLP, each between a shift and scale and a gate that the condition sets (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]  # (B, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, 1, D) each
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)  # (B, N, D)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # (B, N, D)


class FinalLayer(nn.Module):
    """Tokens (B, N, D) to the values of their patches (B, N, patch_values)."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """Diffusion transformer on square inputs. A new one returns zero velocity, and each of its blocks is the identity.

    Source: arXiv 2212.09748, with the weights of SiT (see the top of this file).

    Args:
        input_size: side S of the input, in pixels or latent cells; a multiple of ``patch_size``.
        patch_size: side of the square that becomes one token.
        in_channels: channels C of input and velocity.
        hidden_size: width D; a multiple of ``num_heads`` and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: number of labels, the null class not counted; 0 for an unconditional network.
        mlp_ratio: width of the MLP's hidden layer over ``hidden_size``.
        learn_sigma: give the last layer 2C channels and drop the second half of them, as the published SiT
            checkpoints need. Nothing trains that half.

    Raises:
        ValueError: if the sizes do not divide as said above.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
    ) -> None:
        sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
        }
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"sizes of a DiT must be 1 or more, got {', '.join(wrong)}")
        super().__init__()
        if input_size % patch_size:
            raise ValueError(
                f"input_size={input_size} is not a multiple of patch_size={patch_size}: choose a patch_size that "
                f"divides it, or pad or crop the data"
            )
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_heads={num_heads} (equal heads) and of 4 "
                f"(sines and cosines of row and column): {math.lcm(num_heads, 4)} and its multiples are"
            )
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} is negative: pass 0 for an unconditional network")
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        # frozen, yet a parameter: SiT's checkpoints and its averages of the weights hold it
        self.pos_embed = nn.Parameter(torch.empty(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, as SiT does; also what a network built on the meta device needs after ``to_empty``."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)  # closed gates: each block is the identity, the velocity is zero
                elif name.startswith("t_embedder"):
                    nn.init.normal_(module.weight, std=0.02)
                else:  # flat, as the convolution is a linear map of whole patches
                    nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        num_tokens, hidden_size = self.pos_embed.shape[1:]
        self.pos_embed.copy_(grid_positions(math.isqrt(num_tokens), hidden_size))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Velocity at ``x``, in its shape; in autocast's dtype under autocast, otherwise in that of the weights.

        Args:
            x: (B, C, S, S), noisy data in model units.
            t: (B,), times in [0, 1].
            y: (B,) int64, classes in [0, num_classes), or -1 for the null class; None is -1 for all.

        Raises:
            ValueError: if a shape is not the one the network was built for, or a label on the CPU is out of range.
                On a GPU such a label ends in a device assert of the embedding.
        """
        if y is None:
            y = torch.full_like(t, -1, dtype=torch.int64)
        self._check_shapes(x, t, y)
        condition = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, condition)  # (B, N, D)
        return self._unpatchify(self.final_layer(tokens, condition))  # (B, C, S, S)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Velocity (B, C, S, S) from one vector per patch (B, N, p*p*C), channel fastest; drops a learned sigma."""
        p, g = self.patch_size, self.input_size // self.patch_size
        pixels = patches.view(len(patches), g, g, p, p, patches.shape[2] // p**2)  # (B, g, g, p, p, C or 2C)
        pixels = pixels[..., : self.in_channels]  # (B, g, g, p, p, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, S, S)

    def _check_shapes(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        channels, side = self.in_channels, self.input_size
        if x.ndim != 4 or x.shape[1:] != (channels, side, side):
            raise ValueError(
                f"x has shape {tuple(x.shape)}, this network takes (batch, {channels}, {side}, {side}): set its "
                f"in_channels and input_size to those of the data"
            )
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: pass one value for each of the {x.shape[0]} samples, "
                    f"shape ({x.shape[0]},)"
                )


# Subclasses and not functions: jsonargparse cannot link an argument (the data's number of classes) into the arguments
# of a function chosen by class path.


class DiT_S(DiT):
    """`DiT` with 12 blocks of width 384: 33 M parameters."""

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, num_classes: int, learn_sigma: bool = False
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, 384, 12, 6, num_classes, learn_sigma=learn_sigma)


class DiT_B(DiT):
    """`DiT` with 12 blocks of width 768: 130 M parameters."""

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, num_classes: int, learn_sigma: bool = False
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, 768, 12, 12, num_classes, learn_sigma=learn_sigma)


class DiT_L(DiT):
    """`DiT` with 24 blocks of width 1024: 458 M parameters."""

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, num_classes: int, learn_sigma: bool = False
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, 1024, 24, 16, num_classes, learn_sigma=learn_sigma)


class DiT_XL(DiT):
    """`DiT` with 28 blocks of width 1152: 675 M parameters."""

    def __init__(
        self, input_size: int, patch_size: int, in_channels: int, num_classes: int, learn_sigma: bool = False
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, 1152, 28, 16, num_classes, learn_sigma=learn_sigma)
