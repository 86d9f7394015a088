"""Which rows of a bank are equal: found by hash, over all ranks, before anything is stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.oracle import ranks

MAX_VALUES = 2**25
"""Values that are worked on at a time where something is done to all rows once."""


def piece(num_dims: int) -> int:
    """How many rows that is, of D values."""
    return max(1, min(8192, MAX_VALUES // num_dims))


@dataclass
class Shard:
    """The stored rows of one rank."""

    first: Tensor  # (M,) which of the rank's rows each stored row is, sorted by label
    label: Tensor  # (M,)
    class_count: Tensor  # (M,) float64, copies with the same label
    total_count: Tensor  # (M,) float64, copies whatever their label; 0 where the first has another one
    place: Tensor  # (N,) int32 stored row of each data set index, or -1 where another rank holds it


@dataclass
class Distinct:
    """Which rows are equal, within their label and over the whole bank: the same on all ranks."""

    offset: int  # data set index of this rank's first row
    stored: np.ndarray  # (N,) number of the distinct row that stands for each data set index
    first: np.ndarray  # (M,) data set index of each distinct row, sorted by label
    label: np.ndarray  # (M,)
    class_count: np.ndarray  # (M,)
    total_count: np.ndarray  # (M,)

    def label_counts(self) -> dict[int, int]:
        """Training rows of each label."""
        labels, place = np.unique(self.label, return_inverse=True)
        return dict(zip(labels.tolist(), np.bincount(place, self.class_count).astype(int).tolist(), strict=True))

    def of(self, start: int, stop: int) -> Shard:
        """What the rank stores that brought the rows from start to stop."""
        own = (self.first >= start) & (self.first < stop)
        place = np.where(own, np.cumsum(own) - 1, -1).astype(np.int32)
        return Shard(
            first=torch.from_numpy(self.first[own] - start),
            label=torch.from_numpy(self.label[own]),
            class_count=torch.from_numpy(self.class_count[own]).double(),
            total_count=torch.from_numpy(self.total_count[own]),
            place=torch.from_numpy(place[self.stored]),
        )


def distinct_rows(flat: Tensor, labels: Tensor | None, group: dist.ProcessGroup | None) -> Distinct:
    """Group equal rows (by value) of all ranks' ``flat`` (N_r, D); the first of each group stands for it."""
    sizes = ranks.sizes_of(len(flat), group)
    # 128 bits of hash stand for a row: the rows themselves as keys would be a second bank
    digests = ranks.gather(torch.cat([_digests(rows) for rows in flat.split(piece(flat.shape[1]))]), sizes, group)
    own_label = torch.zeros(len(flat), dtype=torch.int64) if labels is None else labels.long().cpu()
    label = ranks.gather(own_label, sizes, group).numpy()
    seen: dict[bytes, int] = {}
    first_image = [seen.setdefault(digest.tobytes(), i) for i, digest in enumerate(digests.numpy())]
    image = np.array(first_image)  # (N,) the first row with the same values
    pairs, first, stored, class_count = np.unique(
        np.stack([label, image], 1), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    # of an image under several labels the pair counts that holds its first row
    total_count = np.where(first == pairs[:, 1], np.bincount(image)[pairs[:, 1]], 0.0)
    return Distinct(
        offset=sum(sizes[: ranks.rank_of(group)]),
        stored=stored.reshape(-1),
        first=first,
        label=pairs[:, 0],
        class_count=class_count,
        total_count=total_count,
    )


def _digests(rows: Tensor) -> Tensor:
    """128-bit hashes of rows (C, D), equal for equal values: (C, 16) uint8, on the CPU."""
    same_zero = rows if rows.dtype == torch.uint8 else rows + 0.0  # makes -0.0 and 0.0 the same bytes
    data = same_zero.view(torch.uint8).cpu().numpy()
    hashes = b"".join(hashlib.blake2b(row, digest_size=16).digest() for row in data)
    return torch.frombuffer(bytearray(hashes), dtype=torch.uint8).reshape(-1, 16)
