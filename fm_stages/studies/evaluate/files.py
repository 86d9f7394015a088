"""Images in files, to be measured: what ``fm-stages sample`` wrote, an ``.npz`` as evaluators read it, or a folder."""

from __future__ import annotations

import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fm_stages.data import (
    TrainingData,
    available_memory_bytes,
    check_array,
    check_pixels,
    list_images,
    read_array_header,
    read_json,
    to_model_range,
)
from fm_stages.studies.evaluate.images import Batch, Images, Shape, check_shape
from fm_stages.studies.models import labels_of
from fm_stages.studies.sample.command import RECORD
from fm_stages.studies.sample.files import FORMATS, PngFiles, ShardFiles

UNKNOWN = "unknown"
"""What a report says of files that do not tell how they came about."""


def read_record(place: Path) -> dict[str, Any] | None:
    """What ``sampling.json`` in a folder says; None where there is none.

    Raises:
        ValueError: if it is not what ``fm-stages sample`` writes, or drawing was not finished.
    """
    file = place / RECORD
    if not file.is_file():
        return None
    try:
        record = read_json(file)
        settings, finished = record["settings"], record["finished"]
        FORMATS[settings["format"]], int(settings["num"]), int(settings["seed"]), str(settings["labels"])  # noqa: B018
        files = record["checkpoint"] if isinstance(record["checkpoint"], list) else [record["checkpoint"]]
        if not files or not all(isinstance(file, str) for file in files):
            raise TypeError("a checkpoint is the name of a file")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not what fm-stages sample writes: remove it to measure the images alone"
        ) from error
    if not finished:
        raise ValueError(
            f"{file} says that drawing was not finished: call the same fm-stages sample --out {place} again, which "
            "draws what is missing"
        )
    return record


def open_images(place: Path, num: int | None, shape: Shape, data: TrainingData) -> Images:
    """Images of a folder or file.

    Args:
        place: a folder of ``fm-stages sample``, of images, or of class folders; or an ``.npz``.
        num: how many of them, the first ones; None: all.
        shape: (C, H, W) of the reference's images.
        data: that the images are like, which knows their classes and units.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be measured, or holds fewer.
    """
    if not place.exists():
        raise FileNotFoundError(f"--samples {place}: there is no such folder or file")
    record = read_record(place) if place.is_dir() else None
    if record is not None:
        images = _drawn_files(place, record, shape, data)
    elif place.suffix == ".npz":
        images = _array_file(place, shape, data)
    elif place.is_dir():
        images = _folder(place, shape, data)
    else:
        raise ValueError(f"--samples {place}: give a folder of images, or an .npz with arr_0 (N, H, W, C) uint8")
    if num is not None and num > images.num:
        raise ValueError(f"--num {num}: {place} holds {images.num} images")
    images.num = num or images.num
    return images


def _drawn_files(place: Path, record: dict[str, Any], shape: Shape, data: TrainingData) -> Images:
    """What ``fm-stages sample`` wrote."""
    settings, checkpoint = record["settings"], record["checkpoint"]
    num, rule = settings["num"], settings["labels"]
    said = {"folder": str(place), "checkpoint": checkpoint, **settings}
    if settings["format"] == "npz":
        images = _array_file(place / "samples.npz", shape, data)
        return Images("samples", images.num, images.read, said)
    files = FORMATS[settings["format"]](place, num, shape)
    if isinstance(files, PngFiles):
        paths = [place / "images" / f"{number:06d}.png" for number in range(num)]
        labels = labels_of(torch.arange(num), rule, data.num_classes, settings["seed"])
        return Images("samples", num, _Pictures(paths, labels, shape, data), said)
    assert isinstance(files, ShardFiles)
    shards: ShardFiles = files

    @lru_cache(2)
    def shard(first: int) -> tuple[Tensor, Tensor]:
        path = shards.path(first)
        try:
            images, labels = shards.read(path)
        except Exception as error:  # safetensors fails in many ways
            raise ValueError(f"{path} cannot be read ({error}): draw it again with fm-stages sample") from error
        if images.dtype != torch.uint8:
            raise ValueError(
                f"{path} holds values of a network ({images.dtype}), no pixels: measure with --ckpt, or draw --format "
                "png from a checkpoint whose data names a VAE"
            )
        check_shape(str(path), tuple(images.shape[1:]), shape)
        return images, labels

    def read(index: Tensor) -> Batch:
        size = shards.per_shard
        rows = [tuple(part[i % size] for part in shard(i // size * size)) for i in index.tolist()]
        pixels, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        return Batch(index, pixels, labels, _in_units(pixels, data))

    return Images("samples", num, read, said)


def _array_file(file: Path, shape: Shape, data: TrainingData) -> Images:
    """An ``.npz``: ``arr_0`` (N, H, W, C) uint8, and labels (N,) as ``arr_1`` if there are any."""
    try:
        images = _map_array(file, "arr_0")
        with zipfile.ZipFile(file) as archive:
            has_labels = "arr_1.npy" in archive.namelist()
        found = _read_array(file, "arr_1") if has_labels else np.zeros((0, 0))
        kept = torch.from_numpy(found).long() if found.ndim == 1 else None
    except Exception as error:  # zipfile and numpy fail in many ways
        raise ValueError(f"{file} cannot be read ({error}): it holds arr_0 (N, H, W, C) uint8, as ADM's do") from error
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(f"{file}: arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, C)")
    check_shape(f"an image of {file}", (images.shape[3], *images.shape[1:3]), shape)
    labels = torch.full((len(images),), -1) if kept is None or len(kept) != len(images) else kept

    def read(index: Tensor) -> Batch:
        pixels = torch.from_numpy(np.ascontiguousarray(images[index.numpy()])).movedim(-1, 1).contiguous()
        return Batch(index, pixels, labels[index], _in_units(pixels, data))

    return Images("samples", len(images), read, {"file": str(file), "num": len(images)})


def _map_array(file: Path, name: str) -> np.ndarray:
    """An array of an ``.npz``, mapped into memory where the file is not compressed: 50 000 images are gigabytes."""
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"{name}.npy")
        with archive.open(info) as stream:
            shape, fortran, dtype = read_array_header(stream)
            inside = stream.tell()
    if info.compress_type != zipfile.ZIP_STORED or fortran:
        return _read_array(file, name)
    with file.open("rb") as raw:
        raw.seek(info.header_offset + 26)  # where a zip's local header says how long its name and its extra field are
        start = info.header_offset + 30 + sum(int.from_bytes(raw.read(2), "little") for _ in range(2))
    return np.memmap(file, dtype, "r", start + inside, shape)


def _read_array(file: Path, name: str) -> np.ndarray:
    """An array of an ``.npz``, in memory."""
    with zipfile.ZipFile(file) as archive:
        check_array(archive, f"{name}.npy", available_memory_bytes())
        with archive.open(f"{name}.npy") as content:
            return np.lib.format.read_array(content, allow_pickle=False)


def _folder(place: Path, shape: Shape, data: TrainingData) -> Images:
    """A flat folder of images, or class folders; labels only where these are the data's classes."""
    listed = list_images(place)
    known = set(listed.class_names) <= set(data.class_names)
    numbers = torch.tensor([data.class_names.index(name) if known else -1 for name in listed.class_names])
    paths = [place / name for name in listed.files]
    read = _Pictures(paths, numbers[listed.labels], shape, data)
    return Images("samples", len(paths), read, {"folder": str(place), "num": len(paths)})


class _Pictures:
    """Reads image files; those that cannot be decoded are left out and named."""

    def __init__(self, paths: list[Path], labels: Tensor, shape: Shape, data: TrainingData) -> None:
        self.paths, self.labels, self.shape, self.data = paths, labels, shape, data

    def __call__(self, index: Tensor) -> Batch:
        pixels, kept, skipped = [], [], []
        for number in index.tolist():
            try:
                picture = _decode(self.paths[number], self.shape[0])
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's ways to fail
                skipped.append(f"{self.paths[number]}: {' '.join(str(error).split())[:120]}")
                continue
            check_shape(str(self.paths[number]), tuple(picture.shape), self.shape)
            pixels.append(picture)
            kept.append(number)
        images = torch.stack(pixels) if pixels else torch.empty(0, *self.shape, dtype=torch.uint8)
        numbers = torch.tensor(kept, dtype=torch.int64)
        return Batch(numbers, images, self.labels[numbers], _in_units(images, self.data), skipped)


def _decode(path: Path, channels: int) -> Tensor:
    """Pixels (C, H, W) uint8 of a file, with as many channels as the reference where that loses nothing.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds more than 8 bits of a colour.
    """
    with Image.open(path) as image:
        check_pixels(image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ValueError(f"pixels of mode {image.mode} are not 8 bits of grey or RGB")
        rgb = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)
    grey = bool((rgb == rgb[:1]).all())
    return rgb[:1].contiguous() if channels == 1 and grey else rgb.contiguous()


def _in_units(pixels: Tensor, data: TrainingData) -> Tensor | None:
    """What a network would see of pixels; None where it sees latents, which rounded pixels do not give back."""
    return to_model_range(pixels) if data.picture_shape(data.shape) == data.shape else None
