"""Rows in ``.npy`` files: one array of all rows, or one latent per file in a folder or zip. Nothing is unpickled."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_stages.data.foreign import check_array, parse_json
from fm_stages.data.host import available_memory_bytes
from fm_stages.data.stored_rows import StoredRows, as_labels, check_shape, kept_dtype

_MOMENTS = "img-mean-std"
"""How names of files begin that hold a VAE's mean and standard deviation, (2 C, H, W), as REPA and EDM2 write them."""

_LABELS = "dataset.json"


def open_array(file: Path) -> StoredRows:
    """The rows of a ``.npy`` file (N, ...), with the labels of ``<stem>_labels.npy`` if that is beside it.

    Raises:
        ValueError: if the file or its labels cannot be read as such.
    """
    if _holds_moments(file.name):
        raise ValueError(f"{file} holds the mean and standard deviation of one latent: give the folder of all of them")
    array = _mapped(file)
    dtype = kept_dtype(array.dtype, file)
    check_shape(array.shape, file)
    shape, labels, beside = array.shape[1:], None, file.with_name(f"{file.stem}_labels.npy")
    if beside.exists():
        values = _mapped(beside)
        if values.dtype.kind not in "iu":
            raise ValueError(f"{beside} holds {values.dtype.name}: labels are integers")
        labels = as_labels(_as_tensor(values), len(array), beside)
    return StoredRows(len(array), shape, dtype, lambda rows: _as_tensor(array[rows.numpy()]).to(dtype), labels)


def open_array_folder(folder: Path, files: list[Path]) -> StoredRows:
    """One row per ``.npy`` file of a folder, with the labels of ``dataset.json`` if that is in it.

    Raises:
        ValueError: if a file holds an array of many rows, or another shape or dtype than the others; or if dataset.json
            does not label each file.
    """
    if len(files) == 1 or any(file.stem.endswith("_labels") for file in files):
        raise ValueError(f"in a folder each .npy file is one row; for an array of rows give its path, as {files[0]}")
    names = [file.relative_to(folder).as_posix() for file in files]
    listed = folder / _LABELS
    labels = _listed_labels(listed.read_bytes(), listed, names) if listed.exists() else None
    return _of_files(_FolderFiles(folder, names), labels)


def open_array_zip(file: Path) -> StoredRows:
    """One row per ``.npy`` file of a zip without compression, as EDM2 packs them; labels as in a folder.

    Raises:
        ValueError: as for a folder; or if the zip is compressed, or none.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            names = sorted(name for name in entries if name.endswith(".npy"))
            listed = archive.read(_LABELS) if _LABELS in entries else None
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {file} ({error}): pack it again") from error
    if not names:
        raise ValueError(f"{file} holds no .npy files: one for each latent is what can be read")
    if any(entries[name].compress_type != zipfile.ZIP_STORED for name in names):
        raise ValueError(f"{file} is compressed, so that rows cannot be read at random: pack it again with zip -0")
    labels = None if listed is None else _listed_labels(listed, file / _LABELS, names)
    return _of_files(_ZipFiles(file, names), labels)


class _FolderFiles:
    """``.npy`` files by number."""

    def __init__(self, place: Path, names: Sequence[str]) -> None:
        self.place, self.names = place, names

    def array(self, number: int) -> np.ndarray:
        """What the file of this number holds."""
        return _mapped(self.place / self.names[number])


class _ZipFiles(_FolderFiles):
    """The same in a zip."""

    _archive: zipfile.ZipFile | None = None
    _process = 0

    def array(self, number: int) -> np.ndarray:
        """What the file of this number holds."""
        if self._archive is None or self._process != os.getpid():  # processes would move one another's place in a file
            self._archive, self._process = zipfile.ZipFile(self.place), os.getpid()
        name = self.names[number]
        try:
            check_array(self._archive, name, available_memory_bytes())
            with self._archive.open(name) as content:
                return np.lib.format.read_array(content, allow_pickle=False)
        except Exception as error:  # numpy, zipfile and zlib fail in many ways
            raise ValueError(f"cannot read {name} of {self.place} ({error}): pack it again") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "names": self.names}


class _FileRows:
    """Reads rows of one file each, which have to be alike."""

    def __init__(self, files: _FolderFiles, like: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.files, self.stored_shape, self.stored_dtype = files, like.shape, like.dtype
        self.shape, self.dtype = shape, dtype

    def name_of(self, row: int) -> str:
        """Where a row lies."""
        return str(self.files.place / self.files.names[row])

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows (M,): (M, *shape)."""
        out = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        for into, number in zip(out, rows.tolist(), strict=True):
            array = self.files.array(number)
            if array.shape != self.stored_shape or array.dtype != self.stored_dtype:
                first = f"{self.files.names[0]} {self.stored_dtype} of {self.stored_shape}"
                held = f"{self.name_of(number)} holds {array.dtype} of shape {array.shape}"
                raise ValueError(f"{held}, {first}: rows of one set are alike")
            into.copy_(_as_tensor(array).view(self.shape))
        return out


def _of_files(files: _FolderFiles, labels: Tensor | None) -> StoredRows:
    """Rows of one file each, of the kind of the first."""
    first, file = files.array(0), files.place / files.names[0]
    dtype, shape = kept_dtype(first.dtype, file), first.shape
    if first.ndim == 0 or first.size == 0:
        raise ValueError(f"{file} holds an array of shape {shape}: a row has one or more values")
    of_moments = [_holds_moments(name) for name in files.names]
    if is_moments := of_moments[0]:
        if len(shape) != 3 or shape[0] % 2 or dtype == torch.uint8:
            raise ValueError(f"{file} holds {first.dtype} of shape {shape}: moments are floats, (2 C, H, W)")
        shape = (2, shape[0] // 2, *shape[1:])
    if not all(kind == is_moments for kind in of_moments):
        other = files.names[of_moments.index(not is_moments)]
        raise ValueError(
            f"only one of {file} and {other} holds moments, a mean and a standard deviation: move one kind"
        )
    read = _FileRows(files, first, shape, dtype)
    return StoredRows(len(files.names), shape, dtype, read, labels, is_moments=is_moments, name_of=read.name_of)


def _listed_labels(content: bytes, file: Path, names: list[str]) -> Tensor | None:
    """Labels (N,) of the files of these names from ``{"labels": [[name, class], ...]}``; None where all are null."""
    try:
        entries = parse_json(content, file)["labels"] or []
        label_of = dict(entry for entry in entries if entry is not None)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f'cannot read {file} ({error!r}): need {{"labels": [["file.npy", class], ...]}}') from error
    if all(label is None for label in label_of.values()):
        return None
    for name in names:
        if type(label_of.get(name)) is not int:
            raise ValueError(f"{file} gives {name} the label {label_of.get(name)}: need a class number for each file")
    return as_labels(torch.tensor([label_of[name] for name in names]), len(names), file)


def _mapped(file: Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped into memory without being read."""
    try:
        return np.lib.format.open_memmap(file, mode="r")  # unlike np.load it has no way to unpickle
    except Exception as error:  # numpy parses its header as Python, and fails in many ways
        raise ValueError(f"cannot read {file} ({error}): write it with np.save, from an array of numbers") from error


def _as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own, in this machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _holds_moments(name: str) -> bool:
    return name.rpartition("/")[2].startswith(_MOMENTS)
