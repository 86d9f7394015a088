"""What the training set's oracle can say of held-out images: the regular loss for all t, the gap before the boundary.

On x_t made from held-out images u* heads for another image: past the boundary the distance to it grows like
1 / (1 - t)^2 and says nothing about the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.oracle import Curves, Oracle, TimestepCurves, Wiener, mean_square
from fm_stages.training.monitor.checks import SUFFIXES


class HeldOut:
    """Held-out numbers by timestep (regular, gap, wiener), of raw and, where the module reports them, EMA weights.

    Args:
        edges: timestep bins, with the boundary among them, so that a bin has a gap or has none.
        boundary: where the gap stops.
        device: of the sums.
    """

    def __init__(self, edges: list[float], boundary: float, device: torch.device) -> None:
        self.boundary = boundary
        self._sums = {s: TimestepCurves(("regular", "gap", "wiener"), edges).to(device) for s in SUFFIXES}
        self._seen: set[str] = set()

    def update(self, oracle: Oracle, wiener: Wiener | None, seen: dict[str, Tensor]) -> None:
        """Add a held-out batch, as `fm_stages.training.monitor.checks.outputs_of` returns it."""
        if "labels" in seen and oracle.bank.has_labels:  # of a class that was never trained on there is no oracle
            known = torch.isin(seen["labels"], torch.tensor([-1, *oracle.bank.classes], device=seen["t"].device))
            seen = {name: x[known] for name, x in seen.items()}
        x0, x1, t = seen["x0"], seen["x1"], seen["t"]
        conditional = oracle.path.velocity(x0, x1, t)
        early = (t < self.boundary).nonzero()[:, 0]
        # NaN past the boundary: those bins have no gap
        best, linear = torch.full_like(x1, torch.nan), torch.full_like(x1, torch.nan)
        if len(early) or oracle.bank.group is not None:  # ranks that share a bank wait for one another
            labels = seen.get("labels")
            draws = x0[early], x1[early], t[early]
            best[early] = oracle.target(*draws, None if labels is None else labels[early])
            if wiener is not None:
                mean = wiener.mean(oracle.path.interpolate(*draws), t[early])
                linear[early] = oracle.target_from_mean(mean, *draws)
        for suffix in SUFFIXES:
            prediction = seen.get(f"prediction{suffix}")
            if prediction is None:
                continue
            self._seen.add(suffix)
            self._sums[suffix].update(
                t,
                regular=mean_square(prediction - conditional),
                gap=mean_square(prediction - best),
                wiener=mean_square(linear - best),
            )

    def compute(self) -> dict[str, Curves]:
        """Curves by suffix, reduced over ranks: every rank calls this."""
        return {suffix: self._sums[suffix].compute() for suffix in SUFFIXES if suffix in self._seen}
