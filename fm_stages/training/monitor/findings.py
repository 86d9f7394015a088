"""What a run has found so far, and its way through a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fm_stages.oracle import Curves
from fm_stages.training.monitor.history import History


class Findings:
    """The newest curves, and those over the steps of the run."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.train: Curves | None = None
        """Curves of the last window on training inputs (raw weights)."""
        self.logged_step = 0
        """Step at which that window ended."""
        self.held_out: dict[str, Curves] = {}
        """Curves of the last validation, by suffix: "" raw, "_ema" averaged weights."""
        self.probe: dict[str, Curves] = {}
        """Of the regular loss on training images, at the same validation and likewise."""
        self.validated_step = 0
        """Step of that validation."""
        self.windows = History("gap")
        """What windows found: train."""
        self.validations = History("regular")
        """What validations found: train, held_out, train_ema, held_out_ema."""

    def findings(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "train": None if self.train is None else asdict(self.train),
            "logged_step": self.logged_step,
            "held_out": {suffix: asdict(curves) for suffix, curves in self.held_out.items()},
            "probe": {suffix: asdict(curves) for suffix, curves in self.probe.items()},
            "validated_step": self.validated_step,
            "windows": self.windows.state_dict(),
            "validations": self.validations.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `findings`; an older checkpoint may hold less."""
        self.forget()
        self.train = None if state["train"] is None else Curves(**state["train"])
        self.logged_step, self.validated_step = state["logged_step"], state.get("validated_step", 0)
        self.held_out = {suffix: Curves(**curves) for suffix, curves in state["held_out"].items()}
        self.probe = {suffix: Curves(**curves) for suffix, curves in state.get("probe", {}).items()}
        for name, history in (("windows", self.windows), ("validations", self.validations)):
            if name in state:
                history.load_state_dict(state[name])
