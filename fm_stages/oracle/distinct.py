"""Which rows of a bank are equal: found by hash, over all ranks, before anything is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fm_stages.oracle import ranks


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


def distinct_rows(digests: Tensor, labels: Tensor | None, group: dist.ProcessGroup | None) -> Distinct:
    """Group equal rows (by value) of all ranks by their ``digests`` (N_r, 16); the first of each group stands for it.

    128 bits of hash stand for a row: the rows themselves as keys would be a second bank.
    """
    sizes = ranks.sizes_of(len(digests), group)
    own_label = torch.zeros(len(digests), dtype=torch.int64) if labels is None else labels.long().cpu()
    label = ranks.gather(own_label, sizes, group).numpy()
    image = _first_equal(ranks.gather(digests, sizes, group).numpy())
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


def _first_equal(digests: np.ndarray) -> np.ndarray:
    """The number of the first of those that are equal to each of (N, 16) uint8: (N,) int64."""
    halves = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(halves.T)  # keeps the order of equal ones, so that the first of them comes first
    in_order = halves[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(1)
    image = np.empty(len(order), np.int64)
    image[order] = order[is_new][np.cumsum(is_new) - 1]
    return image
