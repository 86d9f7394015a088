"""Files of drawn images, each there as a whole or not at all, so that drawing can be killed at any time and go on.

Images are numbered 0, 1, ...; those of a shard are drawn by one rank, and what is missing is told from the names of the
files alone.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fm_stages.data import whole_file

SMALLEST, LARGEST, NUM_SHARDS = 32, 512, 64
"""Images of a shard, and how many shards there should be: few files, and about as many images for each rank."""


class ImageFiles(ABC):
    """The images of a folder.

    Args:
        folder: where they go.
        num: how many there will be.
        shape: (C, H, W) of one.
    """

    def __init__(self, folder: Path, num: int, shape: tuple[int, int, int]) -> None:
        self.folder, self.num, self.shape = folder, num, shape
        self.per_shard = min(LARGEST, max(SMALLEST, num // NUM_SHARDS))

    @abstractmethod
    def done(self) -> Tensor:
        """Numbers of the images that are there, (n,) int64."""

    @abstractmethod
    def add(self, index: Tensor, pixels: Tensor, labels: Tensor) -> None:
        """Take images (B, C, H, W) uint8 with their numbers and labels (B,), all on the CPU, in increasing order."""

    @abstractmethod
    def first(self, num: int) -> Tensor:
        """The first images, (num, C, H, W) uint8; all are there."""

    def flush(self) -> None:  # noqa: B027
        """Wait until all that was added is written; nothing to do where it is written at once."""

    def finish(self) -> list[str]:
        """Called once, when all images are there; names of the files, or of their folder."""
        return []

    def missing(self, rank: int = 0, num_ranks: int = 1) -> Tensor:
        """Numbers of the images that this rank still has to draw, increasing, (n,) int64."""
        index = torch.arange(self.num)
        own = index // self.per_shard % num_ranks == rank
        own[self.done()] = False
        return index[own]

    def shards(self) -> list[Tensor]:
        """The numbers of each shard's images."""
        return list(torch.arange(self.num).split(self.per_shard))


class PngFiles(ImageFiles):
    """``images/000000.png`` and so on, written while the next batch is drawn."""

    def __init__(self, folder: Path, num: int, shape: tuple[int, int, int]) -> None:
        if shape[0] not in (1, 3):
            raise ValueError(f"a PNG has 1 or 3 channels, the images have {shape[0]}: --format npz or safetensors")
        super().__init__(folder, num, shape)
        self.images = folder / "images"
        self.writers = ThreadPoolExecutor(4)
        self.writing: list[Future[None]] = []

    def done(self) -> Tensor:
        """See `ImageFiles`."""
        names = [path.stem for path in self.images.glob("*.png")]
        return torch.tensor(
            [int(name) for name in names if name.isdecimal() and int(name) < self.num], dtype=torch.int64
        )

    def add(self, index: Tensor, pixels: Tensor, labels: Tensor) -> None:
        """See `ImageFiles`."""
        self.flush()  # one batch waits at most
        pictures = zip(index.tolist(), pixels.movedim(1, -1).numpy(), strict=True)
        self.writing = [self.writers.submit(self._write, number, picture) for number, picture in pictures]

    def flush(self) -> None:
        """See `ImageFiles`."""
        for future in self.writing:
            future.result()  # raises what the writer raised
        self.writing = []

    def first(self, num: int) -> Tensor:
        """See `ImageFiles`."""
        pictures = [np.asarray(Image.open(self._path(number))).reshape(*self.shape[1:], -1) for number in range(num)]
        return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)

    def finish(self) -> list[str]:
        """See `ImageFiles`."""
        return ["images/"]

    def _path(self, number: int) -> Path:
        return self.images / f"{number:06d}.png"

    def _write(self, number: int, picture: np.ndarray) -> None:
        with whole_file(self._path(number)) as part:
            Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(part, format="png")


class ShardFiles(ImageFiles):
    """``shards/000000.safetensors`` and so on, named by the first image: images (n, C, H, W) and labels (n,)."""

    suffix = ".safetensors"

    def __init__(self, folder: Path, num: int, shape: tuple[int, int, int]) -> None:
        super().__init__(folder, num, shape)
        self.pending: dict[int, tuple[Tensor, Tensor]] = {}

    def path(self, first: int) -> Path:
        """File of the shard that begins with this image."""
        return self.folder / "shards" / f"{first:06d}{self.suffix}"

    def done(self) -> Tensor:
        """See `ImageFiles`."""
        there = [shard for shard in self.shards() if self.path(int(shard[0])).exists()]
        return torch.cat([torch.empty(0, dtype=torch.int64), *there])

    def add(self, index: Tensor, pixels: Tensor, labels: Tensor) -> None:
        """See `ImageFiles`."""
        for number, picture, label in zip(index.tolist(), pixels, labels, strict=True):
            self.pending[number] = picture, label
        size = self.per_shard
        for shard in {number // size * size for number in index.tolist()}:
            numbers = range(shard, min(shard + size, self.num))
            if all(number in self.pending for number in numbers):
                whole = [self.pending.pop(number) for number in numbers]
                images, own = (torch.stack(parts) for parts in zip(*whole, strict=True))
                with whole_file(self.path(shard)) as part:
                    self.write(part, images, own)

    def first(self, num: int) -> Tensor:
        """See `ImageFiles`."""
        shards = [self.read(self.path(first))[0] for first in range(0, num, self.per_shard)]
        return torch.cat(shards)[:num]

    def finish(self) -> list[str]:
        """See `ImageFiles`."""
        return [f"shards/{self.path(int(shard[0])).name}" for shard in self.shards()]

    def write(self, path: Path, images: Tensor, labels: Tensor) -> None:
        """Write one shard."""
        save_file({"images": images.contiguous(), "labels": labels}, path)

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) and labels (n,) of a shard."""
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("images"), file.get_tensor("labels")


class NpzFile(ShardFiles):
    """``samples.npz`` as evaluators read it: arr_0 (N, H, W, C) uint8 and arr_1 (N,) labels; shards until the end."""

    suffix = ".npz"

    @property
    def whole(self) -> Path:
        """The file that holds all images."""
        return self.folder / "samples.npz"

    def done(self) -> Tensor:
        """See `ImageFiles`."""
        return torch.arange(self.num) if self.whole.exists() else super().done()

    def write(self, path: Path, images: Tensor, labels: Tensor) -> None:
        """See `ShardFiles`."""
        with path.open("wb") as file:
            np.savez(file, arr_0=images.movedim(1, -1).numpy(), arr_1=labels.numpy())

    def read(self, path: Path) -> tuple[Tensor, Tensor]:
        """See `ShardFiles`."""
        with np.load(path) as arrays:
            return torch.from_numpy(arrays["arr_0"]).movedim(-1, 1), torch.from_numpy(arrays["arr_1"])

    def finish(self) -> list[str]:
        """Join the shards, one in memory at a time, and remove them."""
        shards = [self.path(int(shard[0])) for shard in self.shards()]
        if not self.whole.exists():
            with whole_file(self.whole) as part, zipfile.ZipFile(part, "w") as archive:
                channels, height, width = self.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (self.num, height, width, channels)}
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for shard in shards:
                        file.write(self.read(shard)[0].movedim(1, -1).numpy().tobytes())
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.concatenate([self.read(shard)[1].numpy() for shard in shards]))
        for shard in shards:
            shard.unlink(missing_ok=True)
        if (self.folder / "shards").is_dir():
            (self.folder / "shards").rmdir()
        return [self.whole.name]


FORMATS: dict[str, type[ImageFiles]] = {"png": PngFiles, "npz": NpzFile, "safetensors": ShardFiles}
