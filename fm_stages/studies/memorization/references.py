"""What memorization is measured against: the training set, and from training and held-out images two equal banks.

Images of any kind lie nearer to the larger of two sets: against 60 000 training and 9 000 held-out images of
Fashion-MNIST most *held-out* images are nearer to the training set. So T (of training images) and H (of held-out ones)
are of equal size, with equally many of each class, and a third set, the fresh images, is the yardstick that goes
through every measure as samples do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fm_stages.data import TrainingData
from fm_stages.flow import keyed_generator
from fm_stages.oracle import DataBank, RowReader

FRESH_SHARE, MAX_FRESH = 0.2, 1000
"""Share of the held-out images that are the yardstick, and how many they are at most."""

MIN_HELD_OUT = 40
"""Held-out images below which nothing is measured: a share of 8 fresh images says nothing."""


class NotMeasured(ValueError):
    """Memorization cannot be measured on these data; the message says why, and what would help."""


@dataclass(frozen=True)
class References:
    """What samples are compared with; all on one device, in the units of the network.

    Attributes:
        whole: the training set, with flips if training flips.
        train: T, some training images, with their flips if ``held_out`` has them.
        held_out: H, held-out images, none of them fresh; as many of each class as T has.
        fresh: (Q, C, H, W) float32 held-out images that are in no bank, without flips.
        fresh_labels: (Q,) int64, -1 without; of classes of which T and H have rows.
        num_train: images of the training set, without flips.
        num_each: images of T, and of H, without flips.
        num_left_out: held-out images that are in neither H nor fresh: T has no partner for them.
        flips: whether T and H hold flips.
    """

    whole: DataBank
    train: DataBank
    held_out: DataBank
    fresh: Tensor
    fresh_labels: Tensor
    num_train: int
    num_each: int
    num_left_out: int
    flips: bool

    @classmethod
    def of(cls, data: TrainingData, seed: int = 0, device: torch.device | str = "cpu") -> References:
        """Draw them, the same on every rank.

        Args:
            data: the training set and its held-out images.
            seed: of the draws.
            device: where the banks go; that of the training set too.

        Raises:
            NotMeasured: if rows are distributions, the bank is shared between ranks, or images are too few.
        """
        data.setup()
        whole = data.bank()
        if not isinstance(whole, DataBank):
            raise NotMeasured(
                "the training set is one of distributions (moments), drawn anew at every step: no sample has a nearest "
                "row there, so memorization is not measured"
            )
        if whole.group is not None:
            raise NotMeasured("the bank is sharded over ranks: build the data outside a Trainer, or shard_bank: false")
        held_out: Any = data.val_dataloader().dataset
        if len(held_out) < MIN_HELD_OUT:
            raise NotMeasured(
                f"{len(held_out)} held-out images are too few to tell a sample that is close to the training set from "
                f"one that is not: memorization needs {MIN_HELD_OUT} or more, hold out more (val_fraction, val_dir)"
            )
        order = torch.randperm(len(held_out), generator=keyed_generator("memorization held out", seed))
        num_fresh = min(MAX_FRESH, int(FRESH_SHARE * len(held_out)))
        fresh, rest = order[:num_fresh].sort().values, order[num_fresh:]
        train_labels = whole.labels_of(torch.arange(data.num_train, device=whole.device)).cpu()
        shuffled = torch.randperm(data.num_train, generator=keyed_generator("memorization train", seed))
        train, rest = _equally_many(shuffled, train_labels, rest, held_out.labels_of(rest))
        if len(train) < 2:
            raise NotMeasured("training and held-out images share no class, so there are no two sets to compare with")
        fresh_labels = held_out.labels_of(fresh)
        known = torch.isin(fresh_labels, train_labels[train])
        flips = data.flip and _has_flips(held_out)
        own = torch.cat([train, train + data.num_train]) if flips else train
        return cls(
            whole=whole.to(device),
            train=whole.subset(own).to(device),
            held_out=bank_of_rows(held_out, rest, flips).to(device),
            fresh=held_out[fresh[known], fresh[known]]["x1"],
            fresh_labels=fresh_labels[known],
            num_train=data.num_train,
            num_each=len(train),
            num_left_out=len(held_out) - len(rest) - int(known.sum()),
            flips=flips,
        )

    def sizes(self) -> dict[str, int | bool]:
        """How many images each of them has."""
        return {
            "training": self.num_train, "T": self.num_each, "H": self.num_each, "fresh": len(self.fresh),
            "held_out_unused": self.num_left_out, "flips_in_T_and_H": self.flips,
            "distinct_training_rows": self.whole.num_distinct,
        }  # fmt: skip


def _equally_many(train: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first of both, in the order given, as many of each class of one as of the other; sorted.

    Args:
        train: training images, mixed.
        labels: of training images, by their number.
        held_out: held-out images, mixed.
        held_out_labels: of these, in their order.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for label in held_out_labels.unique().tolist():
        own, other = train[labels[train] == label], held_out[held_out_labels == label]
        num = min(len(own), len(other))
        parts.append((own[:num], other[:num]))
    first, second = (torch.cat(part).sort().values for part in zip(*parts, strict=True))
    return first, second


def _has_flips(held_out: Any) -> bool:
    """Whether held-out images can be flipped: pixels can, and latents where those of flipped images were kept."""
    source = getattr(held_out, "source", None)
    return source is None or source.has_flips


def bank_of_rows(dataset: Any, images: Tensor, flips: bool) -> DataBank:
    """A bank of some images of a data set (of `fm_stages.data`), in the form in which they are stored."""
    own = torch.cat([images, images + len(dataset)]) if flips else images
    rows = RowReader((len(own), *dataset.shape), dataset.dtype, lambda index: dataset.stored(own[index]))
    labels = None if dataset.labels is None else dataset.labels_of(own)
    return DataBank(rows, labels, dataset.scale, dataset.shift)


def source_of(bank: DataBank, row: Tensor, flip: bool) -> Tensor:
    """What tells rows (...) of other images from this one's and its flip: (...) int64; -1 for -1.

    Args:
        bank: in which, with flips, row N / 2 + i is the flip of row i.
        row: as `nearest_rows` gives them.
        flip: whether the bank holds flips.
    """
    place = bank.place_of(row.clamp(min=0))
    if flip:
        partner = (row.clamp(min=0) + bank.num_rows // 2) % bank.num_rows
        place = torch.minimum(place, bank.place_of(partner))
    return torch.where(row == -1, -1, place)


def in_parts(num: int, size: int) -> Iterator[slice]:
    """0 to num, a few at a time."""
    return (slice(start, min(start + size, num)) for start in range(0, num, size))
