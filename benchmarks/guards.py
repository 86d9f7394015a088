"""What do the guards add to a training step?

Blocks of steps without and with `Guards` alternate within one run (A B A B ...): the share is B / A - 1. A clean step
is what is measured: gradient norm, two numbers on the host, medians of two windows. That is far below the noise of
whole blocks on a shared machine. So what the guards run is timed by itself as well, and is the number to read: their
hooks and the clipping of gradients in B, which is spared the norm, less the clipping in A.

--network S takes a DiT-S/2 (33 M weights) on 4x32x32 noise instead of the configuration's network.
"""

from __future__ import annotations

import tempfile
from typing import Any

import lightning as L
import torch
from timing import Pairs, clock, machine, parser, spread, table
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from training_run import add_config_options, from_config, parts

from fm_stages.networks import DiT
from fm_stages.training import FlowMatching, Guards

WARM_UP = 30
"""Steps before the first block: the windows are then full enough to be asked."""


class AlternatingGuards(Guards):
    """On in every other block of steps, off first; times blocks and, where it is on, itself."""

    def __init__(self, bar: tqdm, rounds: int, block: int, timed: bool) -> None:
        super().__init__()
        self.bar, self.rounds, self.block, self.timed = bar, rounds, block, timed
        self.pairs = Pairs()
        self.own_sec: list[float] = []
        self.clip_sec: list[float] = []
        self._own = self._clip = self._stamp = 0.0

    def time_clipping(self, module: FlowMatching) -> None:
        """Time the clipping in blocks of both kinds: the guards spare it the norm."""
        clip = module.configure_gradient_clipping

        def timed(*args: Any, **kwargs: Any) -> None:
            start = clock(module.device)
            clip(*args, **kwargs)
            self._clip += clock(module.device) - start

        module.configure_gradient_clipping = timed  # type: ignore[method-assign]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        start = clock(pl_module.device) if self.timed else 0.0
        super().on_before_backward(trainer, pl_module, loss)
        self._own += clock(pl_module.device) - start if self.timed else 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        start = clock(pl_module.device) if self.timed else 0.0
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self._own += clock(pl_module.device) - start if self.timed else 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.bar.update()
        block, place = divmod(trainer.global_step - WARM_UP, self.block)
        if place:
            return
        now = clock(pl_module.device)
        if block > 0:
            (self.pairs.a if block % 2 else self.pairs.b).append(now - self._stamp)
            if block % 2:
                self.clip_sec.append(self._clip)
            else:
                self.own_sec.append(self._own + self._clip)
        self.nonfinite, self.spike = ("skip", "record") if block % 2 else ("off", "off")
        self._stamp, self._own, self._clip = now, 0.0, 0.0
        trainer.should_stop = len(self.pairs.b) == self.rounds


class Noise(torch.utils.data.Dataset):
    """Batches as of latents of ImageNet at 256 x 256."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x1": torch.randn(self.batch_size, 4, 32, 32), "labels": torch.full((self.batch_size,), i % 1000)}


def measure(options: Any, overrides: list[str]) -> tuple[AlternatingGuards, torch.device, str]:
    with tempfile.TemporaryDirectory() as folder, tqdm(unit="step", mininterval=20) as bar:
        bar.total = WARM_UP + 2 * options.rounds * options.block
        guards = AlternatingGuards(bar, options.rounds, options.block, not options.whole)
        settings: dict[str, Any] = {"max_steps": -1, "logger": "false", "limit_val_batches": 0}
        cli = from_config(options.config, overrides, settings, folder)
        model, data, trainer = parts(cli)
        trainer.callbacks.append(guards)
        guards.time_clipping(model)
        if options.network == "S":
            network: nn.Module = DiT(32, 2, 4, 384, 12, 6, 1000)
            model = FlowMatching(network)
            guards.time_clipping(model)
            trainer.fit(model, torch.utils.data.DataLoader(Noise(options.batch_size), batch_size=None))
            return guards, model.device, f"DiT-S/2, batch {options.batch_size}"
        trainer.fit(model, datamodule=data)
        return guards, model.device, f"{options.config}, batch {data.batch_size}"


def main() -> None:
    made = parser(__doc__, rounds=10, of_what="pairs of blocks")
    made.add_argument("--block", type=int, default=20, help="steps of a block (default: 20)")
    made.add_argument("--network", choices=["config", "S"], default="config", help="whose (default: config)")
    made.add_argument("--batch_size", type=int, default=4, help="of --network S (default: 4)")
    made.add_argument("--whole", action="store_true", help="do not time the hooks: only whole blocks")
    add_config_options(made)
    options, overrides = made.parse_known_args()
    guards, device, what = measure(options, overrides)
    pairs, block = guards.pairs, options.block
    more_sec = [b - a for a, b in zip(guards.clip_sec, guards.own_sec, strict=True)]
    own = [100 * x / a for x, a in zip(more_sec, pairs.a, strict=True)]
    print(f"\n{what}; {options.rounds} rounds of {block} steps; {machine(device)}\n")
    rows = [
        ["share of a step, whole blocks, %", *spread([100 * (r - 1) for r in pairs.ratios])],
        ["a step without guards, ms", *spread([1e3 * x / block for x in pairs.a], ".1f")],
    ]
    if not options.whole:
        rows += [
            ["share of a step, the hooks themselves, %", *spread(own, ".3f")],
            ["the hooks of a step, ms", *spread([1e3 * x / block for x in more_sec], ".3f")],
        ]
    print(table(["what", "median", "min - max"], rows))


if __name__ == "__main__":
    main()
