"""What share of training time does StageAware cost beyond OracleMonitor, at its default cadence?

For each policy one run with monitor and steering, in which the policy acts every few steps, so that each part of the
cost is seen often; the share is put together from the parts, as at the cadence that the policy has by default:

    share = (idle hook + window / steps of a window + update / every_n_steps + draw) / step

`step` is a training step without callbacks' time. `draw` is what drawing t and weighing the loss takes longer with what
the policy set than with what the configuration began with; it is timed by itself, in turn with the other. The price of
another target is not in it: benchmarks/targets.py has that.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import lightning as L
import torch
from timing import alternate, clock, machine, parser, spread, table
from tqdm import tqdm
from training_run import add_config_options, from_config, parts

from fm_stages.flow import UniformTimesteps, UniformWeighting
from fm_stages.training import FlowMatching, GapDensity, OracleMonitor, ShiftToBoundary, StageAware, StageWeights
from fm_stages.training.steering.policies import Policy

EVERY, WINDOW = 2, 3
"""Cadence of the monitor: a window ends every sixth step."""

UPDATE = 9
"""Steps between two updates, so that some fall on a step without a window."""


class TimedSteering(StageAware):
    """Times its own hook, by what the hook did."""

    def __init__(self, policy: Policy, bar: tqdm) -> None:
        super().__init__([policy])
        self.bar = bar
        self.seconds: dict[str, list[float]] = {"idle": [], "window": [], "update": [], "step": []}
        self._stamp: float | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Begin a step."""
        self._stamp = clock(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The monitor has come before, so only steps in which it rested are steps."""
        before, updates, windows = clock(pl_module.device), dict(self._last_step), self._window_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        spent = clock(pl_module.device) - before
        kind = "update" if updates != self._last_step else "window" if windows != self._window_step else "idle"
        if trainer.global_step > UPDATE:  # the first ones warm up
            self.seconds[kind].append(spent)
            if trainer.global_step % EVERY and self._stamp is not None:
                self.seconds["step"].append(before - self._stamp)
        self.bar.update()


def draw_sec(module: FlowMatching, batch_size: int, rounds: int) -> list[float]:
    """Seconds by which drawing t and weighing take longer than they did when the run began."""
    u = torch.rand(batch_size, generator=torch.Generator().manual_seed(0)).to(module.device)
    begun, weighting = UniformTimesteps(), UniformWeighting()
    weighting.prepare(module.path, begun, False)

    def before() -> None:
        weighting(begun.icdf(u))

    def now() -> None:
        module.weighting(module.timesteps.icdf(u))

    pair = alternate({"draw": (before, now)}, rounds, module.device)["draw"]
    return [b - a for a, b in zip(pair.a, pair.b, strict=True)]


def measure(policy: Policy, config: str, overrides: list[str], rounds: int) -> list[object]:
    """One policy's row of the table."""
    usual = policy.every_n_steps
    policy.warmup_steps, policy.every_n_steps = 1, UPDATE
    policy.smoothing = 0.5  # else what follows the data alone has arrived after one update
    num_steps = (rounds + 1) * UPDATE
    with tempfile.TemporaryDirectory() as folder, tqdm(total=num_steps, desc=type(policy).__name__, unit="step") as bar:
        settings = {"max_steps": num_steps, "logger": "CSVLogger", "limit_val_batches": 0}
        cli = from_config(config, overrides, settings, folder)
        model, data, trainer = parts(cli)
        steering = TimedSteering(policy, bar)
        cadence = cli.config.monitor
        trainer.callbacks.extend([OracleMonitor(EVERY, WINDOW, cadence.num_bins), steering])
        trainer.fit(model, datamodule=data)
        draw = draw_sec(model, data.batch_size, 200)
    found = {name: statistics.median(x) for name, x in steering.seconds.items()}
    each_window = cadence.every_n_steps * cadence.window
    share = found["idle"] + (found["window"] - found["idle"]) / each_window + found["update"] / usual
    return [
        type(policy).__name__,
        f"{100 * (share + statistics.median(draw)) / found['step']:.3f}",
        f"{1e3 * found['step']:.1f}",
        *(f"{1e3 * found[name]:.3f}" for name in ("idle", "window")),
        " ".join(
            (f"{1e3 * found['update']:.1f}", f"({spread([1e3 * x for x in steering.seconds['update']], '.1f')[1]})")
        ),
        f"{1e3 * statistics.median(draw):.3f}",
    ]


def main() -> None:
    made = parser(__doc__, rounds=12, of_what="updates of each policy")
    add_config_options(made)
    options, overrides = made.parse_known_args()
    torch.set_num_threads(options.threads or 1)
    policies: list[Policy] = [ShiftToBoundary(0.7), GapDensity(), StageWeights(0.7)]
    rows = [measure(policy, options.config, overrides, options.rounds) for policy in policies]
    print(f"\n{options.config}, {machine()}\n")
    head = ["policy", "share, %", "step, ms", "idle hook, ms", "window, ms", "update, ms", "draw, ms"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
