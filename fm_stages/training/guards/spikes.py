"""When a number of the run is far above what it was: robust against the very values that it looks for."""

from __future__ import annotations

from collections import deque
from statistics import median

MIN_VALUES = 20
"""Steps before anything is called a spike."""

FACTOR = 2.0
"""A spike is also this many times the median: where a number hardly moves, ten deviations are nothing."""

TO_SIGMA = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


class SpikeDetector:
    """Holds each value against the median of those before it, in robust standard deviations.

    Spikes join the window as well: a level that stays is the new level after half a window.

    Args:
        window: number of values that are remembered.
        threshold: robust standard deviations above the median.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self.values: deque[float] = deque(maxlen=window)

    def excess(self, value: float) -> str | None:
        """Add a finite value; if it is a spike, say by how much it is one."""
        found = self._judge(value) if len(self.values) >= MIN_VALUES else None
        self.values.append(value)
        return found

    def _judge(self, value: float) -> str | None:
        middle = median(self.values)
        if value - middle <= (FACTOR - 1) * abs(middle):  # a loss with a learned weighting can be negative
            return None
        deviation = TO_SIGMA * median(abs(x - middle) for x in self.values)
        if value - middle <= self.threshold * deviation:
            return None
        return f"{value:.4g}, where the median of the {len(self.values)} steps before is {middle:.4g}"
