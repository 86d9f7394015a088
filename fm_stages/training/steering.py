"""StageAware: lets measured stages steer timesteps, weights and target of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from fm_stages import plots
from fm_stages.training.loggers import is_trial, log_figure, log_metrics, run_folder
from fm_stages.training.module import FlowMatching
from fm_stages.training.monitor import OracleMonitor
from fm_stages.training.policies import NoProposalError, Policy

EMPHASIS = {"timesteps", "weighting"}
"""Both say how much each t counts."""


class StageAware(L.Callback):
    """Applies policies to what `OracleMonitor` measured, at intervals; logs each change with its reason.

    What it decides depends on numbers that are equal on all ranks; it is kept in the checkpoint, and a resumed run goes
    on with it. It needs an `OracleMonitor` among the Trainer's callbacks, before it, and a `FlowMatching` module.

    Args:
        policies: what to change, each by its own rule; none leaves training alone.
    """

    def __init__(self, policies: list[Policy] | None = None) -> None:
        self.policies = list(policies or [])
        for i, policy in enumerate(self.policies):
            for other in self.policies[:i]:
                if policy.steers == other.steers:
                    raise ValueError(
                        f"{_name(other)} and {_name(policy)} both change the {policy.steers}: choose one of them"
                    )
        self._numbers: dict[str, list[float]] = {}
        self._last_step: dict[str, int] = {}
        self._monitor: OracleMonitor | None = None
        self._restored = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the monitor, and refuse what cannot be steered."""
        if not self.policies or stage != "fit":
            return
        if not isinstance(pl_module, FlowMatching):
            raise ValueError(f"StageAware steers FlowMatching, not {type(pl_module).__name__}")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [callback for callback in callbacks if isinstance(callback, OracleMonitor)]
        if not monitors:
            raise ValueError("StageAware follows what OracleMonitor measures: add an OracleMonitor to the callbacks")
        if callbacks.index(monitors[0]) > callbacks.index(self):
            raise ValueError("OracleMonitor must come before StageAware in the list of callbacks: it measures first")
        if {policy.steers for policy in self.policies} >= EMPHASIS and not pl_module.importance_weights:
            raise ValueError(
                "a policy for timesteps and one for weights contradict each other, for both say how much each t "
                "counts: choose one, or set importance_weights, which takes the density out of the objective"
            )
        self._monitor = monitors[0]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with what the run was configured with, or go on with what the checkpoint holds."""
        if self._monitor is None:
            return
        assert isinstance(pl_module, FlowMatching)
        for policy in self.policies:
            begin = policy.start(pl_module)
            if self._restored and _name(policy) in self._numbers:
                self._apply(pl_module, policy)
            else:
                self._numbers[_name(policy)], self._last_step[_name(policy)] = begin, -1
        self._restored = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply each policy whose turn it is."""
        if self._monitor is None or self._monitor.profile is None:
            return
        assert isinstance(pl_module, FlowMatching)
        step = trainer.global_step
        for policy in self.policies:
            last = self._last_step[_name(policy)]
            due = step >= policy.warmup_steps if last < 0 else step >= last + policy.every_n_steps
            if due and step != last:
                self._update(trainer, pl_module, policy)

    def state_dict(self) -> dict[str, Any]:
        """The numbers that are in force, and when they were last changed."""
        return {"numbers": self._numbers, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._numbers = {name: list(numbers) for name, numbers in state_dict["numbers"].items()}
        self._last_step = dict(state_dict["last_step"])
        self._restored = True

    def _update(self, trainer: L.Trainer, module: FlowMatching, policy: Policy) -> None:
        """Move the policy's numbers towards what it proposes now."""
        name, step = _name(policy), trainer.global_step
        assert self._monitor is not None
        assert self._monitor.profile is not None
        curves = self._monitor.train
        if policy.follows == "model" and curves is None:
            return  # the first window is not full yet: asked again at the next step
        old, self._last_step[name] = self._numbers[name], step
        try:
            proposed, reason = policy.propose(self._monitor.profile, curves)
        except NoProposalError as error:
            self._report(trainer, policy, old, f"left as it is: {error}")
            return
        keep = policy.smoothing
        new = [math.exp(keep * math.log(a) + (1 - keep) * math.log(b)) for a, b in zip(old, proposed, strict=True)]
        if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(old, new, strict=True)):
            return  # what follows the data alone has arrived
        self._numbers[name] = new
        if not policy.dry_run:
            self._apply(module, policy)
        self._report(trainer, policy, new, reason)
        if policy.steers == "timesteps":
            self._draw_density(trainer, module, policy)

    def _apply(self, module: FlowMatching, policy: Policy) -> None:
        if policy.dry_run:
            return
        assert self._monitor is not None
        policy.apply(module, self._monitor.oracle, self._numbers[_name(policy)])

    @rank_zero_only
    def _report(self, trainer: L.Trainer, policy: Policy, numbers: list[float], reason: str) -> None:
        """A line for the person, one for the file, and the numbers for the logger."""
        name, step = _name(policy), trainer.global_step
        scalars = policy.scalars(numbers)
        would = "would set " if policy.dry_run else ""
        values = ", ".join(f"{key.rpartition('/')[2]} {value:.4g}" for key, value in scalars.items())
        rank_zero_info(f"StageAware, step {step}: {name} {would}{values} ({reason}; follows the {policy.follows}).")
        prefix = "dry_run/" if policy.dry_run else ""
        log_metrics(trainer, {f"{prefix}{key}": value for key, value in scalars.items()})
        if not is_trial(trainer):
            folder = run_folder(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            line = {"step": step, "policy": name, "dry_run": policy.dry_run, "numbers": numbers, "reason": reason}
            with (folder / "steering.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    @rank_zero_only
    def _draw_density(self, trainer: L.Trainer, module: FlowMatching, policy: Policy) -> None:
        """The density of t that is in force."""
        assert self._monitor is not None
        assert self._monitor.profile is not None
        t = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
        densities = {type(module.timesteps).__name__: module.timesteps.log_prob(t).exp().tolist()}
        title = f"density of t at step {trainer.global_step}, by {_name(policy)}"
        figure = plots.timestep_density(t.tolist(), densities, self._monitor.profile.boundary, title)
        log_figure(trainer, "stages/density", figure)


def _name(policy: Policy) -> str:
    return type(policy).__name__
