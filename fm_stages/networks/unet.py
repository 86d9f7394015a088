"""Convolutional U-Net with attention at chosen resolutions, as a velocity network: diffusers' `UNet2DModel`.

Shapes: B batch, C channels, S side of the input; level i works at side S / 2^i.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fm_stages.networks.embeddings import LabelEmbedding
from fm_stages.networks.inputs import check_inputs, check_sizes

TIME_SCALE = 1000.0
"""diffusers embeds timesteps that count to 1000: t in [0, 1] is multiplied by this."""


class UNet(nn.Module):
    """U-Net on square inputs, with time and label added in every residual block. A new one returns zero velocity.

    Source: arXiv 2006.11239, with scale and shift by the condition as in arXiv 2105.05233; built by diffusers.

    Args:
        input_size: side S of the input, in pixels or latent cells; it is halved between levels.
        in_channels: channels C of input and velocity.
        num_classes: number of labels, the null class not counted; 0 for an unconditional network.
        channels: width of each level, from the full resolution down.
        layers_per_block: residual blocks of a level on the way down; there is one more on the way up.
        attention_levels: levels with attention after each residual block, 0 is the full resolution. The lowest level
            always has one attention between the ways down and up.
        head_size: channels of an attention head.
        norm_groups: groups of the group norms.
        dropout: of the residual blocks, drawn from torch's global generator: a run that was resumed then draws others
            than one that was not.
        activation_checkpointing: keep only the residual blocks' inputs for the backward pass, and compute the rest
            again; what attention keeps stays, so that this saves about half of the memory.
        compile_blocks: let torch.compile compile each level's blocks.

    Raises:
        ValueError: if the sizes do not divide.
    """

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...] = (128, 256, 256),
        layers_per_block: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        head_size: int = 64,
        norm_groups: int = 32,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        sizes = {"input_size": input_size, "in_channels": in_channels, "layers_per_block": layers_per_block}
        check_sizes("UNet", num_classes, **sizes, head_size=head_size, norm_groups=norm_groups)
        _check_levels(input_size, channels, attention_levels, head_size, norm_groups)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        # here: it takes seconds, which those who train a DiT need not wait for
        from diffusers.models.unets.unet_2d import UNet2DModel

        super().__init__()
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.compile_blocks = compile_blocks
        kinds = ["Attn" if level in attention_levels else "" for level in range(len(channels))]
        self.unet: Any = UNet2DModel(
            sample_size=input_size,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            dropout=dropout,
            attention_head_dim=head_size,
            norm_num_groups=norm_groups,
            attn_norm_num_groups=norm_groups,  # else scale_shift leaves the attention of the lowest level without norm
            resnet_time_scale_shift="scale_shift",
            class_embed_type="identity",  # labels are embedded below, by our convention
        )
        self.y_embedder = LabelEmbedding(num_classes, 4 * channels[0])  # the width of diffusers' time embedding
        self.init_weights()
        if activation_checkpointing:
            self.unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        self._compile_blocks()

    @property
    def blocks(self) -> list[nn.Module]:
        """The levels on the way down, the one between, and those on the way up."""
        return [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]

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
        """Draw all weights anew: torch's defaults, label embeddings of the size of SiT's, and no velocity."""
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.y_embedder.reset()
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

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
        return self.unet(x, TIME_SCALE * t, class_labels=self.y_embedder(y), return_dict=False)[0]


def _check_levels(
    input_size: int, channels: tuple[int, ...], attention_levels: tuple[int, ...], head_size: int, norm_groups: int
) -> None:
    """Refuse levels that do not exist, that cannot be halved, or whose channels do not divide."""
    if not channels:
        raise ValueError("channels is empty: give the width of each level, from the full resolution down")
    halvings = len(channels) - 1
    if input_size % 2**halvings:
        fits = next(n for n in range(halvings, -1, -1) if input_size % 2**n == 0) + 1
        raise ValueError(
            f"input_size={input_size} cannot be halved {halvings} times for {len(channels)} levels: give channels for "
            f"{fits} at most, or pad or resize the data to {-(-input_size // 2**halvings) * 2**halvings}"
        )
    if wrong := [level for level in attention_levels if not 0 <= level < len(channels)]:
        raise ValueError(f"attention_levels has {wrong[0]}: with {len(channels)} channels there are 0 to {halvings}")
    if wrong := [width for width in channels if width < 1 or width % norm_groups]:
        raise ValueError(f"channels has {wrong[0]}, not a multiple of norm_groups={norm_groups}: change one of them")
    attended = {*(channels[level] for level in attention_levels), channels[-1]}
    if wrong := [width for width in sorted(attended) if width % head_size]:
        raise ValueError(
            f"attention over {wrong[0]} channels cannot have heads of head_size={head_size}: choose one that divides it"
        )
