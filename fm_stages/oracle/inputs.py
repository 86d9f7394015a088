"""What is refused before anything is computed: rows and indices that no answer would belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.oracle.stored_rows import RowReader


def check_tensor(name: str, x: Tensor) -> None:
    """Raise TypeError unless this is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be given as a tensor (B, ...), got {type(x).__name__}")


def check_index(index: Tensor, num_rows: int) -> None:
    """Raise ValueError unless these are rows (B,) of a set of so many: on a GPU a wrong one would end the process."""
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"an index is (B,) integers, got {index.dtype} of shape {tuple(index.shape)}")
    if index.device.type != "meta" and len(index):
        low, high = (int(end) for end in index.aminmax())
        if low < 0 or high >= num_rows:
            raise ValueError(f"index runs from {low} to {high}, but the bank has {num_rows} rows, counted from 0")


def check_rows(x1: RowReader, labels: Tensor | None, scale: float | Tensor, shift: float | Tensor) -> None:
    """Raise ValueError unless a bank can be made of these, by all but the values; arguments as of `DataBank`."""
    if len(x1.shape) < 2 or 0 in x1.shape:
        raise ValueError(f"a bank needs at least one row of at least one value, got x1 of shape {tuple(x1.shape)}")
    if not x1.dtype.is_floating_point and x1.dtype != torch.uint8:
        raise ValueError(f"rows are floating point or uint8; x1 is {x1.dtype}: preprocess it as for the network")
    if x1.dtype == torch.uint8 and not isinstance(scale, Tensor) and scale == 1:
        raise ValueError("uint8 rows need the scale and shift that make of them what the network sees")
    row = torch.Size(x1.shape[1:])
    for name, value in (("scale", scale), ("shift", shift)):
        number = torch.as_tensor(value)
        if not bool(torch.isfinite(number).all()) or (name == "scale" and bool((number == 0).any())):
            raise ValueError(f"{name} must be finite, and the scale not 0; got {value}")
        if number.numel() > 1 and _broadcast(number.shape, row) != row:
            raise ValueError(f"{name} of shape {tuple(number.shape)} does not fit rows of shape {tuple(row)}")
    if labels is None:
        return
    if labels.shape != (x1.shape[0],) or labels.is_floating_point():
        raise ValueError(
            f"need one integer label per row: x1 has {x1.shape[0]} rows, labels are {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels of bank rows are 0 or larger, got {int(labels.min())}; -1 marks queries only")


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size | None:
    try:
        return torch.broadcast_shapes(one, other)
    except RuntimeError:
        return None
