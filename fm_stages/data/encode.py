"""From image files to shards of latents, on one rank or on several: decoded, encoded and written all at once.

A shard is encoded by one rank, in batches that never cross its borders, and the noise of item i is keyed by i: neither
the number of ranks nor the place where a run was killed changes a bit of a shard. Another batch size, or another
device, changes it by the VAE's rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fm_stages.data.host import num_processors
from fm_stages.data.image_files import ImageFiles, open_square
from fm_stages.data.latent_index import LatentIndex
from fm_stages.data.loading import to_model_range
from fm_stages.data.statistics import ChannelSums, channel_sums
from fm_stages.data.vae import VAE
from fm_stages.flow import keyed_normal

MOST_ROWS, LEAST_ROWS, SHARDS_PER_RANK = 10_000, 256, 8
"""Rows of a shard: as many as the peers' have, fewer where ranks would be left without work, but no crumbs."""

_Ahead = tuple[tuple[int, range], list[Future[tuple[Tensor, bool]]], list[Future[Tensor | None]]]
"""A batch, the pixels of its images, and the noise of each version."""


@dataclass(frozen=True)
class Encoding:
    """What decides, beside images and VAE, which rows there are.

    Attributes:
        image_size: side of the squares that are cut out.
        flip: whether the mirrored image is encoded as well, from its pixels.
        moments: whether mean and standard deviation of the posterior are kept, and not one draw.
        precision: of the VAE.
        seed: of the draws; nothing depends on it with moments.
    """

    image_size: int
    flip: bool = True
    moments: bool = False
    precision: str = "fp32"
    seed: int = 0

    @property
    def plain(self) -> dict[str, Any]:
        """As the index records it."""
        recorded = {**asdict(self), "crop": "ADM centre crop", "pixels": "[-1, 1]"}
        return {**recorded, "seed": None} if self.moments else recorded

    @property
    def versions(self) -> list[str]:
        """Endings of the names of tensors: of the image, and of its flip."""
        return ["", "_flip"] if self.flip else [""]


def planned_index(
    images: ImageFiles, sources: dict[str, Any], vae: VAE, encoding: Encoding, shard_rows: int
) -> LatentIndex:
    """What a folder of these latents will hold, without shards.

    Raises:
        ValueError: if the VAE cannot encode images of this size, or has no moments.
    """
    side, left_over = divmod(encoding.image_size, vae.factor)
    if left_over or side < 1:
        raise ValueError(
            f"--image_size {encoding.image_size} is no multiple of {vae.factor}, by which {vae.name} shrinks images: "
            f"take {max(round(encoding.image_size / vae.factor), 1) * vae.factor}"
        )
    if encoding.moments and not vae.gaussian:
        raise ValueError(f"--moments: {vae.name} is of class {vae.kind}, which gives one latent and no distribution")
    row = {"dtype": "float32", "shape": [vae.channels, side, side]}
    names = ("mean", "std") if encoding.moments else ("latents",)
    tensors: dict[str, dict[str, Any]] = {name + version: row for version in encoding.versions for name in names}
    tensors["labels"] = {"dtype": "int64", "shape": []}
    return LatentIndex(len(images.files), shard_rows, tensors, images.class_names, vae.record, encoding.plain, sources)


def rows_per_shard(num_rows: int, num_ranks: int) -> int:
    """How long shards are unless somebody says: a whole number of the blocks in which noise is drawn."""
    fair = num_rows // (SHARDS_PER_RANK * num_ranks) // 32 * 32
    return min(max(fair, LEAST_ROWS), MOST_ROWS)


class Encoder:
    """Makes the tensors of shards.

    Args:
        vae: that encodes.
        images: all of them.
        index: of the folder; says which images make a shard.
        encoding: the settings.
        batch_size: images that are encoded together, flips apart.
        num_workers: threads that decode images; None: one for each processor of this rank, 16 at most.

    Attributes:
        num_enlarged: images that were smaller than the square, so far.
    """

    def __init__(
        self,
        vae: VAE,
        images: ImageFiles,
        index: LatentIndex,
        encoding: Encoding,
        batch_size: int = 32,
        num_workers: int | None = None,
    ) -> None:
        self.vae, self.images, self.index, self.encoding = vae, images, index, encoding
        self.batch_size, self.num_workers = batch_size, num_workers or num_processors()
        self.num_enlarged = 0
        self._on_gpu = vae.device.type == "cuda"

    def shards(self, numbers: list[int], on_batch: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Shards, one after another.

        Args:
            numbers: which.
            on_batch: called with the number of images after each batch; what it raises ends the work.

        Yields:
            The number of a shard and its tensors, on the CPU, which are the caller's.

        Raises:
            ValueError: if an image cannot be read.
        """
        batches = [(number, rows) for number in numbers for rows in self._batches_of(number)]
        tensors: dict[str, Tensor] = {}
        for (number, rows), pixels, noise in self._read_ahead(batches):
            own = self.index.rows_of(number)
            tensors = tensors or self._empty(own)
            place = slice(rows.start - own.start, rows.stop - own.start)
            for name, values in self._encode(pixels, noise).items():
                # on a GPU the copy is only ordered here: the next batch need not wait for it
                tensors[name][place].copy_(values, non_blocking=True)
            on_batch(len(rows))
            if rows.stop == own.stop:
                if self._on_gpu:
                    torch.cuda.synchronize(self.vae.device)
                self._check_finite(own, tensors)
                yield number, tensors
                tensors = {}

    def _batches_of(self, number: int) -> list[range]:
        own = self.index.rows_of(number)
        return [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]

    def _empty(self, own: range) -> dict[str, Tensor]:
        """Room for the rows of a shard, and their labels."""
        shapes = {name: kind["shape"] for name, kind in self.index.tensors.items() if name != "labels"}
        room = {name: torch.empty(len(own), *shape, pin_memory=self._on_gpu) for name, shape in shapes.items()}
        return {**room, "labels": self.images.labels[own.start : own.stop].clone()}

    def _encode(self, pixels: Tensor, noise: list[Tensor | None]) -> dict[str, Tensor]:
        """Rows of a batch: pixels (B, 3, S, S) uint8, and noise of the draw of each version."""
        images = to_model_range(pixels.to(self.vae.device, non_blocking=True))
        rows: dict[str, Tensor] = {}
        for version, drawn in zip(self.encoding.versions, noise, strict=True):
            mean, std = self.vae.moments(images.flip(-1) if version else images)
            if self.encoding.moments:
                rows |= {f"mean{version}": mean, f"std{version}": std}
            else:
                rows[f"latents{version}"] = mean if drawn is None else mean + std * drawn.to(mean.device)
        return rows

    def _read_ahead(
        self, batches: list[tuple[int, range]]
    ) -> Iterator[tuple[tuple[int, range], Tensor, list[Tensor | None]]]:
        """Batches with their pixels and noise, made by threads while earlier ones are encoded."""
        ahead = 2 + self.num_workers // self.batch_size
        waiting: deque[_Ahead] = deque()
        pool = ThreadPoolExecutor(self.num_workers)  # PIL frees the interpreter lock while it decodes and resizes
        try:
            for batch in chain(batches, [None] * ahead):
                if batch is not None:
                    images = [pool.submit(self._pixels_of, item) for item in batch[1]]
                    noise = [pool.submit(self._noise_of, batch[1], version) for version in self.encoding.versions]
                    waiting.append((batch, images, noise))
                if waiting and (batch is None or len(waiting) > ahead):
                    ready, images, noise = waiting.popleft()
                    read = [image.result() for image in images]
                    self.num_enlarged += sum(enlarged for _, enlarged in read)
                    pixels = torch.stack([pixels for pixels, _ in read])
                    yield ready, pixels.pin_memory() if self._on_gpu else pixels, [one.result() for one in noise]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _pixels_of(self, item: int) -> tuple[Tensor, bool]:
        return open_square(self.images.folder / self.images.files[item], self.encoding.image_size)

    def _noise_of(self, rows: range, version: str) -> Tensor | None:
        """Of the draws of a batch; drawn on the CPU, because the numbers of other devices differ."""
        if self.encoding.moments or not self.vae.gaussian:
            return None
        shape = tuple(self.index.tensors["latents"]["shape"])
        key = ("latents", self.encoding.seed, int(bool(version)))
        noise = keyed_normal(key, torch.arange(rows.start, rows.stop), shape)
        return noise.pin_memory() if self._on_gpu else noise

    def _check_finite(self, own: range, tensors: dict[str, Tensor]) -> None:
        for name, values in tensors.items():
            if not bool(values.isfinite().all()):
                row = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
                raise ValueError(
                    f"{self.vae.name} makes {name} that are not finite of {self.images.files[own[row]]}"
                    + (": try --precision fp32" if self.encoding.precision != "fp32" else "")
                )


def sums_of_shard(file: Path, encoding: Encoding) -> list[ChannelSums]:
    """For the statistics, of a shard on the disk: those of its images, then those of their flips.

    Raises:
        ValueError: if it cannot be read, or a value is not finite.
    """
    names = ("mean", "std") if encoding.moments else ("latents",)
    try:
        with safe_open(file, framework="pt") as shard:
            return [
                channel_sums(*(shard.get_tensor(name + version) for name in names)) for version in encoding.versions
            ]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {file} ({error}): remove it and run the same fm-stages encode again") from error
