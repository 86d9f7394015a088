"""What can be said of a training set before any time is measured: its size, its scale, its geometry, its defects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fm_stages.flow import keyed_generator
from fm_stages.oracle import DataBank, count_columns, nearest_rows

SAMPLE = 2048
"""Rows behind the effective dimension."""

NEIGHBOURS = 256
"""Rows whose nearest neighbours are looked up."""

PIECE = 2**24
"""Values that are looked at together."""

USUAL_STD = (0.2, 5.0)
"""Within this factor of the noise's standard deviation, 1, data counts as normalised."""


@dataclass
class Facts:
    """A training set in numbers.

    Attributes:
        num_rows: N.
        num_distinct: rows that differ, whatever their labels.
        num_constant: rows of several values that are all the same.
        num_dims: D.
        num_classes: 0 without labels.
        single_classes: labels of classes with one row.
        lowest: value.
        highest: value.
        mean: over all values.
        std: over all values.
        effective_dims: participation ratio (tr C)^2 / tr C^2 of the covariance C, from `SAMPLE` rows.
        nearest_distance: median distance to the nearest other row, root mean square per value, from `NEIGHBOURS` rows.
        channel_mean: over all values of each channel; of rows that are no images one for all of them.
        channel_std: likewise.
    """

    num_rows: int
    num_distinct: int
    num_constant: int
    num_dims: int
    num_classes: int
    single_classes: list[int]
    lowest: float
    highest: float
    mean: float
    std: float
    effective_dims: float
    nearest_distance: float
    channel_mean: list[float] = field(default_factory=list)
    channel_std: list[float] = field(default_factory=list)

    @property
    def is_normalised(self) -> bool:
        """Whether the values are of the noise's size, and on both sides of 0."""
        low, high = USUAL_STD
        return low <= self.std <= high and abs(self.mean) <= 2 * self.std and self.lowest < 0


def check_distinct(bank: DataBank) -> int:
    """How many rows differ, whatever their labels: a bank's own number counts a row once for each of its labels.

    Raises:
        ValueError: if there are fewer than two.
    """
    place = torch.arange(bank.num_stored, device=bank.device)
    num = int((bank.log_count(place, count_columns(torch.full_like(place, -1))) >= 0).sum())
    if num < 2:
        raise ValueError(f"{bank.num_rows} rows, {num} distinct: stages need at least two rows that differ")
    return num


def facts_of(bank: DataBank, seed: int = 0) -> Facts:
    """Look at all rows once, and at some closely.

    Raises:
        ValueError: if there are fewer than two distinct rows.
    """
    num_distinct = check_distinct(bank)
    constant, lowest, highest = 0, math.inf, -math.inf
    mean, squares = bank.mean.mean().item(), torch.zeros_like(bank.mean)
    for rows in _pieces(bank):
        low, high = rows.amin(1), rows.amax(1)
        squares += (rows.double() - mean).square().sum(0)
        constant += int((low == high).sum())
        lowest, highest = min(lowest, low.min().item()), max(highest, high.max().item())
    num_channels = bank.shape[0] if len(bank.shape) == 3 else 1
    of_channel = bank.mean.view(num_channels, -1).mean(1)
    variance = squares.view(num_channels, -1).mean(1) / bank.num_rows - (of_channel - mean).square()
    counts = bank.label_counts
    generator = keyed_generator("facts", seed)
    order = torch.randperm(bank.num_rows, generator=generator)
    return Facts(
        num_rows=bank.num_rows,
        num_distinct=num_distinct,
        num_constant=constant if bank.num_dims > 1 else 0,
        num_dims=bank.num_dims,
        num_classes=len(counts),
        single_classes=[label for label, count in counts.items() if count == 1],
        lowest=lowest,
        highest=highest,
        mean=mean,
        std=math.sqrt(squares.mean().item() / bank.num_rows),
        effective_dims=effective_dims(bank.rows(order[:SAMPLE]).flatten(1).double() - bank.mean),
        nearest_distance=_nearest_distance(bank, order[:NEIGHBOURS]),
        channel_mean=of_channel.tolist(),
        channel_std=variance.clamp(min=0).sqrt().tolist(),
    )


def warnings_of(facts: Facts) -> list[str]:
    """What a person should know before they believe a profile, each with the remedy."""
    found = []
    if duplicates := facts.num_rows - facts.num_distinct:
        found.append(
            f"{duplicates} of {facts.num_rows} rows are copies of others. They are counted with their multiplicity, as "
            "training draws them; remove them if they are padding."
        )
    if facts.num_constant:
        found.append(f"{facts.num_constant} rows are constant, the same value everywhere: are these images broken?")
    if single := facts.single_classes:
        which = f"class {single[0]} has" if len(single) == 1 else f"{len(single)} classes, {single[0]} first, have"
        found.append(
            f"{which} a single sample: with such a label the posterior is that sample at every t, and a network can "
            "only memorize it."
        )
    if not facts.is_normalised:
        found.append(
            f"values lie in [{facts.lowest:.3g}, {facts.highest:.3g}] with mean {facts.mean:.3g} and std "
            f"{facts.std:.3g}, those of the noise are 0 and 1: this data is not normalised, and its stages lie where "
            "no recipe expects them. Subtract the mean and divide by the std, or give the data module that training "
            "uses. Pixels in 0..255 that are stored as uint8 are taken as [-1, 1]."
        )
    return found


def effective_dims(centred: Tensor) -> float:
    """Participation ratio (tr C)^2 / tr C^2 of rows (n, D) without their mean.

    tr C^2 is the mean of (x_i . x_j)^2 over pairs i != j, which is unbiased, so that n may be smaller than D.
    """
    gram = centred @ centred.T  # (n, n)
    n = len(gram)
    trace = gram.diagonal().mean()
    pairs = (gram.square().sum() - gram.diagonal().square().sum()) / (n * (n - 1))
    return (trace.square() / pairs.clamp(min=1e-300)).item()


def _nearest_distance(bank: DataBank, index: Tensor) -> float:
    """Median over training rows (n,) of the distance to the nearest other distinct row, per value."""
    distance, _ = nearest_rows(bank, bank.rows(index), num=2)
    return (distance[:, 1].median() / math.sqrt(bank.num_dims)).item()


def _pieces(bank: DataBank) -> Iterator[Tensor]:
    """All rows (n, D) float32, by pieces."""
    for index in torch.arange(bank.num_rows).split(max(1, PIECE // bank.num_dims)):
        yield bank.rows(index).flatten(1)
