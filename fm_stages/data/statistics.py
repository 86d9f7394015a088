"""Mean and standard deviation of each channel of latents, over all rows and positions, the same wherever they are made.

Sums run in float64, in pieces of fixed size and on one thread, and those of blocks are combined in the order of the
blocks: neither threads nor the ranks that share the blocks change a bit. Means and squares about them are combined as
in Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), Eq. 2.1.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fm_stages.data.atomic_files import whole_file

_PIECE = 256
"""Rows that are held in float64 at a time."""


class ChannelSums(NamedTuple):
    """Of some rows: how many values a channel has, their means (C,), the sums of squared deviations (C,); float64."""

    num_values: int
    mean: np.ndarray
    squares: np.ndarray


def channel_sums(rows: Tensor, stds: Tensor | None = None) -> ChannelSums:
    """The sums of one block.

    Args:
        rows: (n, C, H, W) of any dtype, on the CPU, n >= 1; of moments the means.
        stds: of moments the standard deviations, of the same shape: what is summed over is then the mixture of the
            Gaussians, whose variance is that of the means plus the mean of the variances.

    Raises:
        ValueError: if a value is not finite.
    """
    parts = []
    for start in range(0, len(rows), _PIECE):
        x = _own_values(rows[start : start + _PIECE])  # (n, C, H W)
        mean = x.mean(2).mean(0)
        x -= mean[:, None]
        squares = np.square(x, out=x).sum(2).sum(0)
        if stds is not None:
            x = _own_values(stds[start : start + _PIECE])
            squares += np.square(x, out=x).sum(2).sum(0)
        parts.append(ChannelSums(x.shape[0] * x.shape[2], mean, squares))
    sums = combine_sums(parts)
    if not np.isfinite(sums.squares).all():
        raise ValueError("some latents are not finite, so that they have no mean and standard deviation")
    return sums


def combine_sums(parts: Iterable[ChannelSums]) -> ChannelSums:
    """The sums of all parts, which are at least one, in their order."""
    return reduce(_join, parts)


def _own_values(rows: Tensor) -> np.ndarray:
    """A copy in float64: (n, C, H W)."""
    return rows.flatten(2).to(torch.float64, copy=True).numpy()


def _join(a: ChannelSums, b: ChannelSums) -> ChannelSums:
    num = a.num_values + b.num_values
    share, delta = b.num_values / num, b.mean - a.mean
    return ChannelSums(num, a.mean + delta * share, a.squares + b.squares + delta**2 * (a.num_values * share))


def statistics_of(sums: ChannelSums) -> dict[str, Tensor]:
    """``mean`` and ``std`` (1, C, 1, 1) float32, as LightningDiT's latents_stats.pt holds them.

    The standard deviation is that of these rows, which are all there are: it divides by their number.

    Raises:
        ValueError: if a channel has one value alone, which no division brings to unit scale.
    """
    std = np.sqrt(sums.squares / sums.num_values)
    if not std.all():
        raise ValueError(f"channel {int(std.argmin())} of the latents has the same value everywhere: its std is 0")
    return {
        name: torch.from_numpy(value).float().view(1, -1, 1, 1) for name, value in (("mean", sums.mean), ("std", std))
    }


def channel_statistics(blocks: Iterable[Tensor | tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean and standard deviation of each channel over all rows of all blocks.

    Args:
        blocks: (n, C, H, W) each, on the CPU, or pairs of means and standard deviations; flips are rows as well. Give
            the same rows in the same blocks to get the same bits.

    Returns:
        ``{"mean": ..., "std": ...}``, (1, C, 1, 1) float32.

    Raises:
        ValueError: if a value is not finite, or a channel is constant.
    """
    return statistics_of(
        combine_sums(channel_sums(*block) if isinstance(block, tuple) else channel_sums(block) for block in blocks)
    )


def write_statistics(file: Path, statistics: dict[str, Tensor]) -> None:
    """Write ``latents_stats.pt`` as a whole; the same bytes for the same numbers.

    Raises:
        OSError: if it cannot be written.
    """
    content = io.BytesIO()  # torch.save would put the name of a temporary file into it
    torch.save(statistics, content)
    with whole_file(file) as part:
        part.write_bytes(content.getvalue())
