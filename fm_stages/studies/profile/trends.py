"""What moves the boundary: the number of rows, and the number of values per row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fm_stages.flow import Path, keyed_generator
from fm_stages.oracle import THRESHOLDS, DataBank, Oracle, StageProfile

FEWEST = 64
"""Rows below which the trend is not followed."""

MOST_POINTS = 8
"""Of the trend over rows, each half of the one before."""

LEAST_ERROR = 1e-3
"""Of a boundary in the line over N: one that lies at 0 has no spread, and would draw the line through itself."""

FEWEST_PIXELS = 4
"""Side of the smallest pooled images."""

GAUSSIAN_ROWS = 10_000
"""Rows of the unit Gaussians, at most."""

GAUSSIAN_DIMS = (16, 64, 256, 1024, 4096)
"""Values per row of the unit Gaussians."""

NUM_TIMES = 20
"""Times per profile: enough for the boundary."""


@dataclass
class TrendPoint:
    """The stages of one variant of the data, with standard errors by name.

    Attributes:
        kind: what the rows are.
        num_rows: N.
        num_dims: D.
        navigation_end: t where navigation ends.
        boundary: t between the stages.
        refinement_complete: t where refinement is complete.
        time_sem: standard errors of the three.
    """

    kind: str
    num_rows: int
    num_dims: int
    navigation_end: float
    boundary: float
    refinement_complete: float
    time_sem: dict[str, float]


@dataclass
class RowTrend:
    """Boundary = intercept + slope ln N, by weighted least squares over the larger half of the points.

    Attributes:
        points: from many rows to few.
        slope: change of the boundary per factor e of rows.
        intercept: at one row.
    """

    points: list[TrendPoint]
    slope: float
    intercept: float

    def boundary_at(self, num_rows: int) -> float:
        """The boundary that the line has at a number of rows: an extrapolation beyond those measured."""
        return min(1.0, max(0.0, self.intercept + self.slope * math.log(num_rows)))


def has_trend(bank: DataBank) -> bool:
    """Whether there are rows enough for a trend."""
    return bank.num_rows >= 2 * FEWEST


def trend_over_rows(
    bank: DataBank, path: Path, label_dropout: float, num_queries: int = 512, seed: int = 0, progress: bool = True
) -> RowTrend:
    """The stages of random halves, quarters, ... of the rows, each part of the one before.

    Raises:
        ValueError: if there are too few rows for two points.
    """
    if not has_trend(bank):
        raise ValueError(f"{bank.num_rows} rows are too few for a trend: it needs {2 * FEWEST}")
    num = min(MOST_POINTS, 1 + int(math.log2(bank.num_rows / FEWEST)))
    order = torch.randperm(bank.num_rows, generator=keyed_generator("trend", seed))
    points = []
    for k in tqdm(range(num), desc="Trend over rows", unit="bank", disable=not progress):
        part = bank if k == 0 else bank.subset(order[: bank.num_rows // 2**k].sort().values)
        points.append(_point("rows", part, path, label_dropout, num_queries, seed))
    used = points[: max(2, (num + 1) // 2)]
    logs, boundaries = ([f(p) for p in used] for f in (lambda p: math.log(p.num_rows), lambda p: p.boundary))
    errors = [max(p.time_sem["boundary"], LEAST_ERROR) for p in used]
    slope, intercept = np.polyfit(logs, boundaries, 1, w=[1 / e for e in errors])
    return RowTrend(points, float(slope), float(intercept))


def trend_over_dims(
    bank: DataBank, path: Path, num_queries: int = 512, seed: int = 0, progress: bool = True
) -> list[TrendPoint]:
    """The stages of unit Gaussians of several dimensions, and of these images pooled by 2, 4, ...; without labels."""
    num_rows = min(bank.num_rows, GAUSSIAN_ROWS)
    points = []
    with tqdm(desc="Trend over dimensions", unit="bank", disable=not progress) as bar:
        for dims in GAUSSIAN_DIMS:
            generator = keyed_generator("gaussian", seed, dims)
            gaussian = DataBank(torch.randn(num_rows, dims, generator=generator).to(bank.device))
            points.append(_point("unit Gaussian", gaussian, path, 1.0, num_queries, seed))
            bar.update()
        for pooled in _pooled(bank):
            points.append(_point("images, pooled", pooled, path, 1.0, num_queries, seed))
            bar.update()
    return points


def _point(kind: str, bank: DataBank, path: Path, label_dropout: float, num_queries: int, seed: int) -> TrendPoint:
    profile = StageProfile.measure(Oracle(bank, path), label_dropout, num_queries, seed, NUM_TIMES)
    times = {name: getattr(profile, name) for name in THRESHOLDS}
    return TrendPoint(kind, bank.num_rows, bank.num_dims, **times, time_sem=profile.time_sem)


def _pooled(bank: DataBank) -> Iterator[DataBank]:
    """The images themselves, and their means over squares of 2, 4, ... pixels; nothing if rows are no images."""
    if len(bank.shape) != 3:
        return
    yield bank
    side = 2
    while min(bank.shape[1:]) // side >= FEWEST_PIXELS:
        yield DataBank(torch.cat([F.avg_pool2d(rows, side) for rows in _images(bank)]))
        side *= 2


def _images(bank: DataBank) -> Iterator[Tensor]:
    for index in torch.arange(bank.num_rows).split(4096):
        yield bank.rows(index)
