"""Training on the latents of a VAE: folders in any layout in use, read from disk, from memory or off the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fm_stages.data.images import stratified_split
from fm_stages.data.latent_files import open_latents
from fm_stages.data.latent_index import LatentIndex
from fm_stages.data.loading import LabelledRows, Planned
from fm_stages.data.module import Opened, TrainingData
from fm_stages.data.normalisation import Normalisation, normalised
from fm_stages.data.stored_rows import StoredRows
from fm_stages.flow import keyed_normal
from fm_stages.oracle import moments_affine

Residency = Literal["disk", "ram", "device"]


class LatentRows(LabelledRows):
    """Some of the rows of a set of latents on disk, with labels.

    Args:
        source: all rows; their scale and shift are those of (C, H, W), also of moments.
        own: which of the images these are (N,) int64, in rising order.
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
        return self.normalise(self.stored(index))


class Latents(TrainingData):
    """Latents of a VAE, as ``fm-stages encode``, LightningDiT, REPA, EDM2 or SpeedrunDiT write them.

    Of moments, a mean and a std, x1 is drawn anew in every step; the bank is then a mixture of Gaussians. What a batch
    holds does not depend on where the rows reside.

    Args:
        data_dir: folder of ``index.json`` and its shards, of LightningDiT's shards, or of one ``.npy`` for each latent;
            or EDM2's ``.zip``.
        val_dir: the same of held-out images; None: a part of data_dir, which is then not trained on.
        normalisation: ``channels``: (z - mean) / std of each channel, from ``latents_stats.pt``, which is made if it is
            not there; ``vae``: (z - shift_factor) * scaling_factor of the index; ``none``.
        multiplier: of what that gives.
        flip: whether rows are replaced at random by those of the flipped image, which were encoded with it.
        val_fraction: size of the held-out part, in each class.
        split_seed: of its choice.
        verify: whether to compare the checksums of the shards with the index, which reads them whole.
        kwargs: as for `TrainingData`.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(
        self,
        data_dir: str,
        val_dir: str | None = None,
        normalisation: Normalisation = "channels",
        multiplier: float = 1.0,
        flip: bool = True,
        val_fraction: float = 0.02,
        split_seed: int = 0,
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(flip=flip, **kwargs)
        if not (multiplier > 0 and multiplier < float("inf")) or not 0 < val_fraction < 1:
            raise ValueError(f"multiplier={multiplier} must be above 0, val_fraction={val_fraction} inside (0, 1)")
        self.data_dir = Path(data_dir).expanduser()
        self.val_dir = Path(val_dir).expanduser() if val_dir else None
        self.normalisation, self.multiplier = normalisation, multiplier
        self.val_fraction, self.split_seed, self.verify = val_fraction, split_seed, verify
        self.index: LatentIndex | None = None

    def open(self) -> Opened:
        """Map the files into memory; read labels and statistics.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds something else, or held-out rows do not fit the others.
        """
        rows, self.index = open_latents(self.data_dir, self.verify)
        if len(rows.shape[-3:]) != 3 or rows.dtype == torch.uint8:
            raise ValueError(
                f"{self.data_dir} holds rows of {rows.dtype} and shape {rows.shape}: latents are (C, H, W)"
            )
        if self.flip and not rows.has_flips:
            raise ValueError(
                f"{self.data_dir} holds no latents of flipped images, and a latent cannot be flipped: set flip to false"
            )
        held_out = self._held_out(rows)
        rows = normalised(rows, self.data_dir, self.normalisation, self.multiplier, self.index)
        names = rows.class_names or _numbers(rows.labels)
        every = torch.arange(rows.num_images)
        own, kept = every, every
        if held_out is None:
            strata = torch.zeros(len(every)) if rows.labels is None else rows.labels[: len(every)]
            own, kept = stratified_split(strata.long(), self.val_fraction, self.split_seed)
            held_out = rows
        else:
            kept = torch.arange(held_out.num_images)
            held_out = held_out._replace(scale=rows.scale, shift=rows.shift)
        train = LatentRows(rows, own, len(names), self.seed)
        return Opened(train, LatentRows(held_out, kept, len(names), self.seed, in_bank=False), names)

    def _held_out(self, rows: StoredRows) -> StoredRows | None:
        """The rows of val_dir, if there is one."""
        if self.val_dir is None:
            return None
        if self.val_dir.resolve() == self.data_dir.resolve():
            raise ValueError(
                f"val_dir {self.val_dir} is data_dir, so that held-out rows would be trained on: name another"
            )
        held_out, index = open_latents(self.val_dir, self.verify)
        for what, one, other in (
            ("rows of shape", rows.shape, held_out.shape),
            ("rows of", rows.dtype, held_out.dtype),
            ("labels", rows.labels is not None, held_out.labels is not None),
            ("classes", rows.class_names, held_out.class_names),
            ("the VAE", _vae_of(self.index), _vae_of(index)),
        ):
            if one != other:
                raise ValueError(
                    f"{self.data_dir} has {what} {_short(one)}, {self.val_dir} {_short(other)}: encode both alike"
                )
        return held_out


def _numbers(labels: Tensor | None) -> list[str]:
    """Names of classes that have none: their numbers."""
    return [] if labels is None else [str(label) for label in range(int(labels.max()) + 1)]


def _vae_of(index: LatentIndex | None) -> Any:
    return None if index is None else index.vae.get("sha256")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
