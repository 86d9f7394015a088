"""Rows on disk, opened but not read: what every reader of files gives, and what they check alike."""

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

PIECE = 4096
"""Rows read at a time: conversions need working memory."""


class StoredRows(NamedTuple):
    """A training set on disk, opened but not read.

    Attributes:
        num_rows: N, flips included.
        shape: of a row; of moments (2, C, H, W), a mean and a std.
        dtype: of a row in memory.
        read: rows (M,) int64 in any order: (M, *shape), memory of their own. It can be sent to another process.
        labels: (N,) int64, or None.
        scale: number, or tensor that broadcasts to a row, by which rows that are no pixels are multiplied.
        shift: likewise, what is added then.
        class_names: of the labels, if they are known.
        has_flips: whether the second half of the rows are the flips of the first.
        is_moments: whether a row is a mean and a std, from which training draws anew at every step.
        name_of: where a row lies, for errors.
    """

    num_rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    scale: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    class_names: list[str] = []
    has_flips: bool = False
    is_moments: bool = False
    name_of: Callable[[int], str] = "row {}".format

    @property
    def num_images(self) -> int:
        """Rows that are no flips."""
        return self.num_rows // 2 if self.has_flips else self.num_rows

    def take(self, rows: Tensor) -> Tensor:
        """Rows (M,), a few at a time under a progress bar: (M, *shape)."""
        x1 = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        with tqdm(total=len(rows), desc="Reading rows", unit="row", delay=1) as bar:
            for into, part in zip(x1.split(PIECE), rows.split(PIECE), strict=True):
                into.copy_(self.read(part))
                bar.update(len(part))
        return x1


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
