"""How much does Lightning add to a training step, over a bare PyTorch loop that does the same work?

Both train the network of configs/fashion_mnist_dit.yaml from the same weights on the same batches, with the same times,
noise and label dropout, AdamW, warm-up, gradient clipping and average of the weights. The Trainer has no monitor,
samples, logger, checkpoints or progress bar. Within one `Trainer.fit`, a callback lets a block of --steps steps pass,
measured from the end of a step to the end of a step, then runs as many steps of the bare loop itself, and so on: set-up
counts on neither side, nor do the first steps. Ratios are taken between neighbouring blocks.

That both do the same work is seen from the losses and the final averaged weights: the largest differences are printed,
and more than rounding stops the benchmark.

The second line is the same with a network so small that a step takes milliseconds: there what Lightning adds stands out
from the noise of a step.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from timing import Pairs, clock, machine, parser, positive, spread, table
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm
from training_run import add_config_options, from_config, parts

from fm_stages.data import TrainingData
from fm_stages.flow import keyed_normal, keyed_uniform, stratified_uniform
from fm_stages.training import FlowMatching

SMALL = ["--model.network.init_args.hidden_size=16", "--model.network.init_args.patch_size=14"]
SMALL += ["--model.network.init_args.depth=1", "--data.init_args.batch_size=16"]
WARM_UP = 5
"""Steps of each loop that come before the first block."""

TOLERANCE = {"cpu": 1e-6, "cuda": 1e-3}
"""Largest difference of losses and of averaged weights that rounding may make: none is seen on a CPU, while a GPU adds
gradients in any order."""


class BareLoop:
    """The training of `FlowMatching`, written down as a plain PyTorch loop.

    Args:
        module: its network, settings and optimizer are taken, and copied.
        data: the batches, in the order of `EpochSampler`.
        clip: largest norm of the gradient.
    """

    def __init__(self, module: FlowMatching, data: TrainingData, clip: float) -> None:
        self.settings, self.clip = module, clip
        self.network = copy.deepcopy(module.network).train()
        self.average = copy.deepcopy(module.network_ema)
        self.optimizer = module.make_optimizer(p for p in self.network.parameters() if p.requires_grad)
        start = 1 / (module.warmup_steps + 1)
        self.scheduler = LinearLR(self.optimizer, start_factor=start, total_iters=module.warmup_steps)
        self.batches = self._batches(data)
        self.step = 0
        self.losses: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        """Move the weights; the optimizer has no state yet."""
        self.device = device
        self.network.to(device)
        self.average.to(device)

    def run(self, num_steps: int) -> None:
        """Train."""
        for _ in range(num_steps):
            loss = self._loss(next(self.batches))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
            self.optimizer.step()
            decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                weights = list(self.average.parameters()), list(self.network.parameters())
                get_ema_multi_avg_fn(decay)(*weights, None)
            self.scheduler.step()
            self.losses.append(loss.detach())
            self.step += 1

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        settings, step, position = self.settings, self.step, batch["position"]
        x1, labels = batch["x1"].to(self.device), batch["labels"].to(self.device)
        u = stratified_uniform(("t", settings.seed, step), position, len(x1)).to(self.device)
        t = settings.timesteps.icdf(u).clamp(max=settings.path.max_time)
        x0 = keyed_normal(("noise", settings.seed, step), position, tuple(x1.shape[1:]), device=self.device)
        kept = keyed_uniform(("labels", settings.seed, step), position).to(self.device) >= settings.label_dropout
        labels = torch.where(kept, labels, -1)
        prediction = self.network(settings.path.interpolate(x0, x1, t), t, labels).float()
        target = settings.path.velocity(x0, x1, t)
        return (settings.weighting(t) * (prediction - target).square().flatten(1).mean(1)).mean()

    @staticmethod
    def _batches(data: TrainingData) -> Iterator[dict[str, Tensor]]:
        loader: Any = data.train_dataloader()
        epoch = 0
        while True:
            loader.sampler.set_epoch(epoch)
            yield from loader
            epoch += 1


class Alternate(L.Callback):
    """Lets a block of the Trainer's steps pass, then runs a block of the bare loop, and times both."""

    def __init__(self, bare: BareLoop, steps: int, bar: tqdm) -> None:
        self.bare, self.steps, self.bar = bare, steps, bar
        self.pairs = Pairs()  # A the bare loop, B Lightning
        self.losses: list[Tensor] = []
        self._stamp = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bare.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        step = trainer.global_step
        if step == WARM_UP:
            self.bare.run(WARM_UP)
        elif step > WARM_UP and (step - WARM_UP) % self.steps == 0:
            start = clock(pl_module.device)
            self.bare.run(self.steps)
            self.pairs.b.append(start - self._stamp)
            self.pairs.a.append(clock(pl_module.device) - start)
            self.bar.update()
        else:
            return
        self._stamp = clock(pl_module.device)


def compare(config: str, overrides: list[str], steps: int, rounds: int, name: str) -> tuple[list[str], str]:
    """A row of the table, and by how much losses and averages differ, in words.

    Raises:
        SystemExit: if they differ by more than rounding.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": WARM_UP + rounds * steps, "logger": "false", "limit_val_batches": 0}
        cli = from_config(config, overrides, settings, folder)
        module, data, trainer = parts(cli)
        _refuse_other_work(module, trainer)
        # a data module without a Trainer; the images are shared
        bare = BareLoop(module, copy.copy(data), trainer.gradient_clip_val)
        with tqdm(total=rounds, desc=name, unit="round") as bar:
            callback = Alternate(bare, steps, bar)
            trainer.callbacks.append(callback)
            trainer.fit(module, datamodule=data)

    loss = (torch.stack(callback.losses) - torch.stack(bare.losses)).abs().max().item()
    weights = zip(module.network_ema.to(bare.device).parameters(), bare.average.parameters(), strict=True)
    average = max((a - b).abs().max().item() for a, b in weights)
    said = f"{name}: {len(bare.losses)} losses differ by up to {loss:.1e}, averaged weights by up to {average:.1e}."
    if not max(loss, average) <= TOLERANCE[bare.device.type]:
        raise SystemExit(f"The two loops do not do the same work. {said}")
    pairs = callback.pairs
    added = [1e3 * (b - a) / steps for a, b in zip(pairs.a, pairs.b, strict=True)]
    bare_ms = 1e3 * statistics.median(pairs.a) / steps
    return [name, f"{bare_ms:.1f}", *spread(pairs.ratios, ".3f"), *spread(added)], f"{said} {machine(bare.device)}"


def _refuse_other_work(module: FlowMatching, trainer: L.Trainer) -> None:
    """The bare loop knows the settings of the shipped configuration and no others."""
    plain = module.network_ema is not None and module.warmup_steps and trainer.gradient_clip_val
    if not plain or trainer.accumulate_grad_batches > 1 or trainer.world_size > 1 or module.target.needs_oracle:
        raise SystemExit(
            "The bare loop has an average of the weights, warm-up, clipping and the conditional target, on one device "
            "and without accumulation: leave these settings as they are."
        )


def main() -> None:
    made = parser(__doc__, rounds=12, of_what="pairs of blocks")
    made.add_argument("--steps", type=positive, default=20, help="steps of a block (default: 20)")
    add_config_options(made)
    options, overrides = made.parse_known_args()
    rows, notes = [], []
    for name, more, rounds in (("as configured", [], 1), ("a tiny network", SMALL, 2)):
        row, note = compare(options.config, [*overrides, *more], options.steps, rounds * options.rounds, name)
        rows.append(row)
        notes.append(note)
    sys.stderr.flush()
    print(f"{options.config}, {options.rounds} rounds of {options.steps} steps (tiny: twice as many)")
    print("\n".join(notes) + "\n")
    header = ["network", "bare step, ms", "Lightning / bare, median", "min - max", "added per step, ms", "min - max"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
