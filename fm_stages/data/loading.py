"""From labelled rows to batches: what a bank row is, and which rows make which batch on which rank.

A *bank row* is i for training image i and N + i for its horizontal flip. Batches are planned for all ranks at once: a
global batch is what one optimizer step sees, and a rank takes its part of it by position, so that neither the number of
ranks nor a restart in the middle of an epoch changes what any step is trained on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from fm_stages.data.batches import check_shares
from fm_stages.flow import keyed_generator

SCALE, SHIFT = 2 / 255, -1.0
"""From pixels in 0..255 to what the network sees."""


def to_model_range(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1, 1]: the only preprocessing, with the bits that a bank of pixels gives back."""
    return images.float() * SCALE + SHIFT


def to_pixels(images: Tensor) -> Tensor:
    """Images in units of the network to uint8: `to_model_range` undone, rounded to the nearest, cut off at the ends."""
    return ((images.float() - SHIFT) / SCALE).round().clamp(0, 255).to(torch.uint8)


class Planned(NamedTuple):
    """What a sampler yields: the rows of a micro-batch of one rank.

    Attributes:
        rows: (B,) int64, of the bank; of held-out images their numbers.
        positions: (B,) int64, places in the global batch; of held-out images their numbers.
        step: tells the global batches of all epochs apart; of held-out images 0.
    """

    rows: Tensor
    positions: Tensor
    step: int = 0


class LabelledRows(Dataset[dict[str, Tensor]], ABC):
    """N images in the form that a bank holds them, with labels, read a whole batch at once: an item is a `Planned`.

    What the network sees of stored values is ``scale * stored + shift`` in float32, with the bits that the bank gives.

    Args:
        shape: of a row as it is stored; of moments (2, C, H, W), a mean and a std.
        dtype: of stored values.
        labels: (N,) int64, in [0, num_classes); None without.
        num_classes: number of classes, those without an image included.
        in_bank: whether the rows are rows of the bank, i.e. this is the training set. Batches of held-out images carry
            no ``index``: an oracle that is given one takes the row for the query's own.
        scale: a number, or a tensor that broadcasts to a row.
        shift: likewise.

    Raises:
        ValueError: if a label lies outside its range.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        labels: Tensor | None,
        num_classes: int,
        in_bank: bool = True,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
    ) -> None:
        if labels is not None:
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"labels must lie in [0, {num_classes}), the number of classes; they span [{low}, {high}]"
                )
        self.shape, self.dtype, self.labels, self.num_classes, self.in_bank = shape, dtype, labels, num_classes, in_bank
        self.scale, self.shift = scale, shift

    on_host = True
    """Whether batches come out in the host's memory, from where they travel to the device."""

    @property
    def is_moments(self) -> bool:
        """Whether a row is a distribution, from which x1 is drawn anew each time."""
        return len(self.shape) == 4

    @abstractmethod
    def __len__(self) -> int:
        """Number of images, flips not counted."""

    @abstractmethod
    def stored(self, index: Tensor) -> Tensor:
        """Bank rows (B,) int64 as they are stored: (B, *shape), memory of their own.

        Raises:
            IndexError: if a row lies outside [0, 2 N).
        """

    def x1(self, item: Planned) -> Tensor:
        """What the network sees of a micro-batch: (B, ...) float32."""
        return self.normalise(self.stored(item.rows))

    def normalise(self, stored: Tensor) -> Tensor:
        """What the network sees of stored rows (B, *shape), whose memory is used: (B, *shape) float32."""
        return stored.float().mul_(self.scale).add_(self.shift)  # new memory would cost more than the operations

    def name_of(self, row: int) -> str:
        """What a bank row is called in an error."""
        return f"row {row}"

    def labels_of(self, index: Tensor) -> Tensor:
        """Labels of bank rows (B,): (B,) int64; -1 without."""
        return torch.full_like(index, -1) if self.labels is None else self.labels[index % len(self)]

    def check_index(self, index: Tensor) -> None:
        """Raise IndexError if a row lies outside [0, 2 N)."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < 2 * len(self):
            raise IndexError(f"rows must lie in [0, {2 * len(self)}); they span [{index.min()}, {index.max()}]")

    def __getitem__(self, item: Planned | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The planned batch: x1, labels, position and, if in_bank, index."""
        item = Planned(*item)
        batch = {"x1": self.x1(item), "labels": self.labels_of(item.rows), "position": item.positions}
        return {**batch, "index": item.rows} if self.in_bank else batch


class LabelledImages(LabelledRows):
    """Images in memory, as 8-bit pixels.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64, in [0, num_classes).
        num_classes: number of classes, those without an image included.
        in_bank: whether this is the training set; see `LabelledRows`.

    Raises:
        ValueError: if there is no image, a dtype or a shape is wrong, or a label lies outside its range.
    """

    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, in_bank: bool = True) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
            raise ValueError(
                f"need at least one uint8 image, (N, C, H, W); got {images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"need one int64 label for each of the {len(images)} images; got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        super().__init__(tuple(images.shape[1:]), torch.uint8, labels, num_classes, in_bank, SCALE, SHIFT)
        self.images = images

    def __len__(self) -> int:
        """Number of images, flips not counted."""
        return len(self.images)

    def stored(self, index: Tensor) -> Tensor:
        """Pixels of bank rows (B,): (B, C, H, W) uint8. See `LabelledRows.stored`."""
        self.check_index(index)
        x = self.images[index % len(self)]
        return torch.where((index >= len(self)).view(-1, 1, 1, 1), x.flip(-1), x)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """What the network sees of bank rows (B,): (B, C, H, W) float32 in [-1, 1], and labels (B,)."""
        return self.x1(Planned(index, index)), self.labels[index % len(self)]


class EpochSampler(DistributedSampler[Planned]):
    """Whole micro-batches of shuffled bank rows, for ``DataLoader(..., batch_size=None)``.

    Micro-batch m of an optimizer step on rank r of R takes the positions [(m R + r) b, (m R + r + 1) b) of the global
    batch, b = batch_size / (R * accumulation). Order and flips of an epoch depend on seed and epoch alone; what is left
    over after the last whole batch waits for another epoch. A `DistributedSampler`, because Lightning replaces others.

    Args:
        dataset: the training set, N images.
        batch_size: images per optimizer step, over all ranks and accumulated micro-batches.
        flip: whether a fair coin replaces each image by its horizontal flip.
        seed: of order and flips.
        num_replicas: number of ranks R.
        rank: this rank.
        accumulation: micro-batches per optimizer step.
        place: called as an iteration starts, says where: the epoch, and how many images of it (global, a whole number
            of micro-batches) are done. None: at the epoch of ``set_epoch`` and the attribute ``start``, which is 0
            unless set after ``set_epoch``.

    Raises:
        ValueError: if batch_size is larger than N or does not divide into ranks and micro-batches.
    """

    def __init__(
        self,
        dataset: LabelledRows,
        batch_size: int,
        *,
        flip: bool = False,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        place: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        if not 1 <= batch_size <= len(dataset):
            raise ValueError(
                f"batch_size={batch_size} must lie between 1 and the number of training images, {len(dataset)}"
            )
        check_shares(batch_size, num_replicas, accumulation)
        self.num_images, self.batch_size, self.flip, self.accumulation = len(dataset), batch_size, flip, accumulation
        self.place = place
        self.start = 0

    @property
    def micro_batch_size(self) -> int:
        """Images per micro-batch, over all ranks."""
        return self.batch_size // self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a new epoch starts at its beginning."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def __len__(self) -> int:
        """Micro-batches of a full epoch on this rank, wherever the iteration starts."""
        return self.num_images // self.batch_size * self.accumulation

    def __iter__(self) -> Iterator[Planned]:
        """Bank rows and positions in the global batch, each (b,) int64."""
        epoch, start = self.place() if self.place else (self.epoch, self.start)
        if start % self.micro_batch_size:
            raise ValueError(
                f"cannot start after {start} images of an epoch: {self.micro_batch_size} make one micro-batch"
            )
        rows = torch.randperm(self.num_images, generator=keyed_generator("order", self.seed, epoch))
        if self.flip:
            coins = torch.randint(2, (self.num_images,), generator=keyed_generator("flips", self.seed, epoch))
            rows += self.num_images * coins
        local = self.micro_batch_size // self.num_replicas
        for micro_batch in range(start // self.micro_batch_size, len(self)):
            step, m = divmod(micro_batch, self.accumulation)
            positions = (m * self.num_replicas + self.rank) * local + torch.arange(local)
            number = epoch * (self.num_images // self.batch_size) + step
            yield Planned(rows[step * self.batch_size + positions], positions, number)


class HeldOutSampler(DistributedSampler[Planned]):
    """Every held-out image exactly once, in order; all ranks make the same number of batches, and none is empty.

    Contiguous parts, one after the other to each rank, differ by at most one image. A part holds at most
    batch_size / num_replicas images, rounded up, or one or two where smaller ones would leave a rank without any.

    Args:
        dataset: the held-out set, N images.
        batch_size: images per batch over all ranks, at least one for each.
        num_replicas: number of ranks.
        rank: this rank.

    Raises:
        ValueError: if batch_size or N is smaller than the number of ranks.
    """

    def __init__(self, dataset: LabelledRows, batch_size: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        if min(len(dataset), batch_size) < num_replicas:
            raise ValueError(
                f"{len(dataset)} held-out images in batches of {batch_size} leave some of the {num_replicas} ranks "
                f"without an image: hold out at least {num_replicas} images and set val_batch_size to as many or more"
            )
        self.num_images = len(dataset)
        self.num_batches = min(-(-self.num_images // batch_size), self.num_images // num_replicas)

    def __len__(self) -> int:
        """Batches on this rank, and on each other."""
        return self.num_batches

    def __iter__(self) -> Iterator[Planned]:
        """Rows and positions: both are the number of the held-out image, (b,) int64."""
        parts = torch.arange(self.num_images).tensor_split(self.num_batches * self.num_replicas)
        return (Planned(part, part) for part in parts[self.rank :: self.num_replicas])
