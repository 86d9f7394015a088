"""Diffusion transformer with adaLN-Zero blocks, as a velocity network.

The architecture is DiT (arXiv 2212.09748); the names, shapes and order of the weights are those of SiT
(arXiv 2401.08740, https://github.com/willisma/SiT), so that a published checkpoint loads with ``load_state_dict`` and
gives the same numbers. With ``rms_norm``, ``swiglu`` and ``rotary`` they are those of LightningDiT (arXiv 2501.01423,
https://github.com/hustvl/LightningDiT).

Shapes: B batch, C channels, S side of the input, p side of a patch, g = S / p patches along a side, N = g * g tokens,
D hidden size.
"""

import math
from typing import Any

import torch
from timm.layers.norm import RmsNormFp32
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm_stages.networks.blocks import Block, FinalLayer
from fm_stages.networks.embeddings import LabelEmbedding, RotaryPositions, TimeEmbedding, grid_positions
from fm_stages.networks.inputs import check_inputs, check_sizes


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
        qk_norm: normalize queries and keys, so that no attention logit can run away.
        rms_norm: RMS norms with weights in place of layer norms without.
        swiglu: gated MLPs, two thirds as wide, in place of those with GELU.
        rotary: turn queries and keys by their place, beside the position that is added to each token.
        time_scale: what t is multiplied by before it is embedded; 1000 lets the embedding tell close times apart.
        activation_checkpointing: keep only the blocks' inputs for the backward pass, and compute the rest again: one
            more forward pass for a step, and a small part of the memory (23 MiB of 366, `DiT_S` on 4 latents).
        compile_blocks: let torch.compile compile the blocks. They share their code, so that this takes no longer for
            more of them.

    Raises:
        ValueError: if the sizes do not divide as said above, or time_scale is not positive.
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
        qk_norm: bool = False,
        rms_norm: bool = False,
        swiglu: bool = False,
        rotary: bool = False,
        time_scale: float = 1.0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        sizes = {"input_size": input_size, "patch_size": patch_size, "in_channels": in_channels}
        check_sizes("DiT", num_classes, **sizes, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
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
        if rotary and hidden_size // num_heads % 4:
            raise ValueError(
                f"rotary positions turn pairs of channels by row and by column: hidden_size={hidden_size} over "
                f"num_heads={num_heads} must be a multiple of 4, and is {hidden_size // num_heads}"
            )
        if not time_scale > 0:
            raise ValueError(
                f"time_scale={time_scale} must be positive: 1 for SiT's embedding of t, 1000 for a finer one"
            )
        super().__init__()
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile_blocks

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(hidden_size, time_scale)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size)
        # frozen, yet a parameter: SiT's checkpoints and its averages of the weights hold it
        self.pos_embed = nn.Parameter(torch.empty(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.feat_rope = RotaryPositions(input_size // patch_size, hidden_size // num_heads) if rotary else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm, rms_norm, swiglu, rotary) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if learn_sigma else 1), rms_norm)
        self.init_weights()
        self._compile_blocks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy: torch leaves compiled code behind."""
        super().__setstate__(state)
        self._compile_blocks()

    def _compile_blocks(self) -> None:
        if self.compile_blocks:
            for block in self.blocks:
                block.compile()  # in place: torch.compile(block) would rename its weights

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
            elif isinstance(module, nn.LayerNorm | RmsNormFp32):
                module.reset_parameters()
        self.y_embedder.reset()
        num_tokens, hidden_size = self.pos_embed.shape[1:]
        self.pos_embed.copy_(grid_positions(math.isqrt(num_tokens), hidden_size))
        if self.feat_rope is not None:
            self.feat_rope.reset()

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
        check_inputs(x, t, y, self.in_channels, self.input_size)
        condition = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        rotation = None if self.feat_rope is None else self.feat_rope()  # (N, 2D / heads)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                tokens = checkpoint(block, tokens, condition, rotation, use_reentrant=False)  # (B, N, D)
            else:
                tokens = block(tokens, condition, rotation)  # (B, N, D)
        return self._unpatchify(self.final_layer(tokens, condition))  # (B, C, S, S)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Velocity (B, C, S, S) from one vector per patch (B, N, p*p*C), channel fastest; drops a learned sigma."""
        p, g = self.patch_size, self.input_size // self.patch_size
        pixels = patches.view(len(patches), g, g, p, p, patches.shape[2] // p**2)  # (B, g, g, p, p, C or 2C)
        pixels = pixels[..., : self.in_channels]  # (B, g, g, p, p, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, S, S)


# Subclasses and not functions: jsonargparse cannot link an argument (the data's number of classes) into the arguments
# of a function chosen by class path. It reads ``options`` off `DiT`, and knows its names and types.


class DiT_S(DiT):
    """`DiT` with 12 blocks of width 384: 33 M parameters. Options as there."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(input_size, patch_size, in_channels, 384, 12, 6, num_classes, **options)


class DiT_B(DiT):
    """`DiT` with 12 blocks of width 768: 130 M parameters. Options as there."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(input_size, patch_size, in_channels, 768, 12, 12, num_classes, **options)


class DiT_L(DiT):
    """`DiT` with 24 blocks of width 1024: 458 M parameters. Options as there."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(input_size, patch_size, in_channels, 1024, 24, 16, num_classes, **options)


class DiT_XL(DiT):
    """`DiT` with 28 blocks of width 1152: 675 M parameters. Options as there."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(input_size, patch_size, in_channels, 1152, 28, 16, num_classes, **options)
