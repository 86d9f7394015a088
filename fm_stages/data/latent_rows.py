"""The rows of a set of latents that are trained on, or held out: read from disk, from memory, or out of the bank."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.data.loading import LabelledRows, Planned
from fm_stages.data.stored_rows import StoredRows
from fm_stages.flow import keyed_normal
from fm_stages.oracle import DataBank, GaussianMixtureBank, moments_affine


class LatentRows(LabelledRows):
    """Some of the rows of a set of latents on disk, with labels.

    Args:
        source: all rows; their scale and shift are those of (C, H, W), also of moments.
        own: which of the images these are (N,) int64.
        num_classes: number of classes; 0 without labels.
        seed: of the draws from moments.
        in_bank: whether this is the training set; see `LabelledRows`.
    """

    def __init__(self, source: StoredRows, own: Tensor, num_classes: int, seed: int, in_bank: bool = True) -> None:
        scale, shift = source.scale, source.shift
        if source.is_moments:
            scale, shift = moments_affine(scale, shift, source.shape[1:])
        labels = None if source.labels is None else source.labels[own]
        super().__init__(source.shape, source.dtype, labels, num_classes, in_bank, scale, shift)
        self.source, self.own, self.seed = source, own, seed
        self.memory: Tensor | None = None
        """All rows of the bank, in its order, where they are kept in memory: if they are float32, as the network sees
        them, which spares half the time of a batch; else as they are stored, because that takes less."""
        self.bank: DataBank | GaussianMixtureBank | None = None
        """What rows are looked up in, where it takes their place."""

    def __len__(self) -> int:
        """Number of images, flips not counted."""
        return len(self.own)

    def stored(self, index: Tensor) -> Tensor:
        """Bank rows (B,) as they are stored: (B, *shape). See `LabelledRows.stored`."""
        self.check_index(index)
        flips = (index >= len(self)).long()
        return self.source.read(self.own[index % len(self)] + self.source.num_images * flips)

    def name_of(self, row: int) -> str:
        """Where a row of the bank lies."""
        flip, image = divmod(row, len(self))
        return self.source.name_of(int(self.own[image]) + flip * self.source.num_images)

    def x1(self, item: Planned) -> Tensor:
        """What the network sees of a micro-batch: (B, C, H, W) float32; of moments a new draw of each."""
        seen = self.seen(item.rows)
        if not self.is_moments:
            return seen
        # on the CPU wherever the moments are, so that all residencies draw the same
        key = ("latents", self.seed, item.step) if self.in_bank else ("held-out latents", self.seed)
        mean, std = seen.unbind(1)
        return mean + std * keyed_normal(key, item.positions, tuple(mean.shape[1:])).to(mean.device)

    def seen(self, index: Tensor) -> Tensor:
        """Bank rows (B,) in units of the network, moments as mean and std: (B, *shape) float32."""
        if self.bank is not None:
            return self.bank.moments_of(index) if isinstance(self.bank, GaussianMixtureBank) else self.bank.rows(index)
        if self.memory is None:
            return self.normalise(self.stored(index))
        rows = self.memory.index_select(0, index)
        return rows if self.dtype == torch.float32 else self.normalise(rows)
