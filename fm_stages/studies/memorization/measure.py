"""How close images come to the training set, each by itself, and how many of them are copies.

Distances are root mean squares over the values of an image, in the units of the network, and exact. Shapes: n images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fm_stages.oracle import DataBank, gather_objects, nearest_rows
from fm_stages.studies.memorization.references import References, in_parts, source_of
from fm_stages.studies.ranks import Job

MEMORIZED = 1 / 3
"""An image is called a copy if its nearest training image is this many times nearer than the second nearest.
Source: arXiv 2310.02664 (after Yoon et al., 2023)."""

CHUNK = 1024
"""Samples of each rank among which all ranks look for duplicates at a time."""


@dataclass
class Closest:
    """What is nearest to each image; (n,) each, on the CPU.

    Attributes:
        index: number of the image.
        nearest: distance to the nearest training image (of the whole set), float64.
        second: to the nearest one of another source: not a copy of the first, nor its flip.
        nearest_row: of the bank of the training set, int64.
        second_row: likewise.
        held_out: distance to the nearest image of H.
        held_out_row: of the bank H.
        train: distance to the nearest image of T, which has as many as H.
        other: distance to the nearest other image of the same kind (sample to sample) that is not equal.
        equal: how many images of the kind are equal to it, itself included.
    """

    index: Tensor
    nearest: Tensor
    second: Tensor
    nearest_row: Tensor
    second_row: Tensor
    held_out: Tensor
    held_out_row: Tensor
    train: Tensor
    other: Tensor
    equal: Tensor

    @property
    def ratio(self) -> Tensor:
        """Nearest over second nearest training image."""
        return self.nearest / self.second

    @property
    def copied(self) -> Tensor:
        """Which images are copies by the ratio test."""
        return self.ratio < MEMORIZED

    @property
    def duplicate(self) -> Tensor:
        """Which have a near duplicate: another image is that many times nearer than the nearest held-out image."""
        return (self.other < MEMORIZED * self.held_out) | (self.equal > 1)

    def gathered(self, job: Job) -> Closest:
        """Those of all ranks, in the order of their numbers."""
        parts = gather_objects({f.name: getattr(self, f.name) for f in fields(self)}, job.group)
        order = torch.cat([part["index"] for part in parts]).argsort(stable=True)
        return Closest(**{f.name: torch.cat([part[f.name] for part in parts])[order] for f in fields(self)})

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Columns and rows, a row for each image."""
        columns: dict[str, Tensor] = {
            "image": self.index, "nearest_training": self.nearest, "second_training": self.second,
            "ratio": self.ratio, "copy": self.copied.long(), "training_row": self.nearest_row,
            "second_training_row": self.second_row, "nearest_H": self.held_out, "H_row": self.held_out_row,
            "nearest_T": self.train, "nearer_to_T": (self.train < self.held_out).long(),
            "nearest_other_sample": self.other, "equal_samples": self.equal,
        }  # fmt: skip
        return list(columns), [list(row) for row in zip(*(x.tolist() for x in columns.values()), strict=True)]


def nearest_sources(bank: DataBank, images: Tensor, flip: bool, progress: bool = False) -> tuple[Tensor, Tensor]:
    """The two nearest training images of different sources.

    Args:
        bank: the training set.
        images: (n, ...) in its units, on its device.
        flip: whether it holds flips: the flip of the nearest image is then not the second nearest.
        progress: whether to show a bar.

    Returns:
        Distances (n, 2) float64, root mean square over the values, and rows (n, 2); infinity and -1 where there is no
        second source.
    """
    distance, row = nearest_rows(bank, images, 3 if flip else 2, progress=progress)
    if flip:
        source = source_of(bank, row, flip)
        own = (source[:, 1] == source[:, 0])[:, None]
        distance, row = (torch.cat([x[:, :1], torch.where(own, x[:, 2:], x[:, 1:2])], 1) for x in (distance, row))
    return distance / bank.num_dims**0.5, row


def measure(
    references: References, images: Tensor, index: Tensor, flip: bool, job: Job, progress: bool = False
) -> Closest:
    """What is nearest to this rank's images; every rank calls this.

    Args:
        references: on the device to work on.
        images: (n, C, H, W) float32; a rank may have none.
        index: (n,) their numbers, on all ranks together different ones.
        flip: whether the bank of the training set holds flips.
        job: the ranks.
        progress: whether to show bars.

    Returns:
        Of the images of all ranks, the same on every rank.
    """
    device, num_dims = references.whole.device, references.whole.num_dims
    own = images.to(device).float()
    distance, row = _searched(own, 2, lambda x: nearest_sources(references.whole, x, flip, progress))
    held_out, held_out_row = _searched(own, 1, lambda x: nearest_rows(references.held_out, x, 1, progress=progress))
    train, _ = _searched(own, 1, lambda x: nearest_rows(references.train, x, 1, progress=progress))
    other, equal = _among_themselves(own, job)
    found = Closest(
        index.cpu(), distance[:, 0], distance[:, 1], row[:, 0], row[:, 1], held_out[:, 0] / num_dims**0.5,
        held_out_row[:, 0], train[:, 0] / num_dims**0.5, other / num_dims**0.5, equal,
    )  # fmt: skip
    return found.gathered(job)


def _searched(images: Tensor, num: int, search: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Distances and rows (n, num) on the CPU; a rank without images has none to search for."""
    if not len(images):
        return torch.zeros(0, num, dtype=torch.float64), torch.zeros(0, num, dtype=torch.int64)
    distance, row = search(images)
    return distance.cpu(), row.cpu()


def _among_themselves(images: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    """Distance (n,) float64 to the nearest other image that is not equal, and how many are equal (n,), over all ranks.

    Ranks show each other their images a few at a time, so that none has to hold all of them.
    """
    nearest = torch.full((len(images),), math.inf, dtype=torch.float64)
    equal = torch.zeros(len(images), dtype=torch.int64)
    most = max(gather_objects(len(images), job.group))
    for part in in_parts(most, CHUNK):
        shown = torch.cat(gather_objects(images[part].cpu(), job.group)).to(images.device)
        if not len(images):
            continue
        bank = DataBank(shown)
        distance, row = (x.cpu() for x in nearest_rows(bank, images, 2))
        itself = distance[:, 0] == 0
        nearest = torch.minimum(nearest, torch.where(itself, distance[:, 1], distance[:, 0]))
        place = bank.place_of(torch.arange(len(shown), device=bank.device)).cpu()
        count = place.bincount(minlength=bank.num_distinct)
        equal += torch.where(itself, count[bank.place_of(row[:, 0].clamp(min=0)).cpu()], 0)
    return nearest, equal


@dataclass(frozen=True)
class Share:
    """A share of images.

    Attributes:
        value: the share.
        low: lower end of its 95 % interval (Wilson's score interval).
        high: its upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, counted: Tensor) -> Share:
        """Of those that count (n,) float, bool, or a half for ties."""
        n, p, z = len(counted), counted.double().mean().item(), 1.959964
        centre, spread = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return cls(
            p, max(0.0, (centre - spread) / (1 + z**2 / n)) if p else 0.0, min(1.0, (centre + spread) / (1 + z**2 / n))
        )


def nearer(first: Tensor, second: Tensor) -> Tensor:
    """1 where the first distance (n,) is smaller, a half where both are equal."""
    return (first < second).double() + 0.5 * (first == second).double()


@dataclass(frozen=True)
class Summary:
    """What is said of a set of images.

    Attributes:
        num: images.
        copies: share whose nearest training image is more than three times nearer than the second nearest.
        nearer_to_train: share nearer to T than to H, sets of equal size; half where nothing is memorized.
        nearer_to_all: share nearer to the whole training set than to H, which is smaller; for comparison only.
        nearest: median distance to the nearest training image.
        held_out: median distance to the nearest image of H.
        ratio: median of nearest over second nearest training image.
        equal: share that are equal to another image of the set.
        duplicates: share that are equal or near duplicates of another image of the set.
    """

    num: int
    copies: Share
    nearer_to_train: Share
    nearer_to_all: Share
    nearest: float
    held_out: float
    ratio: float
    equal: Share
    duplicates: Share

    @classmethod
    def of(cls, found: Closest) -> Summary:
        """Of what is nearest to each of a set's images."""
        return cls(
            len(found.index), Share.of(found.copied), Share.of(nearer(found.train, found.held_out)),
            Share.of(nearer(found.nearest, found.held_out)), found.nearest.median().item(),
            found.held_out.median().item(), found.ratio.median().item(), Share.of(found.equal > 1),
            Share.of(found.duplicate),
        )  # fmt: skip
