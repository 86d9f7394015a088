"""A comparison as it stands: what there is to report, and the numbers that follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fm_stages.oracle import StageProfile
from fm_stages.studies.compare.measure import METRICS, ProbeSettings
from fm_stages.studies.compare.progress import Results
from fm_stages.studies.compare.statistics import Paired, mean_and_error, paired

COLUMNS = {**METRICS, "train_sec": "training time (s)"}
"""Names of all compared numbers in words."""


@dataclass
class Comparison:
    """What there is to report.

    Attributes:
        name: of the comparison.
        base: files of the configuration.
        arms: names, in order.
        reference: the arm that the others are compared with.
        seeds: that were asked for.
        results: of the finished runs.
        missing: what became of the others, by run.
        other_weights: arms that start from other weights than the reference.
        profile: the stages of the data.
        settings: of the probe.
        options: of the command.
    """

    name: str
    base: Sequence[str]
    arms: Sequence[str]
    reference: str
    seeds: Sequence[int]
    results: Results
    missing: Mapping[str, str]
    other_weights: Sequence[str]
    profile: StageProfile
    settings: ProbeSettings
    options: Sequence[str]

    @property
    def weights(self) -> str:
        """Those that are compared: averaged ones if every run keeps them, else raw."""
        runs = [run for of_arm in self.results.values() for run in of_arm.values()]
        return "ema" if all("ema" in run["weights"] for run in runs) else "raw"

    def values(self, arm: str, metric: str, weights: str = "") -> dict[int, float]:
        """One number of an arm, by seed; what no number was found for is left out."""
        runs = self.results.get(arm, {})
        if metric == "train_sec":
            return {seed: run[metric] for seed, run in runs.items()}
        found = {seed: run["weights"].get(weights or self.weights, {}).get(metric) for seed, run in runs.items()}
        return {seed: math.nan if x is None else x for seed, x in found.items()}

    def steps(self, arm: str) -> int | None:
        """That the arm's runs took; None if none is finished."""
        return next((run["steps"] for run in self.results.get(arm, {}).values()), None)

    def differences(self, weights: str = "") -> dict[str, dict[str, Paired]]:
        """Paired differences to the reference, by arm and metric."""
        found: dict[str, dict[str, Paired]] = {}
        for arm in self.arms:
            if arm == self.reference:
                continue
            pairs = {m: paired(self.values(arm, m, weights), self.values(self.reference, m, weights)) for m in COLUMNS}
            found[arm] = {metric: pair for metric, pair in pairs.items() if pair is not None}
        return found

    def gap_curves(self) -> dict[str, dict[str, list[float]]]:
        """Gap over t of each arm, as `fm_stages.plots.gap_of_arms` takes it."""
        curves = {}
        reference = self._gaps(self.reference)
        for arm, runs in self.results.items():
            if not runs:
                continue
            gaps = self._gaps(arm)
            mean, error = mean_and_error(np.array(list(gaps.values())))
            curves[arm] = {"mean": mean, "sem": error}
            if common := sorted(set(gaps) & set(reference)):
                relative = np.array([gaps[seed] / reference[seed] - 1 for seed in common])
                curves[arm]["relative"], curves[arm]["relative_sem"] = mean_and_error(relative)
        return curves

    def _gaps(self, arm: str) -> dict[int, np.ndarray]:
        """Gap in each bin (K), by seed."""
        runs = self.results.get(arm, {})
        curves = {seed: run["weights"][self.weights]["curves"]["train"]["mean"]["gap"] for seed, run in runs.items()}
        return {seed: np.array(gap, dtype=float) for seed, gap in curves.items()}  # null becomes NaN

    def edges(self) -> list[float]:
        """Of the timestep bins, which are the same for all runs."""
        run = next(run for runs in self.results.values() for run in runs.values())
        return run["weights"][self.weights]["curves"]["train"]["edges"]
