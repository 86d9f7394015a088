"""Banks and queries for the benchmarks of the oracle.

Fashion-MNIST is looked for as everywhere in fm-stages (FM_STAGES_DATA or data/); without it rows are random, which are
farther apart than images, so that most of the regimes are alike. Shapes: B queries, N rows, D values per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fm_stages.data import FashionMNIST
from fm_stages.flow import LinearPath, keyed_generator, keyed_normal
from fm_stages.oracle import DataBank

PATH = LinearPath()
NUM_DIMS, NUM_CLASSES = 784, 10
PIECE = 8192


@dataclass
class Queries:
    """A training batch: noise and rows (B, ...), times (B,), x_t between them, labels and indices of the rows (B,)."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    x_t: Tensor
    labels: Tensor
    index: Tensor

    @property
    def flat(self) -> Tensor:
        """x_t as (B, D)."""
        return self.x_t.flatten(1)


def load_bank(num_rows: int, device: str) -> tuple[DataBank, str]:
    """Fashion-MNIST's bank with labels in float32, or random rows in its place; and which of the two in words."""
    try:
        data = FashionMNIST(num_train=num_rows)
        data.setup()
        bank = data.bank()
        # built from the rows again, in case the data module's bank stores them in another dtype
        x1 = all_rows(bank).reshape(-1, *bank.shape)
        bank = DataBank(x1, bank.labels_of(torch.arange(len(x1))))
        name = "Fashion-MNIST"
    except FileNotFoundError:
        bank = random_bank(num_rows, NUM_DIMS)
        name = "RANDOM ROWS (no Fashion-MNIST under FM_STAGES_DATA or data/)"
    return bank.to(device), f"{name}, {bank.num_rows} x {bank.num_dims}"


def random_bank(num_rows: int, num_dims: int, dtype: torch.dtype = torch.float32, classes: int | None = None,
                device: str = "cpu") -> DataBank:  # fmt: skip
    """`random_rows` with random labels."""
    x1, scale, shift = random_rows(num_rows, num_dims, dtype, device)
    return DataBank(x1, random_labels(num_rows, classes or NUM_CLASSES, device), scale, shift)


def random_rows(num_rows: int, num_dims: int, dtype: torch.dtype, device: str) -> tuple[Tensor, float, float]:
    """Uniform rows in [-1, 1], drawn on the device piece by piece and kept in a dtype; scale and shift for uint8."""
    generator = keyed_generator("benchmark rows", num_rows, device=device)
    x1 = torch.empty(num_rows, num_dims, dtype=dtype, device=device)
    scale, shift = (1 / 127.5, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    work = torch.empty(min(PIECE, num_rows), num_dims, device=device)
    for piece in x1.split(PIECE):
        drawn = work[: len(piece)].uniform_(-1, 1, generator=generator)
        piece.copy_(to_bytes(drawn) if dtype == torch.uint8 else drawn)
    return x1, scale, shift


def random_labels(num_rows: int, classes: int, device: str) -> Tensor:
    """Labels (N,) int64."""
    return torch.randint(classes, (num_rows,), generator=keyed_generator("benchmark labels")).to(device)


def to_bytes(rows: Tensor) -> Tensor:
    """Values in [-1, 1] as 8-bit levels; the scale that undoes it is 1 / 127.5, the shift -1."""
    return ((rows + 1) * 127.5).round().to(torch.uint8)


def as_bytes(bank: DataBank) -> DataBank:
    """The same bank stored in 8 bits, which is exact for images."""
    x1 = torch.cat([to_bytes(bank.rows(piece)) for piece in torch.arange(bank.num_rows).split(PIECE)])
    return DataBank(x1, bank.labels_of(torch.arange(bank.num_rows)), 1 / 127.5, -1.0)


def all_rows(bank: DataBank) -> Tensor:
    """What the network sees of all rows: (N, D) float32, in memory of its own."""
    rows = torch.empty(bank.num_rows, bank.num_dims, device=bank.device)
    for place in torch.arange(bank.num_rows).split(PIECE):
        rows[place[0] : place[-1] + 1] = bank.rows(place).flatten(1)
    return rows


def queries(bank: DataBank, num: int, lo: float, hi: float) -> Queries:
    """x_t of random rows at t ~ U(lo, hi)."""
    generator = keyed_generator("benchmark queries")
    index = torch.randint(bank.num_rows, (num,), generator=generator)
    t = (lo + (hi - lo) * torch.rand(num, generator=generator)).to(bank.device)
    x0 = keyed_normal(("benchmark noise",), torch.arange(num), bank.shape).to(bank.device)
    x1 = bank.rows(index)
    return Queries(x0, x1, t, PATH.interpolate(x0, x1, t), bank.labels_of(index), index.to(bank.device))
