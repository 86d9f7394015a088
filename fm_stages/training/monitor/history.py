"""Curves by timestep over the steps of a run, for the figures over steps and the tables beside them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from fm_stages.oracle import Curves
from fm_stages.training.logs.loggers import Table

MOST = 512
"""Rows that are kept: more than a figure can show, few enough for a checkpoint."""

FEW = 8
"""Samples in a bin below which their scatter does not say how far the mean is off."""


class History:
    """One quantity by timestep at some steps of a run, each time of one or more series, such as kinds of weights.

    Beyond `MOST` steps every other one is forgotten, but for those that are to be kept.

    Args:
        quantity: of the curves that are kept.
    """

    def __init__(self, quantity: str) -> None:
        self.quantity = quantity
        self.steps: list[int] = []
        self.rows: list[dict[str, Curves]] = []
        """By step, and there by the name of the series."""

    def add(self, step: int, curves: Mapping[str, Curves], keep: Collection[float] = ()) -> None:
        """Add a step. One that is not later than the last is none; other timestep bins begin a new history.

        Args:
            step: of the run.
            curves: by the name of the series.
            keep: steps that are not forgotten, however many there are.
        """
        if not curves or (self.steps and step <= self.steps[-1]):
            return
        kept = {
            name: Curves(
                c.edges, c.count, {self.quantity: c.mean[self.quantity]}, {self.quantity: c.sem[self.quantity]}
            )
            for name, c in curves.items()
        }
        if self.rows and self.edges != next(iter(kept.values())).edges:
            self.steps, self.rows = [], []
        self.steps.append(step)
        self.rows.append(kept)
        if len(self.rows) > MOST:
            kept_rows = [
                (old, row)
                for i, (old, row) in enumerate(zip(self.steps, self.rows, strict=True))
                if i % 2 == 0 or old in keep
            ]
            self.steps, self.rows = [old for old, _ in kept_rows], [row for _, row in kept_rows]

    @property
    def edges(self) -> list[float]:
        """Of the timestep bins (K + 1)."""
        return next(iter(self.rows[0].values())).edges

    @property
    def series(self) -> list[str]:
        """Names, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def by_t(self, name: str) -> list[list[float]]:
        """A series' means at each step, by bin: (S, K); NaN where it has none."""
        none = [math.nan] * (len(self.edges) - 1)
        return [row[name].mean[self.quantity] if name in row else none for row in self.rows]

    def error_between(self, one: str, other: str) -> list[list[float]]:
        """Standard errors of the difference of two series at each step, by bin: (S, K); NaN below `FEW` samples."""
        none = [math.nan] * (len(self.edges) - 1)
        pairs = [[self._errors(row[name]) if name in row else none for name in (one, other)] for row in self.rows]
        return [[math.hypot(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]

    def _errors(self, curves: Curves) -> list[float]:
        errors = zip(curves.count, curves.sem[self.quantity], strict=True)
        return [math.nan if count < FEW else error for count, error in errors]

    def average(self, name: str, lo: float, hi: float) -> tuple[list[float], list[float]]:
        """A series' averages over uniform t in [lo, hi] at each step (S,), and their standard errors."""
        found = [row.get(name) for row in self.rows]
        return (
            [math.nan if c is None else c.average(self.quantity, lo, hi) for c in found],
            [math.nan if c is None else c.average_sem(self.quantity, lo, hi) for c in found],
        )

    def table(self) -> Table:
        """One row for each step and bin: step, t_lo, t_hi; and of each series count, mean and standard error."""
        columns, edges, series = ["step", "t_lo", "t_hi"], self.edges, self.series
        for name in series:
            columns += [f"{name}_count", f"{name}_{self.quantity}", f"{name}_{self.quantity}_sem"]
        lines = []
        for step, row in zip(self.steps, self.rows, strict=True):
            for k in range(len(edges) - 1):
                line: list[float] = [step, edges[k], edges[k + 1]]
                for name in series:
                    c = row.get(name)
                    mean, sem = (math.nan,) * 2 if c is None else (c.mean[self.quantity][k], c.sem[self.quantity][k])
                    line += [0 if c is None else c.count[k], mean, sem]
                lines.append(line)
        return columns, lines

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        rows = [
            {name: [c.count, c.mean[self.quantity], c.sem[self.quantity]] for name, c in row.items()}
            for row in self.rows
        ]
        return {"steps": list(self.steps), "edges": self.edges if rows else [], "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        edges, quantity = list(state["edges"]), self.quantity
        self.steps = list(state["steps"])
        self.rows = [
            {name: Curves(edges, count, {quantity: mean}, {quantity: sem}) for name, (count, mean, sem) in row.items()}
            for row in state["rows"]
        ]
