"""The image data sets: digits, Fashion-MNIST, CIFAR-10, and any folder of class folders."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms import v2
from tqdm import tqdm

from fm_stages.data.foreign import open_picture, reading_image
from fm_stages.data.host import available_memory_bytes, is_first_rank
from fm_stages.data.pixels import ImageData, Splits
from fm_stages.flow import keyed_generator

_DATA_DIR = "FM_STAGES_DATA"
"""Environment variable that says where the torchvision data sets are."""


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out the same fraction of each class, at random; a class of two or more has images on both sides.

    Args:
        labels: (N,) int64.
        fraction: of the images to hold out, in (0, 1).
        seed: of the choice.

    Returns:
        Indices of the training and of the held-out images, each in rising order.
    """
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.from_numpy(labels.numpy().argsort(kind="stable"))  # each class in a row, its members in rising order
    classes, counts = labels[order].unique_consecutive(return_counts=True)
    for label, members in zip(classes.tolist(), order.split(counts.tolist()), strict=True):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        shuffled = torch.randperm(len(members), generator=keyed_generator("split", seed, label))
        held_out[members[shuffled[:count]]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def mixed(rows: Tensor) -> Tensor:
    """Held-out rows (N,) in a fixed order, any first part of which is like the whole: files come class by class."""
    return rows[torch.randperm(len(rows), generator=keyed_generator("held-out order"))]


class Digits(ImageData):
    """The 1797 handwritten digits that come with scikit-learn: 8x8, grey, ten classes; a fixed fifth is held out."""

    def read(self) -> Splits:
        """Read the digits; their 17 grey levels are spread over 0..255."""
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)  # (N, 1, 8, 8)
        labels = torch.from_numpy(digits.target).long()
        train, val = stratified_split(labels, 0.2)
        return Splits(images[train], labels[train], images[val], labels[val], [str(name) for name in range(10)])


class TorchvisionImages(ImageData):
    """Base of the data sets that torchvision reads: its training split, and its test split as held-out images.

    Args:
        data_dir: where the files are; None: the environment variable FM_STAGES_DATA or, without it, ``data``.
        download: whether to fetch the files if they are not there.
        image_size: side to shrink the images to (antialiased); None: as they are.
        num_train: use only this many training images, the first ones; None: all.
        kwargs: as for `ImageData`.

    Raises:
        ValueError: if num_train or image_size is not positive.
    """

    source: type[torchvision.datasets.FashionMNIST] | type[torchvision.datasets.CIFAR10]

    def __init__(
        self,
        data_dir: str | None = None,
        download: bool = False,
        image_size: int | None = None,
        num_train: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if any(number is not None and number < 1 for number in (num_train, image_size)):
            raise ValueError(f"num_train={num_train} and image_size={image_size} must be 1 or more, or null")
        self.data_dir = Path(data_dir or os.environ.get(_DATA_DIR) or "data").expanduser()
        self.download, self.image_size, self._first = download, image_size, num_train

    def prepare_data(self) -> None:
        """Download the files if that was asked for and they are not there.

        Raises:
            RuntimeError: if that fails.
        """
        if self.download:
            try:
                for train in (True, False):
                    self.source(str(self.data_dir), train=train, download=True)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"could not download {self.source.__name__} into {self.data_dir.resolve()} ({error}). Without a "
                    "network, copy the files there by hand or point data_dir to a folder that has them"
                ) from error

    def read(self) -> Splits:
        """Read torchvision's files.

        Raises:
            FileNotFoundError: if they are missing or damaged.
            ValueError: if they hold fewer images than num_train, or smaller ones than image_size.
        """
        try:
            train, val = (self.source(str(self.data_dir), train=train) for train in (True, False))
        except Exception as error:  # a damaged file fails in many ways
            raise FileNotFoundError(
                f"no readable {self.source.__name__} files in {self.data_dir.resolve()} ({error}). Set data_dir to the "
                f"folder that has them, or set the environment variable {_DATA_DIR} to it, or set download to true"
            ) from error
        if self._first is not None and self._first > len(train):
            raise ValueError(f"num_train={self._first}, but {self.source.__name__} has {len(train)} training images")
        return Splits(
            self._pixels(train.data[: self._first]),
            torch.as_tensor(train.targets[: self._first]),
            self._pixels(val.data),
            torch.as_tensor(val.targets),
            train.classes,
        )

    def _pixels(self, data: Any) -> Tensor:
        """Pixels as torchvision holds them, (N, H, W) or (N, H, W, 3), as (N, C, H, W) uint8 of the size asked for."""
        images = torch.as_tensor(data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        size, side = self.image_size, images.shape[-1]
        if size is None or size == side:
            return images.contiguous()
        if size > side:
            raise ValueError(f"image_size={size} is larger than the images of {self.source.__name__}, {side}x{side}")
        resize = v2.Resize([size, size], v2.InterpolationMode.BICUBIC, antialias=True)
        return torch.cat([resize(part) for part in images.split(4096)])  # by pieces: it may work in float32


class FashionMNIST(TorchvisionImages):
    """Fashion-MNIST: 60 000 training and 10 000 held-out grey images of clothing, 28x28, ten classes."""

    source = torchvision.datasets.FashionMNIST


class CIFAR10(TorchvisionImages):
    """CIFAR-10: 50 000 training and 10 000 held-out colour images, 32x32, ten classes."""

    source = torchvision.datasets.CIFAR10


class ImageFolder(ImageData):
    """A folder with one folder of images per class, decoded once: shorter side resized, centre cut out, as RGB.

    A ``train`` folder of class folders inside data_dir is the training set, and ``val`` beside it the held-out one.

    Args:
        data_dir: the folder.
        image_size: side of the square images.
        val_dir: a folder of held-out images, with the same class folders; None: ``val`` if there is one, else a part
            of the training images.
        val_fraction: size of that part, in each class.
        split_seed: of its choice.
        kwargs: as for `ImageData`.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(
        self,
        data_dir: str,
        image_size: int,
        val_dir: str | None = None,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1 or not 0 < val_fraction < 1:
            raise ValueError(f"image_size={image_size} must be 1 or more, val_fraction={val_fraction} inside (0, 1)")
        self.data_dir = Path(data_dir).expanduser()
        self.val_dir = Path(val_dir).expanduser() if val_dir else None
        self.image_size, self.val_fraction, self.split_seed = image_size, val_fraction, split_seed

    def read(self) -> Splits:
        """Decode all images.

        Raises:
            FileNotFoundError: if a folder is missing, or a class folder has no image.
            ValueError: if the held-out folder does not fit the training folder, or an image cannot be read.
            MemoryError: if the images and the bank do not fit into memory.
        """
        train_dir, val_dir = self._folders()
        names, classes, files = class_files(train_dir)
        val_files = []
        if val_dir is not None:
            unknown = set(find_classes(val_dir)[0]) - set(names)
            if unknown:
                raise ValueError(f"{val_dir} has class folders that {train_dir} lacks: {', '.join(sorted(unknown))}")
            val_files = make_dataset(val_dir, classes, IMG_EXTENSIONS, allow_empty=True)
        self._check_memory(len(files), len(val_files))

        images = decode([file for file, _ in files + val_files], self.image_size)
        labels = torch.tensor([label for _, label in files + val_files])
        if val_dir is None:
            train, val = stratified_split(labels, self.val_fraction, self.split_seed)
            val = mixed(val)
            return Splits(images[train], labels[train], images[val], labels[val], names)
        n = len(files)
        val = mixed(torch.arange(n, len(images)))
        return Splits(images[:n], labels[:n], images[val], labels[val], names)

    def _folders(self) -> tuple[Path, Path | None]:
        """The training folder, and the held-out one unless it is split off."""
        train, val = training_folder(self.data_dir), self.val_dir
        if train != self.data_dir and (self.data_dir / "val").is_dir():
            val = val or self.data_dir / "val"
        for folder in (train, val):
            if folder is not None and not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder.resolve()}: set data_dir (or val_dir) to one")
        if val is not None and val.resolve().is_relative_to(train.resolve()):
            raise ValueError(f"{val} lies inside {train}, so that held-out images would be trained on: move it out")
        return train, val

    def _check_memory(self, num_train: int, num_val: int) -> None:
        """Raise if the decoded images and, while it is made, two copies of the bank do not fit into memory."""
        values = 3 * self.image_size**2
        needed = values * (num_train + num_val) + 2 * values * num_train * (2 if self.flip else 1)
        available = available_memory_bytes()
        if needed > available:
            raise MemoryError(
                f"{num_train + num_val} images of {self.image_size}x{self.image_size} and their bank need "
                f"{needed / 2**30:.1f} GiB of memory in each process, {available / 2**30:.1f} GiB are available: take "
                "a smaller image_size, fewer images, or leave flip off"
            )


def training_folder(data_dir: Path) -> Path:
    """The ``train`` folder of a folder if it holds folders itself, else the folder."""
    inner = data_dir / "train"
    return inner if inner.is_dir() and any(entry.is_dir() for entry in inner.iterdir()) else data_dir


def class_files(folder: Path) -> tuple[list[str], dict[str, int], list[tuple[str, int]]]:
    """Class folders in order, their numbers, and each image's file with the number of its class.

    Raises:
        FileNotFoundError: if there is no class folder, or one without an image, with the remedy.
    """
    names, numbers = find_classes(folder)
    try:
        return names, numbers, make_dataset(folder, numbers, IMG_EXTENSIONS)
    except FileNotFoundError as error:  # it names the class folders
        raise FileNotFoundError(f"{folder}: {error}. Remove the class folders that hold no image") from error


def decode(files: list[str], image_size: int) -> Tensor:
    """Images from files, shorter side resized (antialiased) and centre cut out: (N, 3, S, S) uint8.

    Raises:
        ValueError: if a file cannot be read, with its name.
    """
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    # Resized as PIL images: integer arithmetic, the same on every machine.
    resize = v2.Resize(image_size, v2.InterpolationMode.BICUBIC, antialias=True)
    to_square = v2.Compose([resize, v2.CenterCrop(image_size), v2.PILToTensor()])

    def decode_one(i: int) -> None:
        with reading_image(files[i]):
            images[i] = to_square(open_picture(files[i]))

    with ThreadPoolExecutor() as pool:  # PIL frees the interpreter lock while it decodes
        work = pool.map(decode_one, range(len(files)))
        for _ in tqdm(work, "Decoding images", len(files), unit="image", disable=not is_first_rank()):
            pass
    return images
