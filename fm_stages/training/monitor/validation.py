"""One validation: held-out images as they come, and after them the probe of training images."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from fm_stages.oracle import Curves, Oracle, Wiener
from fm_stages.training.monitor.held_out import HeldOut
from fm_stages.training.monitor.probe import measure_probe


class Validation:
    """Measures held-out batches and a probe of as many training images, in batches of the same size.

    Args:
        oracle: of the training set.
        wiener: the linear reference, where there is one.
        edges: of the timestep bins, with the boundary among them.
        boundary: between the stages.
        device: of the sums.
    """

    def __init__(
        self, oracle: Oracle, wiener: Wiener | None, edges: list[float], boundary: float, device: torch.device
    ) -> None:
        self.oracle, self.wiener, self.edges = oracle, wiener, edges
        self._sums = HeldOut(edges, boundary, device)
        self._num_batches = 0

    def add(self, seen: dict[str, Tensor]) -> None:
        """Add a held-out batch, as `fm_stages.training.monitor.checks.outputs_of` returns it."""
        self._sums.update(self.oracle, self.wiener, seen)
        self._num_batches += 1

    def finish(
        self, trainer: L.Trainer, pl_module: L.LightningModule, num_probe: int
    ) -> tuple[dict[str, Curves], dict[str, Curves]]:
        """Curves of held-out images and of the probe, by the suffix of the weights, reduced over ranks.

        Every rank calls this.

        Args:
            trainer: of the run.
            pl_module: whose weights are measured.
            num_probe: most training images; 0 = none.
        """
        held_out = self._sums.compute()
        num = min(num_probe, max(sum(curves.count) for curves in held_out.values()))
        calls = torch.tensor(self._num_batches, device=pl_module.device)
        num_batches = int(trainer.strategy.reduce(calls, reduce_op="max"))
        return held_out, measure_probe(trainer, pl_module, self.oracle, self.edges, num, num_batches)
