"""The monitor's figures, and the tables beside them: drawn while training goes on, without holding it up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fm_stages import plots
from fm_stages.oracle import Curves
from fm_stages.training.logs.loggers import is_trial, log_figure, log_table
from fm_stages.training.monitor.generalisation import best_validation, losses_over_steps, stages_of
from fm_stages.training.monitor.history import History

if TYPE_CHECKING:
    from fm_stages.training.monitor.callback import OracleMonitor

SHARE = 0.01
"""Of a run's time that drawing may take, apart from the first and the last time."""

WEIGHTS = {"": "raw", "_ema": "EMA"}


class Figures:
    """Draws all that is new, all together, no sooner again than `SHARE` allows."""

    def __init__(self) -> None:
        self._not_before = 0.0
        self._drawn: tuple[int, int] | None = None

    @rank_zero_only
    def draw(self, trainer: L.Trainer, monitor: OracleMonitor, now: bool = False) -> None:
        """Draw, if it is time or has to be ``now``, and there is something new; to the run's folder and to wandb."""
        start, newest = time.monotonic(), (monitor.logged_step, monitor.validated_step)
        if (
            monitor.profile is None
            or is_trial(trainer)
            or newest == self._drawn
            or not (now or start >= self._not_before)
        ):
            return
        self._drawn = newest
        boundary = monitor.profile.boundary
        if monitor.train is not None:
            _gap_by_t(trainer, monitor, monitor.train, boundary)
        for suffix, curves in monitor.held_out.items():
            log_table(trainer, f"oracle_val/gap_by_t{suffix}", curves.table(), monitor.validated_step)
        if len(monitor.windows.steps) > 1:
            _gap_over_steps(trainer, monitor.windows, boundary)
        if len(monitor.validations.steps) > 1:
            _regular_loss(trainer, monitor.validations, boundary)
        end = time.monotonic()
        self._not_before = end + (end - start) / SHARE


def _gap_by_t(trainer: L.Trainer, monitor: OracleMonitor, train: Curves, boundary: float) -> None:
    """The newest window, beside the newest validation."""
    held_out, step = monitor.held_out.get(""), monitor.logged_step
    figure = plots.gap_by_t(
        train.edges, train.mean, train.sem, boundary, held_out.mean if held_out else None, f"step {step}, raw weights"
    )
    columns, rows = train.table()
    if held_out is not None:
        columns = [*columns, "held_out_regular", "held_out_gap"]
        more = zip(held_out.mean["regular"], held_out.mean["gap"], strict=True)
        rows = [[*row, *values] for row, values in zip(rows, more, strict=True)]
    log_figure(trainer, "oracle/gap_by_t", figure, (columns, rows), step)
    log_table(trainer, "oracle/gap_by_t", train.table(), step)


def _gap_over_steps(trainer: L.Trainer, windows: History, boundary: float) -> None:
    title = "gap to the oracle velocity on training images, raw weights"
    figure = plots.gap_over_steps(windows.steps, windows.edges, windows.by_t("train"), boundary, title)
    log_figure(trainer, "oracle/gap_over_steps", figure, windows.table(), windows.steps[-1])


def _regular_loss(trainer: L.Trainer, validations: History, boundary: float) -> None:
    """The memorization panel: training and held-out regular loss by stage, and by t."""
    steps, series = validations.steps, validations.series
    stages = {
        stage: {name: validations.average(name, lo, hi) for name in series}
        for stage, (lo, hi) in stages_of(boundary).items()
    }
    found = {suffix: best_validation(validations, suffix, boundary) for suffix in WEIGHTS}
    best = {suffix: place for suffix, place in found.items() if place is not None}
    title = "training and held-out images under the same noise (bands: 2 standard errors)"
    figure = plots.regular_by_stage(steps, stages, best, title)
    log_figure(trainer, "memorization/regular_by_stage", figure, losses_over_steps(validations, boundary), steps[-1])
    both = {
        name: (validations.by_t(train), validations.by_t(held_out), validations.error_between(train, held_out))
        for suffix, name in WEIGHTS.items()
        if {train := f"train{suffix}", held_out := f"held_out{suffix}"} <= set(series)
    }
    if both:
        figure = plots.regular_over_steps(steps, validations.edges, both, boundary)
        log_figure(trainer, "memorization/regular_by_t", figure, validations.table(), steps[-1])
