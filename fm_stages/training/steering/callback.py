"""StageAware: lets measured stages steer timesteps, weights and target of a run."""

from __future__ import annotations

import json
import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import nn

from fm_stages import plots
from fm_stages.training.logs.alerts import alert
from fm_stages.training.logs.loggers import dispensable, is_trial, keep_until, log_figure, log_metrics, run_folder
from fm_stages.training.module import FlowMatching
from fm_stages.training.monitor.callback import OracleMonitor
from fm_stages.training.monitor.checks import outputs_of
from fm_stages.training.steering.gradients import measure_gradient_variance
from fm_stages.training.steering.outlook import Outlook
from fm_stages.training.steering.policies import NoProposalError, Policy

FILE = "steering.jsonl"
"""In the run's folder: one line for each change."""

EMPHASIS = {"timesteps", "weighting"}
"""Both say how much each t counts."""


class StageAware(L.Callback):
    """Applies policies to what `OracleMonitor` measured, at intervals; logs each change with its reason.

    What it decides depends on numbers that are equal on all ranks; it is kept in the checkpoint, and a resumed run goes
    on with it. It needs an `OracleMonitor` among the Trainer's callbacks, before it, and a `FlowMatching` module.

    It also tells what the run's curves promise (`Outlook`), and alerts of the onset of memorization; that much also
    without policies.

    Args:
        policies: what to change, each by its own rule; none leaves training alone.
        gradients_every_n_steps: optimizer steps between measurements of how much a sample's gradient scatters with the
            conditional and with the oracle target (`measure_gradient_variance`); 0 = never.
    """

    def __init__(self, policies: list[Policy] | None = None, gradients_every_n_steps: int = 0) -> None:
        if gradients_every_n_steps < 0:
            raise ValueError(f"gradients_every_n_steps={gradients_every_n_steps} must be 0 or more")
        self.gradients_every_n_steps = gradients_every_n_steps
        self.policies = list(policies or [])
        for i, policy in enumerate(self.policies):
            for other in self.policies[:i]:
                if policy.steers == other.steers:
                    raise ValueError(
                        f"{_name(other)} and {_name(policy)} both change the {policy.steers}: choose one of them"
                    )
        self._numbers: dict[str, list[float]] = {}
        self._last_step: dict[str, int] = {}
        self._in_force: set[str] = set()  # policies that have changed something; until then the configuration holds
        self._monitor: OracleMonitor | None = None
        self._restored = False
        self._refused: dict[str, str] = {}
        self._outlook = Outlook()
        self._window_step = -1  # of the last one that was added to the outlook
        self._measured_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the monitor, and refuse what cannot be steered."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = [callback for callback in callbacks if isinstance(callback, OracleMonitor)]
        self._monitor = monitors[0] if monitors and stage == "fit" else None
        if not (self.policies or self.gradients_every_n_steps) or stage != "fit":
            return
        if not isinstance(pl_module, FlowMatching):
            raise ValueError(f"StageAware steers FlowMatching, not {type(pl_module).__name__}")
        if not monitors:
            raise ValueError("StageAware follows what OracleMonitor measures: add an OracleMonitor to the callbacks")
        if callbacks.index(monitors[0]) > callbacks.index(self):
            raise ValueError("OracleMonitor must come before StageAware in the list of callbacks: it measures first")
        if self.gradients_every_n_steps and isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError("gradients_every_n_steps measures networks that are whole on each rank: set it to 0")
        self.check(pl_module)

    def check(self, module: FlowMatching) -> None:
        """Refuse policies that contradict each other in this module.

        Raises:
            ValueError: with both, and the remedy.
        """
        if {policy.steers for policy in self.policies} >= EMPHASIS and not module.importance_weights:
            raise ValueError(
                "a policy for timesteps and one for weights contradict each other, for both say how much each t "
                "counts: choose one, or set importance_weights, which takes the density out of the objective"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with what the run was configured with, or go on with what the checkpoint holds."""
        if not self.policies:
            return
        assert isinstance(pl_module, FlowMatching)
        timesteps, weighting, pl_module.target = pl_module.configured  # an earlier fit may have steered them
        pl_module.weigh_by(weighting)
        pl_module.draw_from(timesteps)
        for policy in self.policies:
            begin = policy.start(pl_module)
            name = _name(policy)
            if not self._restored or name not in self._numbers:
                self._numbers[name], self._last_step[name] = begin, -1
                self._in_force.discard(name)
            elif name in self._in_force:
                self._apply(pl_module, policy)
            else:
                self._numbers[name] = begin
        self._restored = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget what the file says of later steps, which come again; no gradients are measured twice at a step."""
        self._measured_step = trainer.global_step
        if trainer.is_global_zero and not is_trial(trainer):
            keep_until(run_folder(trainer) / FILE, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply each policy whose turn it is."""
        monitor, step = self._monitor, trainer.global_step
        if monitor is None or monitor.profile is None:
            return
        if monitor.train is not None and monitor.logged_step != self._window_step:
            self._window_step = monitor.logged_step
            self._outlook.add_window(monitor.logged_step, monitor.train, monitor.profile.boundary)
        every = self.gradients_every_n_steps
        if every and step and step % every == 0 and step != self._measured_step:
            self._measured_step = step
            self._measure_gradients(trainer, pl_module, outputs)
        for policy in self.policies:
            assert isinstance(pl_module, FlowMatching)
            last = self._last_step[_name(policy)]
            due = step >= policy.warmup_steps if last < 0 else step >= last + policy.every_n_steps
            if due and step not in (0, last):  # inside a step of accumulated gradients nothing may change
                self._update(trainer, pl_module, policy)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch for memorization."""
        monitor = self._monitor
        if trainer.sanity_checking or monitor is None or monitor.profile is None:
            return
        held_out, train = monitor.held_out.get(""), monitor.probe.get("", monitor.train)
        if held_out is not None and train is not None:
            text = self._outlook.add_validation(trainer.global_step, held_out, train, monitor.profile.boundary)
            if text:
                alert(trainer, "memorization sets in", text)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what more training would bring."""
        if text := self._outlook.forecast():
            rank_zero_info(f"\nForecast, {text}")

    def state_dict(self) -> dict[str, Any]:
        """The numbers that are in force, when they were last changed, and the run's curves so far."""
        return {
            "numbers": self._numbers,
            "last_step": self._last_step,
            "in_force": sorted(self._in_force),
            "refused": dict(self._refused),
            "outlook": self._outlook.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with them."""
        self._numbers = {name: list(numbers) for name, numbers in state_dict["numbers"].items()}
        self._last_step = dict(state_dict["last_step"])
        self._in_force = set(state_dict.get("in_force", self._numbers))  # older checkpoints do not say
        self._refused = dict(state_dict.get("refused", {}))
        self._outlook.load_state_dict(state_dict["outlook"])
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
            if self._refused.get(name) != str(error):  # once, for what follows the data hears the same each time
                self._refused[name] = str(error)
                alert(trainer, f"{name} has nothing to follow", f"{error}; training is left as it is.")
                self._report(trainer, policy, None, f"left as it is: {error}")
            return
        self._refused.pop(name, None)  # what is refused after this is news again
        keep = policy.smoothing
        new = [math.exp(keep * math.log(a) + (1 - keep) * math.log(b)) for a, b in zip(old, proposed, strict=True)]
        new[: policy.num_fixed] = proposed[: policy.num_fixed]
        if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(old, new, strict=True)):
            return  # what follows the data alone has arrived
        self._numbers[name] = new
        self._in_force.add(name)
        if not policy.dry_run:
            self._apply(module, policy)
        self._report(trainer, policy, new, reason)
        if policy.steers == "timesteps" and not policy.dry_run:
            self._draw_density(trainer, module, policy)

    def _apply(self, module: FlowMatching, policy: Policy) -> None:
        if policy.dry_run:
            return
        assert self._monitor is not None
        policy.apply(module, self._monitor.oracle, self._numbers[_name(policy)])

    @rank_zero_only
    def _report(self, trainer: L.Trainer, policy: Policy, numbers: list[float] | None, reason: str) -> None:
        """A line for the person, one for the file, and the numbers for the logger."""
        name, step = _name(policy), trainer.global_step
        scalars = policy.scalars(numbers) if numbers else {}
        would = "would set " if policy.dry_run and numbers else ""
        values = ", ".join(f"{key.rpartition('/')[2]} {value:.4g}" for key, value in scalars.items())
        rank_zero_info(f"StageAware, step {step}: {name} {would}{values} ({reason}; follows the {policy.follows}).")
        prefix = "dry_run/" if policy.dry_run else ""
        log_metrics(trainer, {f"{prefix}{key}": value for key, value in scalars.items()})
        if not is_trial(trainer):
            line = {"step": step, "policy": name, "dry_run": policy.dry_run, "numbers": numbers, "reason": reason}
            with dispensable(trainer, FILE), (run_folder(trainer) / FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _measure_gradients(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any) -> None:
        """How much the oracle target calms gradients, on rows of the batch that was just trained on."""
        assert self._monitor is not None
        assert self._monitor.profile is not None
        b = self._monitor.profile.boundary
        if not 0 < b < 1:
            return
        seen, network = outputs_of(outputs, module), module.network
        assert isinstance(network, nn.Module)
        edges = [*(b * i / 3 for i in range(3)), *(b + (1 - b) * i / 3 for i in range(3)), 1.0]
        found = measure_gradient_variance(
            network, self._monitor.oracle, seen["x1"], seen.get("labels"),
            seen.get("index"), edges, step=trainer.global_step,
        )  # fmt: skip
        early, late = found.ratio(0, b), found.ratio(b, 1)
        rank_zero_info(
            f"StageAware, step {trainer.global_step}: a sample's gradient scatters {early:.2f} times as much with the "
            f"conditional target as with the oracle's in navigation, {late:.2f} times in refinement (variance)."
        )
        log_metrics(trainer, {"stages/gradient_ratio_navigation": early, "stages/gradient_ratio_refinement": late})
        figure = plots.gradient_variance(
            found.edges, found.regular, found.oracle, b, found.mean_square, f"step {trainer.global_step}"
        )
        log_figure(trainer, "stages/gradient_variance", figure, found.table())

    @rank_zero_only
    def _draw_density(self, trainer: L.Trainer, module: FlowMatching, policy: Policy) -> None:
        """The density of t that is in force."""
        assert self._monitor is not None
        assert self._monitor.profile is not None
        t = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
        density = module.timesteps.log_prob(t).exp().tolist()
        densities = {type(module.timesteps).__name__: density}
        title = f"density of t at step {trainer.global_step}, by {_name(policy)}"
        figure = plots.timestep_density(t.tolist(), densities, self._monitor.profile.boundary, title)
        table = ["t", "density"], [list(row) for row in zip(t.tolist(), density, strict=True)]
        log_figure(trainer, "stages/density", figure, table)


def _name(policy: Policy) -> str:
    return type(policy).__name__
