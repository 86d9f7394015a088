"""What share of training time does OracleMonitor cost at the cadence of configs/fashion_mnist_dit.yaml?

Training time is that of the steps: no validation, samples, checkpoints or progress bar. Set-up (bank, stages, Wiener
reference) happens once in a run and is printed by itself, as is what the monitor adds to a validation.

Without --full, parts are measured in one run in which the monitor measures every third step and logs every fourth
measurement, so that each window has clean steps, measurements and a logging (scalars to a CSV file, table, figure)
beside each other, and all ratios are taken within a window:

    share = (window * measurement + logging) / (every_n_steps * window * step)

This is additional time over the time of training without the monitor. What a measurement does to the step after it,
through the caches, is a row of its own. oracle/share, which the monitor logs itself, stands beside what the parts say
at the benchmark's cadence.

With --full, blocks of every_n_steps * window steps without and with the monitor alternate within one run, each with all
its measurements and one logging; the share is B / A - 1. That takes minutes for each pair of blocks.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from timing import Pairs, clock, machine, parser, spread, table
from tqdm import tqdm
from training_run import add_config_options, from_config, parts

from fm_stages.training import OracleMonitor

EVERY, WINDOW = 3, 4
"""Cadence of the short run: the step after a measurement, a clean step, a measured step; four of these a window."""

WARM_UP = 12
"""Steps of the long run before the first block; a window is logged among them, because the first figure is slow."""


class TimedMonitor(OracleMonitor):
    """Times its own hooks, by name, and the steps between them."""

    def __init__(self, bar: tqdm, **settings: Any) -> None:
        super().__init__(**settings)
        self.bar = bar
        self.setup_sec: dict[str, float] = {}
        self.held_out_sec = 0.0
        self.timed: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._stamp: float | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.setup_sec["bank"] = self._timed(pl_module, super().setup, trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.setup_sec["stages and Wiener"] = self._timed(pl_module, super().on_train_start, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before = clock(pl_module.device)
        logged = self.train
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now = clock(pl_module.device)
        if self._stamp is None:
            self.setup_sec["checks of the first batch"] = now - before
        else:
            window, place = divmod(trainer.global_step - 1, self.every_n_steps * self.window)
            seen = self.timed[window]
            if self.train is not logged:
                seen["logged"].append(now - before)
            elif (place + 1) % self.every_n_steps == 0:
                seen["measured"].append(now - before)
            elif place % self.every_n_steps:
                seen["step"].append(now - self._stamp)
            elif place:  # place 0 comes after a figure, not after a mere measurement
                seen["after"].append(now - self._stamp)
        self._stamp = now
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No report: the table is printed."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.held_out_sec += self._timed(pl_module, super().on_validation_start, trainer, pl_module)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *rest: Any) -> None:
        self.held_out_sec += self._timed(pl_module, super().on_validation_batch_end, trainer, pl_module, *rest)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.held_out_sec += self._timed(pl_module, super().on_validation_epoch_end, trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.held_out_sec += self._timed(pl_module, super().on_validation_end, trainer, pl_module)

    def _timed(self, pl_module: L.LightningModule, hook: Callable[..., None], *args: Any) -> float:
        start = clock(pl_module.device)
        hook(*args)
        return clock(pl_module.device) - start


class AlternatingMonitor(OracleMonitor):
    """Is away for every other window of steps, and times windows of both kinds; away first."""

    def __init__(self, bar: tqdm, rounds: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.bar, self.rounds = bar, rounds
        self.pairs = Pairs()
        self.block = self.every_n_steps * self.window
        self._cadence = self.every_n_steps, self.window
        self._stamp = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        block, place = divmod(step - WARM_UP - 1, self.block)
        # the warm-up measures twice and logs
        self.every_n_steps, self.window = self._cadence if block >= 0 else (WARM_UP // 2, 2)
        if block < 0 or block % 2:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if place + 1 == self.block:
            now = clock(pl_module.device)
            if block >= 0:
                (self.pairs.b if block % 2 else self.pairs.a).append(now - self._stamp)
            self._stamp = now
            trainer.should_stop = len(self.pairs.b) == self.rounds
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No report: the table is printed."""


def short(config: str, overrides: list[str], rounds: int) -> None:
    """Parts of the cost, and the share computed from them."""
    num_steps = (rounds + 1) * EVERY * WINDOW  # the first window warms up
    with tempfile.TemporaryDirectory() as folder, tqdm(total=num_steps, desc="training", unit="step") as bar:
        settings = {"max_steps": num_steps, "logger": "CSVLogger", "val_check_interval": num_steps}
        cli = from_config(config, overrides, settings, folder)
        model, data, trainer = parts(cli)
        cadence = cli.config.monitor
        settings = {"num_bins": cadence.num_bins, "num_probe": cadence.num_probe}
        monitor = TimedMonitor(bar, every_n_steps=EVERY, window=WINDOW, **settings)
        trainer.callbacks.append(monitor)
        trainer.fit(model, datamodule=data)
        logged = _logged_shares(Path(folder))
        device, num_val = model.device, trainer.num_val_batches[0]

    every, window = cadence.every_n_steps, cadence.window
    num_warm = monitor.timed.pop(0)
    medians = [{name: statistics.median(x) for name, x in w.items()} for w in monitor.timed.values()]
    step = [m["step"] for m in medians]
    measurement = [m["measured"] / m["step"] for m in medians]
    logging = [(m["logged"] - m["measured"]) / m["step"] for m in medians]
    both = list(zip(measurement, logging, strict=True))
    share = [100 * (window * m + log) / (every * window) for m, log in both]
    # the monitor counts a logging for the window that it delays, in which its time has not passed
    delayed = zip(measurement[1:], logging[:-1], strict=True)
    own = [100 * (WINDOW * m + log) / (EVERY * WINDOW + WINDOW * m) for m, log in delayed]
    after = [100 * (m["after"] / m["step"] - 1) for m in medians]
    median_step = statistics.median(step)

    print(f"{config}, batch {data.batch_size}, {len(medians)} windows; {machine(device)}\n")
    print(
        table(
            ["what", "median", "min - max over windows"],
            [
                [f"share of training time, every {every} steps, window {window}, %", *spread(share)],
                ["a training step, ms", *spread([1e3 * x for x in step], ".1f")],
                ["one measurement, in steps", *spread(measurement, ".3f")],
                ["logging of a window, in steps", *spread(logging, ".3f")],
                ["the step after a measurement takes longer by, %", *spread(after, ".1f")],
                [f"oracle/share as logged, every {EVERY} steps, window {WINDOW}, %", *spread(logged[2:])],
                ["the same from the parts, %", *spread(own)],
            ],
        )
    )
    held_out = monitor.held_out_sec / median_step
    print(f"\nOnce in a run: {', '.join(f'{name} {sec:.1f} s' for name, sec in monitor.setup_sec.items())}", end="")
    print(f", first window's logging {num_warm['logged'][0]:.1f} s.")
    probe = f" and its probe of {sum(monitor.probe[''].count)} training images" if monitor.probe else ""
    print(f"A validation of {num_val} batches takes {held_out:.1f} steps longer with the monitor{probe}", end="")
    print(f": {100 * held_out / 1000:.2f} % of training time where there is one in 1000 steps.")


def _logged_shares(folder: Path) -> list[float]:
    """oracle/share of each window, in per cent, from the CSV file of the run."""
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [100 * float(row["oracle/share"]) for row in csv.DictReader(lines) if row.get("oracle/share")]


def full(config: str, overrides: list[str], rounds: int) -> None:
    """Whole windows without and with the monitor, in turn."""
    with tempfile.TemporaryDirectory() as folder, tqdm(desc="training", unit="step") as bar:
        settings = {"max_steps": -1, "logger": "CSVLogger", "limit_val_batches": 0}
        cli = from_config(config, overrides, settings, folder)
        model, data, trainer = parts(cli)
        cadence = cli.config.monitor
        monitor = AlternatingMonitor(
            bar, rounds, every_n_steps=cadence.every_n_steps, window=cadence.window, num_bins=cadence.num_bins
        )
        bar.total = WARM_UP + 2 * rounds * monitor.block
        trainer.callbacks.append(monitor)
        trainer.fit(model, datamodule=data)
        device = model.device

    pairs = monitor.pairs
    print(f"{config}, batch {data.batch_size}, {rounds} rounds; {machine(device)}\n")
    steps = [[1e3 * x / monitor.block for x in each] for each in (pairs.a, pairs.b)]
    cadence_text = f"every {cadence.every_n_steps} steps, window {cadence.window}"
    print(
        table(
            ["what", "median", "min - max"],
            [
                [f"share of training time, {cadence_text}, %", *spread([100 * (r - 1) for r in pairs.ratios])],
                ["a step without the monitor, ms", *spread(steps[0], ".1f")],
                ["a step with the monitor, ms", *spread(steps[1], ".1f")],
            ],
        )
    )


def main() -> None:
    made = parser(__doc__, rounds=12, of_what="windows, or with --full pairs of blocks, and then default 3")
    made.set_defaults(rounds=None)
    made.add_argument("--full", action="store_true", help="alternate whole windows: minutes for each round")
    add_config_options(made)
    options, overrides = made.parse_known_args()
    if options.full:
        full(options.config, overrides, options.rounds or 3)
    else:
        short(options.config, overrides, options.rounds or 12)


if __name__ == "__main__":
    main()
