"""Where the stages of a data set lie: measured from the oracle alone, before any network exists."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fm_stages.flow import Path, TimestepSampler, UniformTimesteps, keyed_generator
from fm_stages.oracle.draws import Draws, first_reaching, measure_draws, weighted_median
from fm_stages.oracle.exact import Oracle

THRESHOLDS = {"navigation_end": 0.1, "boundary": 0.5, "refinement_complete": 0.9}
"""Median top1 at which each of the three times is reached."""

NUM_BOOTSTRAP = 200
"""Resamplings of the draws behind standard errors of medians."""

GUIDED = 6.0
"""The guidance interval ends at this many times the boundary: an empirical rule, from arXiv 2512.02826, Table 3, where
guidance on [0.1, 0.6] is best and the boundary lies near 0.1."""

CURVES = ("top1", "top1_median", "ess", "entropy", "own", "floor")
"""Names of the lists over t."""

KINDS = ("unconditional", "conditional")
"""Of queries."""


@dataclass(kw_only=True)
class StageCurves:
    """Statistics of the posterior over t, and the three times that they are summed up in.

    Attributes:
        navigation_end: t at which the median top1 over queries reaches 0.1.
        boundary: t at which it first reaches 0.5.
        refinement_complete: t at which it reaches 0.9.
        top1: (T) mean largest weight.
        top1_median: (T) median largest weight.
        ess: (T) median effective number of rows.
        entropy: (T) mean entropy of the weights, in nats.
        own: (T) mean weight of the row that a query was made from; as the mean of sum_i g_i^2, which it equals.
        floor: (T) mean floor, per value.
        sem: standard errors of the curves, by name (T).
        time_sem: standard errors of the three times, by name.
    """

    navigation_end: float
    boundary: float
    refinement_complete: float
    top1: list[float]
    top1_median: list[float]
    ess: list[float]
    entropy: list[float]
    own: list[float]
    floor: list[float]
    sem: dict[str, list[float]]
    time_sem: dict[str, float]


@dataclass(kw_only=True)
class StageProfile(StageCurves):
    """The stages for the mix of labelled and unlabelled queries that a network sees. A property of the data.

    Attributes:
        t: (T) the times measured, increasing.
        num_rows: rows of the bank.
        num_distinct: pairs of a row and its label that differ.
        num_dims: values per row.
        rms_norm: root mean square norm of the rows, which tells other data apart.
        num_queries: queries per time.
        label_dropout: share of unconditional queries; 1 for a bank without labels.
        path: between noise and data, by `name_of`.
        unconditional: of queries without labels alone, if they were measured.
        conditional: of queries with labels alone, if they were measured.
        guidance: (T) ``E||u*_c - u*||^2 / D``, what the label adds, if both were measured.
        guidance_sem: (T) its standard errors.
    """

    t: list[float]
    num_rows: int
    num_distinct: int
    num_dims: int
    rms_norm: float
    num_queries: int
    label_dropout: float
    path: str
    unconditional: StageCurves | None = None
    conditional: StageCurves | None = None
    guidance: list[float] | None = None
    guidance_sem: list[float] | None = None

    @classmethod
    def measure(
        cls,
        oracle: Oracle,
        label_dropout: float = 1.0,
        num_queries: int = 256,
        seed: int = 0,
        num_times: int = 32,
        by_label: bool = False,
        progress: bool = False,
    ) -> StageProfile:
        """Measure on common draws of data and noise, at times that gather where the posterior changes.

        Args:
            oracle: of the training set. If its bank is sharded, each rank asks for a part of the draws.
            label_dropout: share of queries that are unconditional, as the network sees them; 1 = all.
            num_queries: draws per time; standard errors fall with its root (of top1 below 0.02 from some 500 on).
            seed: of the draws.
            num_times: number of times.
            by_label: whether to ask every query with and without its label, and so to measure both kinds and what
                guidance adds. Costs a pass over the whole bank for all of them.
            progress: whether to show a progress bar.

        Returns:
            The profile.
        """
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a share in [0, 1], got {label_dropout}")
        if num_queries < 1 or num_times < 3:
            raise ValueError(f"num_queries={num_queries} must be 1 or more and num_times={num_times} 3 or more")
        bank = oracle.bank
        if not bank.has_labels:
            label_dropout = 1.0
        generator = keyed_generator("profile", seed)
        index = torch.randint(bank.num_rows, (num_queries,), generator=generator)
        kept = torch.rand(num_queries, generator=generator) >= label_dropout
        own = bank.labels_of(index)
        none = torch.full_like(own, -1)
        if by_label and bank.has_labels:
            share = dict(zip(KINDS, (label_dropout, 1 - label_dropout), strict=True))
            labels = dict(zip(KINDS, (none, own), strict=True))
        else:
            share, labels = {"mix": 1.0}, {"mix": torch.where(kept.to(own.device), own, none)}
        draws = measure_draws(oracle, labels, index, seed, num_times, progress)
        counts = _bootstrap_counts(num_queries, seed)
        alone = {kind: StageCurves(**_curves(draws, {kind: 1.0}, counts)) for kind in share}
        return cls(
            **_curves(draws, share, counts),
            unconditional=alone.get("unconditional"),
            conditional=alone.get("conditional"),
            t=draws.t,
            num_rows=bank.num_rows,
            num_distinct=bank.num_distinct,
            num_dims=bank.num_dims,
            rms_norm=bank.rms_norm,
            num_queries=num_queries,
            label_dropout=label_dropout,
            path=cls.name_of(oracle.path),
            guidance=None if draws.guidance is None else draws.guidance.mean(1).tolist(),
            guidance_sem=None if draws.guidance is None else _sem(draws.guidance).tolist(),
        )

    def expected_floor(
        self, timesteps: TimestepSampler | None = None, start: float = 0.0, end: float = 1.0
    ) -> tuple[float, float]:
        """What the regular loss cannot go below when t is drawn from a density, within [start, end].

        Args:
            timesteps: the density; None: uniform.
            start: only draws from here on count.
            end: only draws up to here count.

        Returns:
            Mean floor of those draws, per value; a bound on its standard error (the times share their draws: a sum).

        Raises:
            ValueError: if the density has no draws there.
        """
        density = timesteps or UniformTimesteps()
        low, high = density.cdf(torch.tensor([start, end], dtype=torch.float64).clamp(0, 1)).tolist()
        if not low < high:
            raise ValueError(f"the density has no draws in [{start:.4g}, {end:.4g}]")
        u = low + (high - low) * (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        inside = density.icdf(u).numpy()
        floor, error = (np.interp(inside, self.t, values).mean() for values in (self.floor, self.sem["floor"]))
        return float(floor), float(error)

    def guidance_interval(self) -> tuple[float, float]:
        """Where to guide: from the end of navigation to `GUIDED` times the boundary, in our t. An empirical rule.

        It cannot be read off ``guidance``, which is largest early, where guidance did harm there.
        """
        return self.navigation_end, min(1.0, GUIDED * self.boundary)

    def to_json(self) -> str:
        """The profile as JSON text."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    def save(self, path: str | FilePath) -> None:
        """Write `to_json` to a file, making its folder."""
        FilePath(path).parent.mkdir(parents=True, exist_ok=True)
        FilePath(path).write_text(self.to_json() + "\n")

    @classmethod
    def from_json(cls, text: str) -> StageProfile:
        """Read what `to_json` wrote.

        Raises:
            ValueError: if the text is not a profile, or its parts do not fit together.
        """
        try:
            profile = cls(**_with_parts(json.loads(text)))
            profile.check()
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a stage profile: {error}") from error
        return profile

    @classmethod
    def load(cls, path: str | FilePath) -> StageProfile:
        """Read the file of a profile.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it holds something else.
        """
        try:
            return cls.from_json(FilePath(path).read_text())
        except ValueError as error:  # also of text that is none
            raise ValueError(f"{path}: {error}; `fm-stages profile` writes one") from error

    def check(self) -> None:
        """Raise a ValueError unless times increase, curves are as long as they, and all are numbers."""
        if len(self.t) < 2 or not all(0 <= a < b <= 1 for a, b in pairwise(self.t)):  # NaN is neither
            raise ValueError("t is not a list of increasing times in [0, 1]")
        if not 0 <= self.label_dropout <= 1 or not math.isfinite(self.rms_norm):
            raise ValueError(f"label_dropout={self.label_dropout} is no share, or rms_norm={self.rms_norm} no number")
        lists = [("guidance", values) for values in (self.guidance, self.guidance_sem) if values is not None]
        for curves in filter(None, (self, self.unconditional, self.conditional)):
            for name in THRESHOLDS:
                if not 0 <= getattr(curves, name) <= 1 or not math.isfinite(curves.time_sem.get(name, math.nan)):
                    raise ValueError(f"{name}={getattr(curves, name)} is not a time in [0, 1] with a standard error")
            lists += [(name, x) for name in CURVES for x in (getattr(curves, name), curves.sem.get(name, []))]
        for name, values in lists:
            numbers = all(isinstance(x, float | int) and math.isfinite(x) for x in values)
            if len(values) != len(self.t) or not numbers:
                raise ValueError(f"{name} does not hold one number for each of {len(self.t)} times")

    @staticmethod
    def name_of(path: Path) -> str:
        """What a profile calls a path: its class, with the numbers that it was made with, if any."""
        numbers = ", ".join(f"{name}={value}" for name, value in vars(path).items())
        return type(path).__name__ + (f"({numbers})" if numbers else "")


def _curves(draws: Draws, share: dict[str, float], counts: Tensor) -> dict[str, Any]:
    """Fields of `StageCurves` for a mix of kinds of queries."""
    values = {
        name: torch.stack([weight * draws.values[kind][name] for kind, weight in share.items()]).sum(0)
        for name in ("top1", "entropy", "own", "floor")
    }
    means = {name: x.mean(1).tolist() for name, x in values.items()}
    sem = {name: _sem(x).tolist() for name, x in values.items()}
    weight = torch.cat([of_kind * counts for of_kind in share.values()], 1)  # (1 + R, kinds Q)
    medians = {
        name: weighted_median(torch.cat([draws.values[kind][name] for kind in share], 1), weight)
        for name in ("top1", "ess")
    }  # (1 + R, T)
    for name, x in (("top1_median", medians["top1"]), ("ess", medians["ess"])):
        means[name], sem[name] = x[0].tolist(), x[1:].std(0).tolist()
    t = torch.tensor(draws.t, dtype=torch.float64)
    reached = {name: first_reaching(level, t, medians["top1"]) for name, level in THRESHOLDS.items()}  # (1 + R) each
    times = {name: x[0].item() for name, x in reached.items()}
    return {**times, **means, "sem": sem, "time_sem": {name: x[1:].std().item() for name, x in reached.items()}}


def _bootstrap_counts(num_queries: int, seed: int) -> Tensor:
    """How often each query counts, (1 + R, Q): once, and in each resampling."""
    generator = keyed_generator("profile bootstrap", seed)
    chosen = torch.randint(num_queries, (NUM_BOOTSTRAP, num_queries), generator=generator)
    counts = torch.ones(1 + NUM_BOOTSTRAP, num_queries, dtype=torch.float64)
    counts[1:] = 0
    counts[1:].scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))
    return counts


def _sem(values: Tensor) -> Tensor:
    """Standard errors of means over queries (T, Q): (T); 0 for a single query, which has no spread to tell it from."""
    return values.std(1) / values.shape[1] ** 0.5 if values.shape[1] > 1 else torch.zeros(len(values))


def _with_parts(plain: dict[str, Any]) -> dict[str, Any]:
    """Read JSON with the two kinds of queries as curves."""
    if not isinstance(plain, dict):
        raise TypeError(f"a {type(plain).__name__}, not an object")
    known = {f.name for f in fields(StageCurves)}
    parts = {}
    for kind in KINDS:
        if plain.get(kind) is not None:
            if set(plain[kind]) != known:
                raise TypeError(f"{kind} holds other keys than {sorted(known)}")
            parts[kind] = StageCurves(**plain[kind])
    return {**plain, **parts}
