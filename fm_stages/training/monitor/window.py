"""The measurements since the last line was logged: sums by timestep, their cost, and their way through a checkpoint."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fm_stages.oracle import Curves, TimestepCurves
from fm_stages.training.ranks import gather

SUMS = ("count", "total", "square")
"""Of `TimestepCurves`."""


class Window:
    """Sums of this rank, which `compute` adds up over all of them.

    Args:
        names: of the quantities.
        edges: of the timestep bins.
        device: of the sums.
    """

    def __init__(self, names: tuple[str, ...], edges: list[float], device: torch.device) -> None:
        self.sums = TimestepCurves(names, edges).to(device)
        self.num_measured = 0
        self.oracle_sec = 0.0
        self.start = time.perf_counter()

    def add(self, t: Tensor, values: dict[str, Tensor]) -> None:
        """Add a batch: times (B,) and one (B,) tensor for each name."""
        self.sums.update(t, **values)
        self.num_measured += 1

    def compute(self) -> Curves:
        """The means over all ranks. Every rank calls this."""
        return self.sums.compute()

    def share(self, now: float) -> float:
        """Of the time since the window was opened that the oracle took."""
        return self.oracle_sec / max(now - self.start, 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """The sums of each rank, apart, so that as many ranks go on to the last bit. Every rank calls this."""
        own = {name: getattr(self.sums, name).cpu() for name in SUMS}
        return {"edges": self.sums.edges, "num_measured": self.num_measured, "ranks": gather(own)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, unless the bins are others. On another number of ranks the first one takes all."""
        if state["edges"] != self.sums.edges or state["ranks"][0]["total"].shape != self.sums.total.shape:
            return
        distributed = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        size = torch.distributed.get_world_size() if distributed else 1
        if size != len(state["ranks"]):
            everything = {name: sum(each[name] for each in state["ranks"]) for name in SUMS}
            nothing = {name: torch.zeros_like(x) for name, x in everything.items()}
            mine = nothing if rank else everything
        else:
            mine = state["ranks"][rank]
        for name in SUMS:
            getattr(self.sums, name).copy_(mine[name])
        self.num_measured = state["num_measured"]
