"""Runs of a comparison on their way: how far each arm was after equal steps, and after equal time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fm_stages.studies.compare.measure import PROGRESS
from fm_stages.studies.compare.statistics import mean_and_error

Results = Mapping[str, Mapping[int, dict[str, Any]]]
"""Of finished runs, by arm and seed, as ``result.json`` holds them."""


@dataclass(frozen=True)
class EqualTime:
    """What every arm had reached when the fastest one was done.

    Attributes:
        seconds: of training, in which the fastest arm takes all its steps.
        steps: that each arm takes in that time.
        values: of `PROGRESS`, by arm, number and seed, read off between two measurements.
    """

    seconds: float
    steps: dict[str, float]
    values: dict[str, dict[str, dict[int, float]]]


def seconds_per_step(results: Results) -> dict[str, float]:
    """Of each arm with a finished run: the least over seeds, for what else a machine does only adds."""
    return {arm: min(run["train_sec"] / run["steps"] for run in runs.values()) for arm, runs in results.items() if runs}


def cost_of_step(results: Results, reference: str) -> dict[str, tuple[float, float, float]]:
    """Time per step over that of the reference, by arm: of `seconds_per_step`, and the least and largest of a seed."""
    pace, beside = seconds_per_step(results), results.get(reference, {})
    if reference not in pace:
        return {}
    costs = {}
    for arm in pace:
        both = [
            (run["train_sec"] / run["steps"]) / (beside[seed]["train_sec"] / beside[seed]["steps"])
            for seed, run in results[arm].items()
            if seed in beside
        ]
        cost = pace[arm] / pace[reference]
        costs[arm] = cost, min(both, default=cost), max(both, default=cost)
    return costs


def equal_time(results: Results) -> EqualTime | None:
    """Read all arms where their training has taken equally long; None if nothing is finished."""
    pace = seconds_per_step(results)
    if not pace:
        return None
    seconds = min(pace[arm] * run["steps"] for arm in pace for run in results[arm].values())
    steps = {arm: seconds / pace[arm] for arm in pace}
    values = {
        arm: {
            name: {seed: _read_off(run["milestones"], steps[arm], name) for seed, run in results[arm].items()}
            for name in PROGRESS
        }
        for arm in pace
    }
    return EqualTime(seconds, steps, values)


def _read_off(milestones: Sequence[Mapping[str, float]], step: float, name: str) -> float:
    """Between two milestones, linear in the logarithm of the step; NaN before the first and beyond the last."""
    known = [(stone["step"], stone[name]) for stone in milestones if stone[name] is not None]
    steps, values = np.array(known, dtype=float).reshape(-1, 2).T
    if not len(steps):
        return float("nan")
    step = min(step, steps[-1]) if step < steps[-1] * (1 + 1e-9) else step  # the last one, but for rounding
    return float(np.interp(np.log(step), np.log(steps), values, left=np.nan, right=np.nan))


def progress_curves(results: Results) -> dict[str, dict[str, Any]]:
    """Curves over steps and over time, of each arm.

    Returns:
        By arm: ``steps`` (M), ``seconds`` (M), and by name of `PROGRESS` the ``mean`` (M) over seeds and its standard
        error ``sem`` (M), 0 for one seed.
    """
    pace = seconds_per_step(results)
    curves: dict[str, dict[str, Any]] = {}
    for arm in pace:
        steps = sorted(
            set.intersection(*({stone["step"] for stone in run["milestones"]} for run in results[arm].values()))
        )
        curves[arm] = {"steps": steps, "seconds": [step * pace[arm] for step in steps]}
        for name in PROGRESS:
            rows = np.array(
                [
                    [stone[name] for stone in run["milestones"] if stone["step"] in steps]
                    for run in results[arm].values()
                ],
                dtype=float,
            )
            curves[arm][name] = dict(zip(("mean", "sem"), mean_and_error(rows), strict=True))
    return curves
