"""Training on the latents of a VAE: folders in any layout in use, read from disk, from memory or off the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from fm_stages.data.images import mixed, stratified_split
from fm_stages.data.latent_files import open_latents
from fm_stages.data.latent_index import LatentIndex
from fm_stages.data.latent_rows import LatentRows
from fm_stages.data.loading import to_pixels
from fm_stages.data.module import Opened, TrainingData
from fm_stages.data.normalisation import Normalisation, normalised
from fm_stages.data.shared_memory import in_memory
from fm_stages.data.stored_rows import StoredRows
from fm_stages.data.vae import VAE, load_vae
from fm_stages.data.workers import Loader

DECODED = 8
"""Latents that are decoded at a time: a VAE takes some 0.5 GiB for an image of 256x256."""

Residency = Literal["disk", "ram", "device"]


class Latents(TrainingData):
    """Latents of a VAE, as ``fm-stages encode``, LightningDiT, REPA, EDM2 or SpeedrunDiT write them.

    Of moments, a mean and a std, x1 is drawn anew in every step; the bank is then a mixture of Gaussians.

    Batches do not depend on where the training rows reside, nor does their order:

    - ``disk``: the files are mapped into memory. Nothing has to be loaded, no size is too large, and what was read
      stays in the system's cache as long as there is room; so this is the default.
    - ``ram``: one tensor, loaded at the start, which the ranks of a host share. It stays there whatever else is read.
    - ``device``: the bank is the training set, and batches are looked up in it where it lies, on the GPU. There is no
      other copy. Of a sharded bank the rows come from the ranks that hold them.

    Args:
        data_dir: folder of ``index.json`` and its shards, of LightningDiT's shards, or of one ``.npy`` for each latent;
            or EDM2's ``.zip``.
        val_dir: the same of held-out images; None: a part of data_dir, which is then not trained on.
        residency: ``disk``, ``ram`` or ``device``. Held-out rows stay on disk.
        normalisation: ``channels``: (z - mean) / std of each channel, from ``latents_stats.pt``, which is made if it is
            not there; ``vae``: (z - shift_factor) * scaling_factor of the index; ``none``.
        multiplier: of what that gives.
        flip: whether rows are replaced at random by those of the flipped image, which were encoded with it.
        val_fraction: size of the held-out part, in each class.
        split_seed: of its choice.
        vae: folder or name on the hub of the VAE, by which what is drawn becomes pictures; None: what the index names.
            It is loaded when the first picture is wanted; ``none``: never, pictures are then of the first channels.
        verify: whether to compare the checksums of the shards with the index, which reads them whole; the ranks of a
            host share them out.
        kwargs: as for `TrainingData`.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(
        self,
        data_dir: str,
        val_dir: str | None = None,
        residency: Residency = "disk",
        normalisation: Normalisation = "channels",
        multiplier: float = 1.0,
        flip: bool = True,
        val_fraction: float = 0.02,
        split_seed: int = 0,
        vae: str | None = None,
        verify: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(flip=flip, **kwargs)
        if not (multiplier > 0 and multiplier < float("inf")) or not 0 < val_fraction < 1:
            raise ValueError(f"multiplier={multiplier} must be above 0, val_fraction={val_fraction} inside (0, 1)")
        if residency == "device" and self.num_workers:
            raise ValueError(
                f"num_workers={self.num_workers}: with residency 'device' batches are looked up in the bank, which "
                "other processes cannot: set num_workers to 0"
            )
        self.residency = residency
        self.data_dir = Path(data_dir).expanduser()
        self.val_dir = Path(val_dir).expanduser() if val_dir else None
        self.normalisation, self.multiplier = normalisation, multiplier
        self.val_fraction, self.split_seed, self.verify = val_fraction, split_seed, verify
        self.vae = vae
        self.index: LatentIndex | None = None
        self._decoder: VAE | None = None

    def open(self) -> Opened:
        """Map the files into memory; read labels and statistics.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it holds something else, or held-out rows do not fit the others.
        """
        rows, self.index = open_latents(self.data_dir, self._own_shards())
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
        if held_out is None:
            strata = torch.zeros(rows.num_images) if rows.labels is None else rows.labels[: rows.num_images]
            own, kept = stratified_split(strata.long(), self.val_fraction, self.split_seed)
            held_out = rows
        else:
            own, kept = torch.arange(rows.num_images), torch.arange(held_out.num_images)
            held_out = held_out._replace(scale=rows.scale, shift=rows.shift)
        train = LatentRows(rows, own, len(names), self.seed)
        train.on_host = self.residency != "device"
        return Opened(train, LatentRows(held_out, mixed(kept), len(names), self.seed, in_bank=False), names)

    def train_dataloader(self) -> Loader:
        """See `TrainingData.train_dataloader`. Every rank calls this: rows are brought to where they reside.

        Raises:
            MemoryError: if they do not fit there.
        """
        loader = super().train_dataloader()  # refuses a batch size first
        train, trainer = self._ready().train, self.trainer
        assert isinstance(train, LatentRows)
        if trainer is not None and trainer.world_size > 1 and not self._on_ranks:  # the run is only being checked
            return loader
        if self.residency == "ram" and train.memory is None:
            shape = (self.num_train * (2 if self.flip else 1), *train.shape)
            read = train.seen if train.dtype == torch.float32 else train.stored
            train.memory = in_memory(shape, train.dtype, read, dist.group.WORLD if self._on_ranks else None)
        elif self.residency == "device":
            train.bank = self.bank()
            if trainer is not None:
                train.bank.to(trainer.strategy.root_device)
        return loader

    def decoder(self, device: torch.device | None = None) -> VAE | None:
        """The VAE that the latents are of, loaded on the first call; None where none is named.

        It is moved to ``device`` if one is given. Where the one that the index names cannot be had, there is a warning,
        and none.

        Raises:
            FileNotFoundError: if there is no VAE where ``vae`` says.
            ValueError: if it cannot be read, or makes other latents.
        """
        self._ready()
        if self.vae == "none" or (self.vae is None and self.index is None):
            return None
        if self._decoder is None:
            name, revision = self.vae, None
            if name is None:
                assert self.index is not None
                name, revision = self.index.vae["name"], self.index.vae["revision"]
            try:
                found = load_vae(name, revision)
            except (FileNotFoundError, ValueError) as error:
                message = f"no VAE for the pictures of {self.data_dir}: {error}; or set the data's vae (none: never)"
                if self.vae is not None:
                    raise type(error)(message) from error
                self.vae = "none"  # asked for once: a run without pictures is better than none
                rank_zero_warn(f"Pictures show the first channels of latents. There is {message}")
                return None
            if found.channels != self.shape[0]:
                raise ValueError(
                    f"{name} makes latents of {found.channels} channels, {self.data_dir} holds {self.shape[0]}: set "
                    "vae to the one that encoded them"
                )
            if self.vae is None and self.index is not None and self.index.vae.get("sha256") != found.sha256:
                rank_zero_warn(f"{name} is not the VAE that encoded {self.data_dir}: pictures are not what they were")
            self._decoder = found
        return self._decoder if device is None else self._decoder.to(device)

    def picture_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """See `TrainingData.picture_shape`."""
        decoder = self.decoder()
        return None if decoder is None else (3, shape[1] * decoder.factor, shape[2] * decoder.factor)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Latents as a network draws them, (B, C, H, W), decoded a few at a time: (B, 3, H', W') uint8.

        Raises:
            ValueError: if no VAE is named.
        """
        decoder = self.decoder(images.device)
        if decoder is None:
            raise ValueError(f"nothing decodes the latents of {self.data_dir}: set vae to the folder of their VAE")
        source = self._ready().train.source  # type: ignore[attr-defined]
        scale, shift = (torch.as_tensor(x).to(images.device) for x in (source.scale, source.shift))
        parts = (decoder.decode((part.float() - shift) / scale) for part in images.split(DECODED))
        return torch.cat([to_pixels(part) for part in parts]).to(images.device)

    def _own_shards(self) -> slice | None:
        """Which shards this rank reads whole to verify them: of each host, all that lie there, each once."""
        if not self.verify:
            return None
        trainer = self.trainer if self._on_ranks else None
        return slice(None) if trainer is None else slice(trainer.local_rank, None, trainer.num_devices)

    def _held_out(self, rows: StoredRows) -> StoredRows | None:
        """The rows of val_dir, if there is one."""
        if self.val_dir is None:
            return None
        if self.val_dir.resolve() == self.data_dir.resolve():
            raise ValueError(
                f"val_dir {self.val_dir} is data_dir, so that held-out rows would be trained on: name another"
            )
        held_out, index = open_latents(self.val_dir, self._own_shards())
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
