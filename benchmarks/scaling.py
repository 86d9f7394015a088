"""What does the oracle of a bank that is spread over two ranks add to a training step, under DDP and under FSDP2?

Starts two processes (gloo, one thread each) that train a DiT on Fashion-MNIST as configs/fashion_mnist_dit.yaml says,
with half of the bank on each. Within one run, blocks of --steps steps without the monitor (A) and with it (B)
alternate; each block ends when both ranks do, and ratios are taken within a pair. B measures every --every steps, twice
as often as a run does. What is logged once in 400 steps, a table and a figure of rank 0, is left out; it is a row of
monitor.py. A line by itself is for a measurement in each step, which nobody needs: there its cost stands out from the
noise.

Seconds are those of the wall: what one rank waits for the other counts. Other work on the machine counts too: the ratio
of a pair in which it came and went is wrong, and the medians are over --rounds pairs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from timing import Pairs, machine, parser, positive, spread, table
from tqdm import tqdm
from training_run import CONFIG, add_config_options, from_config, parts

from fm_stages.training import OracleMonitor

NUM_RANKS = 2
WARM_UP = 4
"""Steps before the first block: the first of them measures the stages."""

STRATEGIES = {"DDP": "strategy_ddp.yaml", "FSDP2": "strategy_fsdp.yaml"}
"""Files in configs/ that lie on top of the run's."""


class InTurn(OracleMonitor):
    """Is away for every other block of steps, and times both kinds; away first."""

    def __init__(self, steps: int, rounds: int, bar: tqdm, every: int, profile: str | None) -> None:
        super().__init__(every_n_steps=every, window=10**9, profile=profile)
        self.block, self.rounds, self.bar = steps, rounds, bar
        self.pairs = Pairs()
        self._stamp = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        block, place = divmod(trainer.global_step - WARM_UP - 1, self.block)
        if block < 0 or block % 2:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if place + 1 == self.block:
            dist.barrier()
            now = time.perf_counter()
            if block >= 0:
                (self.pairs.b if block % 2 else self.pairs.a).append(now - self._stamp)
                self.bar.update(block % 2)
            self._stamp = now
            trainer.should_stop = len(self.pairs.b) == self.rounds

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """No report: the table is printed."""


def measure(name: str, options: Any, overrides: list[str], every: int, folder: str) -> tuple[InTurn, int]:
    """Train under one strategy; the monitor, and the rows of the bank on this rank."""
    settings = {
        "max_steps": -1,
        "logger": "CSVLogger",
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "devices": NUM_RANKS,
    }
    overlay = str(CONFIG.parent / STRATEGIES[name])
    cli = from_config(
        options.config, ["--config", overlay, *overrides, "--data.init_args.shard_bank=true"], settings, folder
    )
    model, data, trainer = parts(cli)
    profile = Path(folder) / "profile.json"
    with tqdm(total=options.rounds, desc=f"{name}, every {every}", unit="pair", disable=dist.get_rank() > 0) as bar:
        known = str(profile) if profile.exists() else None
        dist.barrier()
        monitor = InTurn(options.steps, options.rounds, bar, every, known)
        trainer.callbacks.append(monitor)
        trainer.fit(model, datamodule=data)
    assert monitor.profile is not None
    if dist.get_rank() == 0:
        monitor.profile.save(profile)  # to measure the stages takes longer than all the rest
    dist.barrier()
    return monitor, data.bank().num_stored


def on_a_rank(options: Any, overrides: list[str]) -> None:
    """All strategies and cadences, in one process of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = []
    for name in STRATEGIES:
        for every in (options.every, 1):
            monitor, num_stored = measure(name, options, overrides, every, options.folder)
            pairs = monitor.pairs
            step = [1e3 * x / options.steps for x in pairs.a]
            rows.append([name, every, *spread(pairs.ratios, ".3f"), *spread(step, ".0f"), num_stored])
    if dist.get_rank() == 0:
        print(f"\n{NUM_RANKS} ranks, {options.rounds} pairs of blocks of {options.steps} steps; {machine()}\n")
        head = ["strategy", "measured every", "with the monitor / without", "min - max", "ms per step", "min - max"]
        print(table([*head, "rows on rank 0"], rows))


def main() -> None:
    made = parser(__doc__, rounds=5, of_what="pairs of blocks")
    made.add_argument("--steps", type=positive, default=25, help="of a block (default: 25)")
    made.add_argument("--every", type=positive, default=25, help="steps between measurements (default: 25)")
    made.add_argument("--folder", help="for what the runs write (default: a temporary one)")
    add_config_options(made)
    options, overrides = made.parse_known_args()
    if "RANK" in os.environ:
        on_a_rank(options, overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = ["--folder", folder, *sys.argv[1:]]
        raise SystemExit(subprocess.run([*start, __file__, *arguments], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
