"""What the network sees of stored values: scale and shift, which products go through instead of through every row."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor


class Affine:
    """``scale * stored + shift``, in the dtype of what is stored or wider.

    Args:
        scale: number, or tensor that broadcasts to a row, by which stored values are multiplied.
        shift: likewise, what is added then.
        shape: of a row, of D values.
        device: where rows lie.

    Attributes:
        scale: () or (D,) float32.
        shift: () or (D,) float32: what the network sees of a stored value of 0.
    """

    def __init__(
        self, scale: float | Tensor, shift: float | Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._shape = shape
        self.scale, self.shift = (_per_value(value, shape).to(device) for value in (scale, shift))
        self._is_identity = bool((self.scale == 1).all() and (self.shift == 0).all())

    def __call__(self, stored: Tensor) -> Tensor:
        """What the network sees of values (..., D) as they are stored, in a float dtype."""
        return stored if self._is_identity else stored * self.scale + self.shift

    def to_query(self, direction: Tensor) -> Tensor:
        """A vector (B, D) whose product with what the network sees is wanted, for products with stored values."""
        return direction if self._is_identity else direction * self.scale

    def from_sums(self, sums: Tensor, weight: Tensor) -> Tensor:
        """Sums (B, D) of what the network sees, from those of stored values and their weights' sum (B, 1)."""
        return sums if self._is_identity else sums * self.scale + weight * self.shift

    @property
    def of_row(self) -> tuple[Tensor, Tensor]:
        """Scale and shift as they are given: () or of the shape of a row."""
        scale, shift = (x.reshape(self._shape if x.ndim else ()) for x in (self.scale, self.shift))
        return scale, shift

    @property
    def in_short(self) -> tuple[float | str, float | str]:
        """Scale and shift as what tells them from others: a number, or a checksum."""
        return _in_short(self.scale), _in_short(self.shift)

    def to(self, device: torch.device | str) -> None:
        """Move it, in place."""
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)


def _per_value(value: float | Tensor, shape: tuple[int, ...]) -> Tensor:
    """A number for each value of a row, (D,) float32, or () where it is one for all."""
    value = torch.as_tensor(value, dtype=torch.float32)
    return value.reshape(()) if value.numel() == 1 else value.expand(shape).reshape(-1).contiguous()


def _in_short(value: Tensor) -> float | str:
    if value.ndim == 0:
        return value.item()
    return f"{len(value)} values with checksum {zlib.crc32(value.cpu().numpy().tobytes()):08x}"
