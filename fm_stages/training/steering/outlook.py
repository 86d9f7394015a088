"""What a run's own curves say of what comes next: a forecast of the navigation gap, and the onset of memorization."""

from __future__ import annotations

import math
from typing import Any

from fm_stages.oracle import Curves
from fm_stages.training.steering.forecast import forecast_power_law, in_words
from fm_stages.training.steering.memorization import MemorizationWatch


class Outlook:
    """Windows and validations of a run so far, of raw weights."""

    def __init__(self) -> None:
        self.gaps: list[tuple[int, float, float]] = []
        """Step, gap before the boundary and its standard error, of each window."""
        self.watch = MemorizationWatch()

    def add_window(self, step: int, curves: Curves, boundary: float) -> None:
        """Add a window of measurements on training inputs; one that was added before a resume is not added again."""
        gap, error = curves.average("gap", 0, boundary), curves.average_sem("gap", 0, boundary)
        if all(map(math.isfinite, (gap, error))) and (not self.gaps or step > self.gaps[-1][0]):
            self.gaps.append((step, gap, error))

    def add_validation(self, step: int, held_out: Curves, train: Curves, boundary: float) -> str | None:
        """Add a validation; returns what to tell if memorization sets in."""
        loss, error = held_out.average("regular", boundary, 1), held_out.average_sem("regular", boundary, 1)
        return self.watch.update(step, loss, error, train.average("regular", boundary, 1))

    def forecast(self) -> str | None:
        """A sentence on what more training would bring to navigation; None if too little is known."""
        if not self.gaps:
            return None
        steps, values, errors = (list(column) for column in zip(*self.gaps, strict=True))
        found = forecast_power_law(steps, values, errors)
        return None if found is None else in_words(found, "navigation", steps[-1])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"gaps": [list(gap) for gap in self.gaps], "watch": self.watch.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.gaps = [(int(step), gap, error) for step, gap, error in state["gaps"]]
        self.watch.load_state_dict(state["watch"])
