"""Images that are measured, by number: drawn from a network as they are asked for, or rows of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fm_stages.data import LabelledRows, Planned, TrainingData
from fm_stages.flow import keyed_generator
from fm_stages.studies.drawing import Drawing

Shape = tuple[int, int, int]

SPLITS = ("held_out", "train")


@dataclass
class Batch:
    """Some of the images.

    Attributes:
        index: (B,) int64, their numbers.
        pixels: (B, C, H, W) uint8, on the CPU.
        labels: (B,) int64, -1 where there is none, or none is known.
        values: (B, ...) the same in the units of the network; None where nothing makes these of pixels.
        skipped: names of the files that could not be read, each with the reason.
    """

    index: Tensor
    pixels: Tensor
    labels: Tensor
    values: Tensor | None = None
    skipped: list[str] = field(default_factory=list)


@dataclass
class Images:
    """Images with numbers from 0 to ``num``.

    Attributes:
        name: in a table.
        num: how many there are.
        read: the images with these numbers (B,), on any rank.
        record: what a report says of them.
    """

    name: str
    num: int
    read: Callable[[Tensor], Batch]
    record: dict[str, Any]


def picture_shape(data: TrainingData) -> Shape:
    """Shape (C, H, W) of the pixels of a data set, which is read.

    Raises:
        ValueError: if nothing makes pixels of its rows.
    """
    data.prepare_data()
    data.setup()
    shape = data.picture_shape(data.shape)
    if shape is None:
        raise ValueError(
            f"{type(data).__name__} names no VAE, so nothing makes pixels of its latents: set the data's vae, or give "
            "the images themselves as --data '{class_path: ImageFolder, init_args: {...}}'"
        )
    return shape


def drawn(drawing: Drawing, data: TrainingData, shape: Shape, num: int) -> Images:
    """Images that a network draws, made pixels by the data that it was trained on.

    Raises:
        ValueError: if those pixels are of another shape than the reference's.
    """
    own = data.picture_shape(drawing.shape)
    if own != shape:
        raise ValueError(
            f"{drawing.files[0]} draws images of {_text(own or drawing.shape)} (channels, height, width), the "
            f"reference images are {_text(shape)}: give --data of the same size"
        )

    def read(index: Tensor) -> Batch:
        values = drawing.draw(index)
        return Batch(index, data.to_pixels(values).cpu(), drawing.labels(index), values)

    files = list(drawing.files)
    record = {"checkpoint": files[0] if len(files) == 1 else files, "num": num, **drawing.settings.plain}
    return Images("samples", num, read, record)


def rows_of(data: TrainingData, split: str, num: int | None, device: torch.device, seed: int = 0) -> Images:
    """Images of a data set: held-out ones in their order, which is mixed; training ones drawn by the seed.

    Args:
        data: that was set up.
        split: one of `SPLITS`.
        num: how many; None: all.
        device: where latents are decoded.
        seed: of the draw.

    Raises:
        ValueError: if there are fewer.
    """
    loader = data.val_dataloader() if split == "held_out" else data.train_dataloader()
    rows: Any = loader.dataset
    assert isinstance(rows, LabelledRows)
    in_all = len(rows)
    if num is not None and num > in_all:
        kind = "held-out" if split == "held_out" else "training"
        raise ValueError(f"--num_reference {num}: {type(data).__name__} has {in_all} {kind} images")
    num = num or in_all
    order = torch.arange(in_all)
    if split == "train" and num < in_all:
        order = torch.randperm(in_all, generator=keyed_generator("evaluate", seed))
    latent = data.picture_shape(data.shape) != data.shape

    def read(index: Tensor) -> Batch:
        batch = rows[Planned(order[index], order[index])]
        return Batch(index, data.to_pixels(batch["x1"].to(device)).cpu(), batch["labels"], batch["x1"])

    record = {
        "data": type(data).__name__,
        "split": split,
        "num": num,
        "num_in_all": in_all,
        "pixels": "decoded from latents by the VAE" if latent else "as stored",
    }
    return Images("held-out images" if split == "held_out" else "training images", num, read, record)


def check_shape(name: str, found: tuple[int, ...], shape: Shape) -> None:
    """Raise a ValueError if images (C, H, W) are not of the reference's shape."""
    if tuple(found) != shape:
        raise ValueError(
            f"{name} is {_text(found)} (channels, height, width), the reference images are {_text(shape)}: resize one "
            "kind, or give --data of the same size, as '{class_path: FashionMNIST, init_args: {image_size: 14}}'"
        )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
