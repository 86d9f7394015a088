"""Which queries go over the bank together, and over which rows: small classes share a pass, each masked to its own."""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.oracle.bank import DataBank

CPU_GROUP, GPU_GROUP = 16, 64
"""Queries from which on a class has a pass of its own."""


def groups(labels: Tensor, least: int) -> list[int]:
    """How many of the queries with sorted labels (B,) go over the bank together.

    Those without a label, and then whole classes until there are at least so many, for a product of a few queries takes
    as long as one of more.
    """
    sizes: list[int] = []
    open_ = False
    for label, num in zip(*(x.tolist() for x in labels.unique_consecutive(return_counts=True)), strict=True):
        if open_:
            sizes[-1] += num
        else:
            sizes.append(num)
        open_ = label != -1 and sizes[-1] < least
    return sizes


class Selection:
    """The rows of some labels, one after the other: where they are stored, and whose they are.

    Args:
        bank: the training set.
        labels: (B,) of queries, sorted.
    """

    def __init__(self, bank: DataBank, labels: Tensor) -> None:
        self.labels = labels.unique_consecutive()
        slices = [bank.slice_of(label) for label in self.labels.tolist()]
        self._slice = slices[0]
        self._index: Tensor | None = None
        if len(slices) > 1:
            self._index = torch.cat([torch.arange(each.start, each.stop, device=labels.device) for each in slices])
            lengths = torch.tensor([each.stop - each.start for each in slices], device=labels.device)
            self._label_of = self.labels.repeat_interleave(lengths)

    def __len__(self) -> int:
        return self._slice.stop - self._slice.start if self._index is None else len(self._index)

    def part(self, first: int, last: int) -> slice | Tensor:
        """Where rows first..last are stored."""
        if self._index is None:
            return slice(self._slice.start + first, self._slice.start + last)
        return self._index[first:last]

    def stored(self, places: Tensor) -> Tensor:
        """Where some of the rows (P,) are stored."""
        return places + self._slice.start if self._index is None else self._index[places]

    def mask(self, labels: Tensor, first: int, last: int, logits: Tensor) -> None:
        """Give rows first..last of another label than the query's (B,) no weight in ``logits`` (B, last - first)."""
        if self._index is not None:
            logits.masked_fill_(labels[:, None] != self._label_of[first:last], -torch.inf)
