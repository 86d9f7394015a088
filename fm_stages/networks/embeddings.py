"""Time, label and place as vectors: what a velocity network is conditioned on.

Shapes: B batch, D width, g cells along a side of the grid, N = g * g cells, row by row.
"""

import math
from contextlib import nullcontext

import torch
from timm.layers.pos_embed_sincos import build_rotary_pos_embed
from torch import Tensor, nn

TIME_FEATURES = 256
MAX_PERIOD = 10_000.0
INITIAL_STD = 0.02
"""Of the label table's weights before training, here as in DiT, SiT, REPA and LightningDiT."""


def time_frequencies(device: torch.device | None = None) -> Tensor:
    """The 128 frequencies of `time_features`, geometrically spaced from 1 down to 1e-4: (128,) float32."""
    num_frequencies = TIME_FEATURES // 2
    steps = torch.arange(num_frequencies, dtype=torch.float32, device=device)
    return torch.exp(-math.log(MAX_PERIOD) / num_frequencies * steps)


def time_features(t: Tensor) -> Tensor:
    """Cosines, then sines, of ``t`` (B,) at the `time_frequencies`: (B, 256) float32."""
    angles = t.float()[:, None] * time_frequencies(t.device)  # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed sine-cosine code of each cell of a square grid, row by row: (1, side * side, width) float32.

    The first half of the channels codes the column and the second half the row, each as sines followed by cosines.
    """
    # float64 until the end, as the published positions were made
    num_frequencies = width // 4
    exponents = torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies
    angles = torch.arange(side, dtype=torch.float64)[:, None] / MAX_PERIOD**exponents  # (g, D/4)
    code = torch.cat([angles.sin(), angles.cos()], dim=1)  # (g, D/2)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, dim=0)  # (N, D/2) each
    return torch.cat([columns, rows], dim=1)[None].float()  # (1, N, D)


class TimeEmbedding(nn.Module):
    """Times (B,) to (B, D), in float32 whatever the autocast.

    Args:
        width: D.
        scale: what t is multiplied by before its features are taken. With 1, SiT's choice, only the highest
            frequencies tell two times apart; diffusion models count t to 1000.
    """

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        # features rounded to bfloat16 move t by up to 9e-4, which near t = 1 is much of 1 - t
        device = t.device.type
        # there is none to switch off on the meta device; to ask torch for that breaks the graph under torch 2.11
        autocast_off = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with autocast_off:
            return self.mlp(time_features(self.scale * t).to(next(self.mlp.parameters()).dtype))


def null_row_is_untrained(table: Tensor) -> bool:
    """Whether the null class's row is no larger than it was drawn, while most rows of classes have grown.

    A row that no sample has asked for gets no gradient, and weight decay can only make it smaller. Early in a training
    a row that is asked for can still be as small; then classes have not grown by much either.

    Args:
        table: (num_classes + 1, D), the weights of a `LabelEmbedding`; its last row stands for the null class.
    """
    if len(table) < 2:
        return False
    size = table.float().square().mean(1).sqrt()  # (num_classes + 1,)
    drawn = INITIAL_STD * (1 + 4 / math.sqrt(2 * table.shape[1]))  # and 4 standard deviations
    return bool(size[-1] < drawn and size[:-1].median() > 4 * drawn)


class LabelEmbedding(nn.Module):
    """Labels (B,) to (B, D). Row ``num_classes`` of the table stands for the null class, label -1."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def reset(self) -> None:
        """Draw the table anew."""
        nn.init.normal_(self.embedding_table.weight, std=INITIAL_STD)

    @property
    def null_is_untrained(self) -> bool:
        """Whether `null_row_is_untrained`."""
        return null_row_is_untrained(self.embedding_table.weight.detach())

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


class RotaryPositions(nn.Module):
    """Rotations of queries and keys by their cell's row and column (arXiv 2403.13298), for timm's `AttentionRope`.

    The first half of a head's channels turns with the row and the second half with the column, in neighbouring pairs.
    Angles and the names of the buffers are those of LightningDiT (https://github.com/hustvl/LightningDiT).

    Args:
        side: g.
        head_size: channels of a head; a multiple of 4.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, side: int, head_size: int) -> None:
        super().__init__()
        self.side = side
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(side * side, head_size))
        self.reset()

    def reset(self) -> None:
        """Compute the rotations anew, which a network built on the meta device needs."""
        sines, cosines = build_rotary_pos_embed(
            [self.side, self.side], dim=self.freqs_cos.shape[1], temperature=MAX_PERIOD, in_pixels=False
        )
        self.freqs_cos.copy_(cosines)
        self.freqs_sin.copy_(sines)

    def forward(self) -> Tensor:
        """Sines, then cosines: (N, 2 * head_size)."""
        return torch.cat([self.freqs_sin, self.freqs_cos], dim=1)
