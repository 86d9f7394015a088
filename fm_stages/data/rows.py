"""A training set read from files into what `DataBank` takes: arrays, safetensors, folders of images or of latents."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from fm_stages.data.array_files import open_array
from fm_stages.data.foreign import check_pixels, reading_image
from fm_stages.data.host import available_memory_bytes
from fm_stages.data.images import class_files, decode, training_folder
from fm_stages.data.latent_files import files_below, open_latents
from fm_stages.data.latent_index import INDEX
from fm_stages.data.loading import SCALE, SHIFT
from fm_stages.data.normalisation import normalised, statistics_file
from fm_stages.data.stored_rows import StoredRows
from fm_stages.data.tensor_files import open_tensors
from fm_stages.flow import keyed_generator

_ACCEPTED = (
    "a .npy or .safetensors file, a folder of images or of class folders of images, or a folder of latents "
    "(.safetensors shards, or one .npy file each; or a .zip of those)"
)


class Rows(NamedTuple):
    """What `DataBank` takes: rows (N, ...) as stored, labels (N,) int64 or None, scale and shift; names of classes.

    The rows are uint8, float16, bfloat16 or float32; scale and shift are numbers or tensors that broadcast to a row.
    ``num_in_all`` is how many rows there are, of which these may be a part.
    """

    x1: Tensor
    labels: Tensor | None
    scale: float | Tensor
    shift: float | Tensor
    class_names: list[str]
    num_in_all: int


def read_rows(path: str | Path, image_size: int | None = None, num_rows: int | None = None, seed: int = 0) -> Rows:
    """Read a training set, or a random part of it.

    - A ``.npy`` file (N, ...): uint8 pixels, which the network sees in [-1, 1], or floats, taken as they are (float64
      becomes float32). Labels are in ``<stem>_labels.npy`` beside it, if that is there.
    - A ``.safetensors`` file: the tensor ``latents``, ``images`` or ``x1``, or the only one; with ``labels``, and
      ``latents_flip`` as further rows after the others, if they are there.
    - A folder of images, or of class folders, or one whose ``train`` folder has class folders: as `ImageFolder` reads
      them, but all of them, for none is held out here. Where all files are grey, rows have one channel.
    - A folder of latents, as `fm_stages.data.Latents` reads them: of ``index.json`` and its shards, of LightningDiT's
      ``latents_rank*_shard*.safetensors``, or of ``.npy`` files of one latent each, with labels in ``dataset.json`` if
      that is there. Rows that LightningDiT's sampler repeated at the end are left out where the labels tell them, as
      those of an ImageFolder in order do; where they do not, there is a warning, and up to one row less than there were
      ranks may be there twice.

    A folder of latents is normalised by its ``latents_stats.pt``, which is computed if it is not there, through scale
    and shift: x1 is what the files hold. A single ``.safetensors`` file is, if that is beside it.

    Args:
        path: the file or folder.
        image_size: side of the images of a folder; None: the one that all of them have.
        num_rows: how many rows to draw without replacement, flips counted as rows, in rising order; None: all.
        seed: of that draw.

    Raises:
        FileNotFoundError: if there is no such file or folder, or a class folder has no image.
        ValueError: if it holds something else, cannot be read, or an argument does not fit it.
        MemoryError: if the rows and their bank do not fit into memory.
    """
    path = Path(path).expanduser()
    for name, value in (("image_size", image_size), ("rows", num_rows)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be 1 or more")
    source = _open(path, image_size)
    if image_size is not None and source.shape[-1] != image_size:
        raise ValueError(f"--image_size is for a folder of images; the rows of {path} are of shape {source.shape}")
    if num_rows is not None and num_rows > source.num_rows:
        raise ValueError(f"--rows {num_rows} is more than the {source.num_rows} rows of {path}")
    index = some_rows(source.num_rows, num_rows, seed)
    _check_memory(source, len(index))
    labels = None if source.labels is None else source.labels[index]
    scale, shift = (SCALE, SHIFT) if source.dtype == torch.uint8 else (source.scale, source.shift)
    return Rows(source.take(index), labels, scale, shift, source.class_names, source.num_rows)


def some_rows(num_rows: int, wanted: int | None, seed: int) -> Tensor:
    """Which rows to take, drawn without replacement: in rising order; all of them where None are asked for."""
    if wanted is None:
        return torch.arange(num_rows)
    return torch.randperm(num_rows, generator=keyed_generator("rows", seed))[:wanted].sort().values


def _open(path: Path, image_size: int | None) -> StoredRows:
    """Find out what there is, without reading the rows."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.resolve()}: give {_ACCEPTED}")
    if path.is_dir():
        return _open_folder(training_folder(path), image_size)
    match path.suffix.lower():
        case ".npy":
            return open_array(path)
        case ".safetensors":
            return _open_tensors(path)
        case ".zip":
            return _open_latents(path)
    raise ValueError(f"{path} is of no kind that can be read: give {_ACCEPTED}")


def _open_tensors(file: Path) -> StoredRows:
    """One ``.safetensors`` file, with the statistics beside it if they are there."""
    rows = open_tensors([file])
    stats = statistics_file(file)
    return normalised(rows, file, "channels") if stats.exists() and rows.dtype != torch.uint8 else rows


def _open_folder(folder: Path, image_size: int | None) -> StoredRows:
    """Find out which one kind of files a folder holds, at any depth."""
    if (folder / INDEX).exists():
        return _open_latents(folder)
    suffixes = {"images": IMG_EXTENSIONS, ".safetensors files": (".safetensors",), ".npy files": (".npy",)}
    of_kind = files_below(folder, suffixes)
    kinds = [kind for kind, those in of_kind.items() if those]
    if len(kinds) != 1:
        raise ValueError(f"{folder} holds {' and '.join(kinds) or 'nothing that can be read'}: give {_ACCEPTED}")
    return _open_images(folder, of_kind["images"], image_size) if of_kind["images"] else _open_latents(folder)


def _open_latents(place: Path) -> StoredRows:
    """Latents as `fm_stages.data.Latents` reads them unless it is told otherwise."""
    rows, index = open_latents(place)
    if rows.is_moments:
        raise ValueError(
            f"{place} holds moments, a VAE's means and standard deviations, from which training draws each row anew: "
            "such a set is a mixture of Gaussians and no set of points; Latents(data_dir).bank() holds it, and "
            "StageProfile.measure(oracle_of(bank, path)) measures its stages"
        )
    are_latents = len(rows.shape) == 3 and rows.dtype != torch.uint8
    return normalised(rows, place, "channels", index=index) if are_latents else rows


def _open_images(folder: Path, files: list[Path], image_size: int | None) -> StoredRows:
    """The images of a flat folder, or of class folders with labels."""
    names: list[str] = []
    labels = None
    loose = [file for file in files if file.parent == folder]
    if not loose:
        names, _, samples = class_files(folder)
        files, labels = [Path(file) for file, _ in samples], torch.tensor([label for _, label in samples])
    elif len(loose) < len(files):
        raise ValueError(f"{folder} holds {len(loose)} images beside folders of images: move one kind elsewhere")
    grey, sizes = _survey(files, image_size is not None)
    if image_size is None:
        if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
            shown = ", ".join(f"{width}x{height}" for width, height in sizes[:4]) + ", ..." * (len(sizes) > 4)
            raise ValueError(f"{folder} holds images of {shown}: give --image_size, the side of the squares to make")
        image_size = sizes[0][0]
    channels, size = 1 if grey else 3, image_size

    def read(rows: Tensor) -> Tensor:
        return decode([str(files[row]) for row in rows.tolist()], size)[:, :channels].contiguous()

    return _Images(len(files), (channels, size, size), torch.uint8, read, labels, class_names=names)


class _Images(StoredRows):
    """Images, which are decoded under a bar of their own."""

    def take(self, rows: Tensor) -> Tensor:
        """Rows (M,): (M, *shape)."""
        return self.read(rows)


def _survey(files: list[Path], size_is_given: bool) -> tuple[bool, list[tuple[int, int]]]:
    """Whether all images are grey, and the sizes that occur, from the headers; no further than needed."""
    grey, sizes = True, set()
    for file in tqdm(files, "Reading image headers", unit="image", delay=1):
        with reading_image(file), Image.open(file) as image:
            check_pixels(image)
            grey = grey and image.mode in ("1", "L")
            sizes.add(image.size)
        if size_is_given and not grey:
            break
    return grey, sorted(sizes)


def _check_memory(source: StoredRows, num_rows: int) -> None:
    """Raise if the rows and the bank that is made of them do not fit into memory."""
    needed = 2 * num_rows * math.prod(source.shape) * source.dtype.itemsize
    available = available_memory_bytes()
    if needed > available:
        raise MemoryError(
            f"{num_rows} rows of shape {source.shape} and their bank need {needed / 2**30:.1f} GiB of memory, "
            f"{available / 2**30:.1f} GiB are available: take a part of them with --rows"
        )
