"""Numbers by timestep: bins in logit(t), sums that reduce over ranks, and the curves made from them."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric


def timestep_bins(num_bins: int = 18, reach: float = 4.0, boundary: float | None = None) -> list[float]:
    """Edges of bins that are even in logit(t), fine where t is near 0 or 1, and open up to both ends.

    Args:
        num_bins: number of bins.
        reach: the inner edges run from logit(t) = -reach to reach.
        boundary: the inner edge nearest to it is moved there, so that no bin lies in both stages.

    Returns:
        num_bins + 1 increasing edges from 0 to 1.
    """
    if num_bins < 3:
        raise ValueError(f"need at least 3 timestep bins, got {num_bins}")
    inner = torch.sigmoid(torch.linspace(-reach, reach, num_bins - 1, dtype=torch.float64)).tolist()
    if boundary is not None and 0 < boundary < 1:
        logit = math.log(boundary / (1 - boundary))
        nearest = min(range(len(inner)), key=lambda i: abs(math.log(inner[i] / (1 - inner[i])) - logit))
        inner[nearest] = boundary
        inner = sorted(inner)
    return [0.0, *inner, 1.0]


@dataclass
class Curves:
    """Means over t, by bin: plain numbers, ready for a table, a figure or JSON.

    Attributes:
        edges: (K + 1) bin edges.
        count: (K) samples in each bin.
        mean: for each quantity its mean in each bin (K); NaN in empty bins.
        sem: the standard errors of the means (K); NaN below two samples.
    """

    edges: list[float]
    count: list[int]
    mean: dict[str, list[float]]
    sem: dict[str, list[float]] = field(default_factory=dict)

    @property
    def centre(self) -> list[float]:
        """Middles of the bins (K)."""
        return [(lo + hi) / 2 for lo, hi in zip(self.edges, self.edges[1:], strict=False)]

    def average(self, name: str, lo: float = 0.0, hi: float = 1.0) -> float:
        """Average of a quantity over uniform t in [lo, hi]: bin means times bin widths, over the bins with samples.

        NaN where none of them lies there, and where samples are NaN.
        """
        pairs = self._inside(self.mean[name], lo, hi, 1)
        total = sum(w for w, _ in pairs)
        return sum(w * m for w, m in pairs) / total if total else math.nan

    def average_sem(self, name: str, lo: float = 0.0, hi: float = 1.0) -> float:
        """Standard error of `average`, over the bins that have one, which are those with two samples or more."""
        pairs = self._inside(self.sem[name], lo, hi, 2)
        total = sum(w for w, _ in pairs)
        return math.sqrt(sum((w * e) ** 2 for w, e in pairs)) / total if total else math.nan

    def z_score(self, name: str) -> float:
        """Sum of a quantity over all samples over the root of its sum of squares: about N(0, 1) if the mean is 0."""
        total = square = 0.0
        for n, mean, sem in zip(self.count, self.mean[name], self.sem[name], strict=True):
            if n:
                total += n * mean
                square += n * mean**2 + (n * (n - 1) * sem**2 if n > 1 else 0.0)
        return total / math.sqrt(square) if square else math.nan

    def coverage(self) -> float:
        """Share of [0, 1] that lies in bins with samples."""
        return sum(w for w, n in zip(self._widths(0, 1), self.count, strict=True) if n)

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Columns and rows, one row per bin."""
        names = list(self.mean)
        columns = ["t_lo", "t_hi", "count", *names, *(f"{name}_sem" for name in names)]
        rows = [
            [self.edges[k], self.edges[k + 1], self.count[k]]
            + [self.mean[name][k] for name in names]
            + [self.sem[name][k] for name in names]
            for k in range(len(self.count))
        ]
        return columns, rows

    def write_csv(self, path: Path) -> None:
        """Write `table` as CSV."""
        columns, rows = self.table()
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])

    def _inside(self, values: list[float], lo: float, hi: float, least: int) -> list[tuple[float, float]]:
        """Length inside [lo, hi] and value of each bin that reaches into it and has at least so many samples."""
        bins = zip(self._widths(lo, hi), values, self.count, strict=True)
        return [(width, value) for width, value, num in bins if width and num >= least]

    def _widths(self, lo: float, hi: float) -> list[float]:
        """Length of each bin inside [lo, hi] (K)."""
        return [max(0.0, min(b, hi) - max(a, lo)) for a, b in zip(self.edges, self.edges[1:], strict=False)]


class TimestepCurves(Metric):
    """Running sums of per-sample numbers by timestep bin; sums, so that ranks reduce correctly.

    Args:
        names: the quantities.
        edges: bin edges, see `timestep_bins`.
    """

    full_state_update = False
    count: Tensor  # (K)
    total: Tensor  # (K, Q)
    square: Tensor  # (K, Q)

    def __init__(self, names: tuple[str, ...], edges: list[float]) -> None:
        super().__init__(compute_with_cache=False)
        self.names = tuple(names)
        self.edges = list(edges)
        shape = (len(edges) - 1, len(self.names))
        self.add_state("count", torch.zeros(shape[0], dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("square", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.set_dtype(torch.float64)

    def update(self, t: Tensor, **values: Tensor) -> None:
        """Add samples: ``t`` (B,) and one (B,) tensor for each name."""
        inner = torch.tensor(self.edges[1:-1], dtype=torch.float64, device=t.device)
        bins = torch.bucketize(t.double(), inner, right=True)  # (B,)
        stacked = torch.stack([values[name].double() for name in self.names], 1)  # (B, Q)
        self.count.index_add_(0, bins, torch.ones_like(stacked[:, 0]))
        self.total.index_add_(0, bins, stacked)
        self.square.index_add_(0, bins, stacked.square())

    def compute(self) -> Curves:
        """Means and standard errors by bin."""
        n = self.count[:, None]
        mean = self.total / n  # 0 / 0 is NaN, which is what an empty bin means
        spread = (self.square / n - mean.square()).clamp(min=0) * n / (n - 1)
        sem = torch.where(n > 1, (spread / n).sqrt(), torch.nan)
        return Curves(
            edges=self.edges,
            count=[int(c) for c in self.count.tolist()],
            mean={name: mean[:, i].tolist() for i, name in enumerate(self.names)},
            sem={name: sem[:, i].tolist() for i, name in enumerate(self.names)},
        )
