"""Where the stages of a data set lie: measured from the oracle alone, before any network exists."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fm_stages.flow import keyed_generator, keyed_normal
from fm_stages.oracle.exact import Oracle, Posterior

THRESHOLDS = (0.1, 0.5, 0.9)
"""Median top1 at which navigation ends, at the boundary, and at which refinement is complete."""


@dataclass
class StageProfile:
    """The posterior over t, and the three times that it is summed up in. A property of the data, not of a model.

    Attributes:
        navigation_end: t at which the median top1 over queries reaches 0.1.
        boundary: t at which it first reaches 0.5.
        refinement_complete: t at which it reaches 0.9.
        t: (T) the times measured, increasing.
        top1: (T) mean largest weight.
        top1_median: (T) median largest weight.
        ess: (T) median effective number of rows.
        floor: (T) mean floor, per value.
        num_rows: rows of the bank.
        num_queries: queries per time.
        label_dropout: share of unconditional queries; 1 for a bank without labels.
        path: class name of the path.
    """

    navigation_end: float
    boundary: float
    refinement_complete: float
    t: list[float]
    top1: list[float]
    top1_median: list[float]
    ess: list[float]
    floor: list[float]
    num_rows: int
    num_queries: int
    label_dropout: float
    path: str

    @classmethod
    def measure(
        cls, oracle: Oracle, label_dropout: float = 1.0, num_queries: int = 256, seed: int = 0, num_times: int = 17
    ) -> StageProfile:
        """Measure on a grid even in logit(t), then bisect for the three times, on common draws of data and noise.

        Args:
            oracle: of the training set.
            label_dropout: share of queries that are unconditional, as the network sees them; 1 = all.
            num_queries: draws per time; the boundary's error falls with its root.
            seed: of the draws.
            num_times: size of the grid.

        Returns:
            The profile.
        """
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a share in [0, 1], got {label_dropout}")
        if num_queries < 1 or num_times < 2:
            raise ValueError(f"num_queries={num_queries} must be 1 or more and num_times={num_times} 2 or more")
        bank = oracle.bank
        if not bank.has_labels:
            label_dropout = 1.0
        generator = keyed_generator("profile", seed)
        index = torch.randint(bank.num_rows, (num_queries,), generator=generator)
        kept = torch.rand(num_queries, generator=generator) >= label_dropout
        x1 = bank.draw(index, keyed_generator("profile draws", seed))
        labels = torch.where(kept.to(bank.device), bank.labels_of(index), -1)
        x0 = keyed_normal(("profile noise", seed), torch.arange(num_queries), bank.shape).to(bank.device)

        measured: dict[float, dict[str, float]] = {}

        def measure_at(time: float) -> float:
            if time not in measured:
                measured[time] = _statistics(oracle, x0, x1, time, labels)
            return measured[time]["top1_median"]

        grid = torch.sigmoid(torch.linspace(-5, 5, num_times, dtype=torch.float64)).tolist()
        navigation_end, boundary, complete = (_first_reaching(level, measure_at, grid) for level in THRESHOLDS)
        for time in grid:
            measure_at(time)
        times = sorted(measured)
        return cls(
            navigation_end=navigation_end,
            boundary=boundary,
            refinement_complete=complete,
            t=times,
            top1=[measured[time]["top1"] for time in times],
            top1_median=[measured[time]["top1_median"] for time in times],
            ess=[measured[time]["ess"] for time in times],
            floor=[measured[time]["floor"] for time in times],
            num_rows=bank.num_rows,
            num_queries=num_queries,
            label_dropout=label_dropout,
            path=type(oracle.path).__name__,
        )

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> StageProfile:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is not a profile.
        """
        try:
            return cls(**json.loads(text))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"not a stage profile: {error}") from error


def _statistics(oracle: Oracle, x0: Tensor, x1: Tensor, time: float, labels: Tensor) -> dict[str, float]:
    t = torch.full((len(x1),), time, dtype=torch.float32, device=x1.device)
    posterior: Posterior = oracle.posterior(oracle.path.interpolate(x0, x1, t), t, labels)
    scale = oracle.path.mean_coefficient(t.double()).square() / oracle.bank.num_dims
    return {
        "top1": posterior.top1.mean().item(),
        "top1_median": posterior.top1.median().item(),
        "ess": posterior.ess.median().item(),
        "floor": (scale * posterior.variance).mean().item(),
    }


def _first_reaching(threshold: float, top1_at: Callable[[float], float], grid: list[float]) -> float:
    """First time at which median top1 reaches the threshold: a bracket from the grid, then bisection in logit(t).

    At t = 1 the posterior of distinct rows has always collapsed, so a data set that has not by the end of the grid
    reaches the threshold there; one that starts above it (a single row) reached it at 0.
    """
    low = 0.0
    for high in grid:
        if top1_at(high) >= threshold:
            break
        low = high
    else:
        return 1.0
    if low == 0.0:
        return 0.0
    for _ in range(6):  # a step of the grid is 0.6 in logit(t): 0.01 is left, under 0.0025 in t
        lo, hi = math.log(low / (1 - low)), math.log(high / (1 - high))
        middle = 1 / (1 + math.exp(-(lo + hi) / 2))
        low, high = (low, middle) if top1_at(middle) >= threshold else (middle, high)
    return high
