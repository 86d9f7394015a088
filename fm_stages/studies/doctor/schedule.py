"""The doctor on a run's steps: warm-up, when something is measured and saved, and which weights will be sampled."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fm_stages.studies.doctor.lines import Line, judged
from fm_stages.studies.doctor.run import PlannedRun
from fm_stages.training import Checkpoints, OracleMonitor, ramped_decay

LONG_WARMUP = 0.25
"""Share of a run."""

SHORT = 10.0
"""Steps over which an average is hardly one."""


def check_schedule(run: PlannedRun) -> Iterator[Line]:
    """All of it."""
    module, steps = run.module, run.max_steps
    optimizer = module.make_optimizer(p for p in module.network.parameters() if p.requires_grad)
    yield check_learning_rate(optimizer.param_groups[0]["lr"], type(optimizer).__name__, module.warmup_steps, steps)
    yield check_weights(module.ema_decay, steps)
    yield check_intervals(run)


def check_learning_rate(rate: float, optimizer: str, warmup: int, steps: float) -> Line:
    """Warm-up against the length of the run."""
    return judged(
        "learning rate",
        f"{rate:g} ({optimizer}), reached after {warmup} steps of warm-up; the run has {steps:g}",
        ("red", not rate > 0, "Nothing is learned at this rate: set model.optimizer.init_args.lr."),
        ("red", warmup >= steps, "The learning rate never reaches its value: lower --model.warmup_steps."),
        ("yellow", math.isinf(steps), "Nothing ends this run: give --trainer.max_steps."),
        ("yellow", LONG_WARMUP * steps < warmup < steps, "Much of the run warms up: lower --model.warmup_steps."),
    )


def check_weights(decay: float, steps: float) -> Line:
    """Which weights `fm-stages sample` and `evaluate` take, and how much of the run they average."""
    if decay == 0:
        remedy = "Samples of averaged weights are usually better, and cost one copy of the network: 0.999 averages "
        remedy += "1000 steps (--model.ema_decay)."
        return Line("sampled weights", "yellow", "raw: no average is kept (ema_decay 0)", remedy)
    full = math.inf if decay == 1 else 1 / (1 - decay)
    end = full if math.isinf(steps) else 1 / (1 - ramped_decay(decay, int(steps)))
    lower = "" if end > 0.99 * full else f", which begins lower: {end:,.0f} steps at the end of this run"
    return judged(
        "sampled weights",
        f"EMA, decay {decay:g}: the average looks back over some {full:,.0f} steps{lower}",
        ("yellow", end < SHORT, "That is hardly an average: raise --model.ema_decay (0.999 for short runs)."),
    )


def first_validation(run: PlannedRun) -> float:
    """The optimizer step of the first validation; infinite if there is none."""
    trainer = run.trainer
    every, epochs = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if trainer.limit_val_batches == 0:
        return math.inf
    if isinstance(every, int):
        if epochs is not None and every // run.accumulation > run.steps_per_epoch:
            return math.inf
        return every / run.accumulation  # Lightning counts micro-batches
    return max(1, int(every * run.steps_per_epoch)) * (epochs or 1)


def check_intervals(run: PlannedRun) -> Line:
    """Whether anything is measured, and saved, before the run ends."""
    steps, validated = run.max_steps, first_validation(run)
    checkpoints, monitor = run.callback(Checkpoints), run.callback(OracleMonitor)
    own = getattr(checkpoints, "_every_n_train_steps", 0)
    saved = math.inf if checkpoints is None else own or validated
    logged = monitor.every_n_steps * monitor.window if monitor else math.inf
    plan = {"oracle curves": logged, "held-out images": validated, "a checkpoint": saved}
    when = ", ".join(f"{name} {'never' if math.isinf(at) else f'from step {at:g}'}" for name, at in plan.items())
    return judged(
        "intervals",
        f"{when}; the run has {steps:g} steps",
        ("red", checkpoints is None, "Nothing is saved, the run is lost when it ends: leave enable_checkpointing on."),
        ("red", saved > steps and validated > steps, "Nothing is measured on held-out images, nothing is saved before "
         "the end: a run that is killed is lost. Lower --trainer.val_check_interval."),
        ("yellow", saved > steps, "Nothing is saved before the end: --checkpoints.every_n_train_steps."),
        ("yellow", validated > steps, "Held-out images are never measured: --trainer.val_check_interval."),
        ("yellow", logged > steps, "No oracle curve is finished: lower --monitor.every_n_steps or --monitor.window."),
    )  # fmt: skip
