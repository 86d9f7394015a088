"""The image files that are encoded: which they are, in which order, and the square that is cut out of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from fm_stages.data.foreign import open_picture, reading_image
from fm_stages.data.images import training_folder


@dataclass(frozen=True)
class ImageFiles:
    """Image files in order: that of torchvision's ImageFolder, by class and then by name.

    Attributes:
        folder: that holds them.
        files: of each image, relative to the folder.
        labels: (N,) int64, the number of its class.
        class_names: of the labels.
    """

    folder: Path
    files: list[str]
    labels: Tensor
    class_names: list[str]


def splits_of(folder: Path) -> dict[str, Path]:
    """The folders of images inside a folder: ``train`` and ``val`` if it has both, else one, whose name is empty.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.resolve()}: give one that holds images or class folders")
    parts = {name: folder / name for name in ("train", "val")}
    if all(part.is_dir() for part in parts.values()):
        return parts
    return {"": training_folder(folder)}


def list_images(folder: Path, class_names: list[str] | None = None) -> ImageFiles:
    """The images of class folders, at any depth in them, or of a flat folder, which is one class of the folder's name.

    Args:
        folder: of the images.
        class_names: of the labels; None: the class folders, sorted. A held-out set needs those of the training set.

    Raises:
        FileNotFoundError: if there is no image, or a class folder has none.
        ValueError: if there are images beside class folders, or a class folder that class_names lacks.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    loose = [entry.name for entry in entries if entry.is_file() and entry.name.lower().endswith(IMG_EXTENSIONS)]
    classes = [entry.name for entry in entries if entry.is_dir()]
    if loose and classes:
        raise ValueError(
            f"{folder} holds images ({loose[0]}, ...) beside folders ({classes[0]}, ...): move one kind elsewhere"
        )
    _check_names(folder, loose)
    if loose:
        names = [folder.resolve().name] if class_names is None else class_names
        if len(names) != 1:
            raise ValueError(f"{folder} holds images without class folders, and there are {len(names)} classes")
        return ImageFiles(folder, loose, torch.zeros(len(loose), dtype=torch.int64), names)
    if not classes:
        raise FileNotFoundError(f"{folder.resolve()} holds no images: give a folder of images or of class folders")
    found, numbers = find_classes(folder)
    if class_names is not None:
        if unknown := set(found) - set(class_names):
            raise ValueError(f"{folder} has class folders that are not among the classes: {', '.join(sorted(unknown))}")
        numbers = {name: number for number, name in enumerate(class_names)}
    samples = make_dataset(folder, numbers, IMG_EXTENSIONS, allow_empty=class_names is not None)
    if not samples:
        raise FileNotFoundError(f"{folder.resolve()} holds no images, only folders without any")
    files = [os.path.relpath(file, folder) for file, _ in samples]
    _check_names(folder, files)
    return ImageFiles(folder, files, torch.tensor([label for _, label in samples]), class_names or found)


def _check_names(folder: Path, files: list[str]) -> None:
    """Raise a ValueError if a name does not fit into a line of a list."""
    if strange := next((file for file in files if "\n" in file), None):
        raise ValueError(f"{folder} holds a file whose name has two lines, {strange!r}: rename it")


def open_square(file: Path, image_size: int) -> tuple[Tensor, bool]:
    """An image as RGB pixels, cut to a square as ADM does, (3, S, S) uint8; and whether it had to be enlarged.

    The peers whose checkpoints start from latents (DiT, SiT, LightningDiT, REPA) cut theirs so: halved by averages of
    four pixels while the shorter side is twice as long as asked for, then resized bicubically, then the centre. The
    pixels of `ImageFolder` are resized in one step, and one column off where the longer side rounds up: at 256 they are
    the same for photographs of 500x375, and other ones for 640x427.

    Source: center_crop_arr of guided-diffusion (arXiv 2105.05233), image_datasets.py.

    Raises:
        ValueError: if the file cannot be read, with its name.
    """
    with reading_image(file):
        image = open_picture(file)
        enlarged = min(image.size) < image_size
        while min(image.size) >= 2 * image_size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = image_size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
        pixels = np.asarray(image.crop((left, top, left + image_size, top + image_size)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous(), enlarged
