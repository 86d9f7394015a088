"""Rows in ``.npy`` files: one array of all rows, or a folder with one latent per file. Nothing is ever unpickled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

_KEPT = {
    "uint8": torch.uint8,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float32,
}
"""Dtypes of rows on disk, by the name that numpy and torch share, and what they are in memory."""

_PIECE = 4096
"""Rows read at a time: conversions need working memory."""

_MOMENTS = "img-mean-std"
"""How names of files begin that hold a VAE's mean and standard deviation."""


class StoredRows(NamedTuple):
    """A training set on disk, opened but not read: N rows, flips included, each of this shape and dtype.

    ``take`` reads rows (M,) int64, in rising order: (M, *shape). ``labels`` are (N,) int64 or None; ``scale`` and
    ``shift`` are for rows that are not pixels.
    """

    num_rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    take: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    class_names: list[str] = []


def kept_dtype(dtype: np.dtype | torch.dtype, file: Path) -> torch.dtype:
    """What rows of a file are in memory.

    Raises:
        ValueError: if they are neither 8-bit pixels nor floating point.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype.name
    if name not in _KEPT:
        raise ValueError(f"{file} holds {name}: rows are uint8 (pixels in 0..255) or of 16-, 32- or 64-bit floats")
    return _KEPT[name]


def check_shape(shape: tuple[int, ...], file: Path) -> None:
    """Raise ValueError unless an array of this shape holds rows."""
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{file} holds an array of shape {tuple(shape)}: need (N, ...), one or more rows of values")


def as_labels(values: Tensor, num_rows: int, file: Path) -> Tensor:
    """Labels (N,) int64.

    Raises:
        ValueError: if these are not one integer, 0 or larger, for each row.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool or values.shape != (num_rows,):
        dtype, shape = str(values.dtype).removeprefix("torch."), tuple(values.shape)
        raise ValueError(f"{file}: need an integer label for each of {num_rows} rows, got {dtype} of shape {shape}")
    labels = values.long()
    if int(labels.min()) < 0:
        raise ValueError(f"{file}: labels count classes from 0, got {int(labels.min())}; unlabelled rows have no place")
    return labels


def by_pieces(rows: Tensor, shape: tuple[int, ...], dtype: torch.dtype, read: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``read`` gives for rows (M,), a few at a time under a progress bar: (M, *shape)."""
    x1 = torch.empty(len(rows), *shape, dtype=dtype)
    with tqdm(total=len(rows), desc="Reading rows", unit="row", delay=1) as bar:
        for into, part in zip(x1.split(_PIECE), rows.split(_PIECE), strict=True):
            into.copy_(read(part))
            bar.update(len(part))
    return x1


def open_array(file: Path) -> StoredRows:
    """The rows of a ``.npy`` file (N, ...), with the labels of ``<stem>_labels.npy`` if that is beside it.

    Raises:
        ValueError: if the file or its labels cannot be read as such.
    """
    array = _mapped(file)
    dtype = kept_dtype(array.dtype, file)
    check_shape(array.shape, file)
    shape, labels, beside = array.shape[1:], None, file.with_name(f"{file.stem}_labels.npy")
    if beside.exists():
        values = _mapped(beside)
        if values.dtype.kind not in "iu":
            raise ValueError(f"{beside} holds {values.dtype.name}: labels are integers")
        labels = as_labels(_as_tensor(values), len(array), beside)

    def take(rows: Tensor) -> Tensor:
        return by_pieces(rows, shape, dtype, lambda part: _as_tensor(array[part.numpy()]))

    return StoredRows(len(array), shape, dtype, take, labels)


def open_array_folder(folder: Path, files: list[Path]) -> StoredRows:
    """One row per ``.npy`` file, with the labels of ``dataset.json`` if that is in the folder.

    Raises:
        ValueError: if a file holds moments, an array of many rows, or another shape or dtype than the others; or if
            dataset.json does not label each file.
    """
    for file in files:
        _refuse_moments(file)
    if len(files) == 1 or any(file.stem.endswith("_labels") for file in files):
        raise ValueError(f"in a folder each .npy file is one row; for an array of rows give its path, as {files[0]}")
    first = _mapped(files[0])
    dtype = kept_dtype(first.dtype, files[0])
    if first.ndim == 0 or first.size == 0:
        raise ValueError(f"{files[0]} holds an array of shape {first.shape}: a row has one or more values")

    def read_one(file: Path) -> Tensor:
        row = _mapped(file)
        if row.shape != first.shape or row.dtype != first.dtype:
            held = f"{file} holds {row.dtype} of shape {row.shape}, {files[0].name} {first.dtype} of {first.shape}"
            raise ValueError(f"{held}: rows of one set are alike")
        return _as_tensor(row)

    def take(rows: Tensor) -> Tensor:
        return by_pieces(
            rows, first.shape, dtype, lambda part: torch.stack([read_one(files[row]) for row in part.tolist()])
        )

    listed = folder / "dataset.json"
    names = [file.relative_to(folder).as_posix() for file in files]
    labels = _listed_labels(listed, names) if listed.exists() else None
    return StoredRows(len(files), first.shape, dtype, take, labels)


def _listed_labels(file: Path, names: list[str]) -> Tensor | None:
    """Labels (N,) of the files of these names from ``{"labels": [[name, class], ...]}``; None where all are null."""
    try:
        entries = json.loads(file.read_text())["labels"] or []
        label_of = dict(entry for entry in entries if entry is not None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f'cannot read {file} ({error!r}): need {{"labels": [["file.npy", class], ...]}}') from error
    if all(label is None for label in label_of.values()):
        return None
    for name in names:
        if type(label_of.get(name)) is not int:
            raise ValueError(f"{file} gives {name} the label {label_of.get(name)}: need a class number for each file")
    return as_labels(torch.tensor([label_of[name] for name in names]), len(names), file)


def _mapped(file: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped into memory without being read."""
    _refuse_moments(file)
    try:
        return np.lib.format.open_memmap(file, mode="r")  # unlike np.load it has no way to unpickle
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file} ({error}): write it with np.save, from an array of numbers") from error


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _refuse_moments(file: Path) -> None:
    if file.name.startswith(_MOMENTS):
        raise ValueError(
            f"{file} holds a VAE's mean and standard deviation, from which training draws each row anew: such a set is "
            "a mixture of Gaussians, which GaussianMixtureBank(mean, std) holds"
        )
