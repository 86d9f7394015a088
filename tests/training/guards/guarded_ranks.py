"""Started on two ranks by test_guards.py: NaN on rank 1 alone, under each policy, DDP and FSDP2.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 guarded_ranks.py FOLDER
"""

import json
import math
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from fm_stages.data import Digits
from fm_stages.networks import DiT
from fm_stages.training import Checkpoints, FlowMatching, FSDP2Strategy, Guards, GuardStop, fit_with_rewinds
from fm_stages.training.guards import callback as guards_module

RANK, STEPS, AT = int(os.environ["RANK"]), 5, 3
STRATEGIES = {"ddp": lambda: "ddp", "fsdp": FSDP2Strategy}


class Spoil(L.Callback):
    """NaN in the first of a step's two micro-batches, on rank 1, once."""

    def __init__(self) -> None:
        self.done = False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == AT and RANK == 1 and not self.done:
            self.done = True
            batch["x1"].fill_(math.nan)


class LeaveOut(L.Callback):
    """The reference: the same step thrown away by hand."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == AT:
            self.average = [p.detach().clone() for p in pl_module.network_ema.parameters()]
            optimizer.zero_grad()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step == AT + 1:
            with torch.no_grad():
                for p, kept in zip(pl_module.network_ema.parameters(), self.average, strict=True):
                    p.copy_(kept)


class Whole(L.Callback):
    """Weights and average at the end, gathered."""

    def on_train_end(self, trainer, pl_module) -> None:
        state = pl_module.state_dict().items()
        self.weights = {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in state}


def fit(folder: Path, strategy: str, *callbacks: L.Callback, ckpt_path: Path | None = None, steps: int = STEPS) -> dict:
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 1, 2, 10)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    module = FlowMatching(network, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3), ema_decay=0.9)
    whole = Whole()
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=STRATEGIES[strategy](),
        devices=2,
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, whole, Checkpoints(monitor=None, every_n_train_steps=2)],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit_with_rewinds(trainer, model=module, datamodule=Digits(batch_size=64), ckpt_path=ckpt_path)
    return whole.weights


class Unreadable(L.Callback):
    """A state that no file can hold, on rank 0 alone."""

    def state_dict(self) -> dict:
        return {"file": Path("x") if RANK == 0 else ""}


def fail(*args: object) -> None:
    raise RuntimeError(f"planted on rank {RANK}")


def errors(folder: Path) -> dict[str, str]:
    """What this rank says of what fails on rank 0."""
    said = {}
    for name, callbacks in {
        "find_good": (Guards(nonfinite="rewind"), Spoil()),
        "write_rewound": (Guards(nonfinite="rewind"), Spoil()),
        "a state": (Unreadable(),),
    }.items():
        with patch.object(guards_module, name, fail) if callbacks[1:] else nullcontext():
            try:
                fit(folder / name, "ddp", *callbacks)
            except ValueError as error:
                said[name] = str(error)
    return said


def runs(folder: Path, strategy: str) -> dict:
    """Every policy, beside what it should give."""
    seen = {"plain": fit(folder / "plain", strategy)}
    guards = {name: Guards(nonfinite=name) for name in ("skip", "rewind", "stop")}
    quiet = Guards(nonfinite="rewind", spike="skip")
    seen["quiet"] = fit(folder / "quiet", strategy, quiet)
    seen["numbers"] = quiet.state_dict()["windows"]
    seen["skip"] = fit(folder / "skip", strategy, guards["skip"], Spoil())
    seen["by hand"] = fit(folder / "by hand", strategy, Spoil(), LeaveOut())
    seen["rewind"] = fit(folder / "rewind", strategy, guards["rewind"], Spoil())
    fit(folder / "before", strategy, steps=2)
    moved = folder / "moved.ckpt"
    if RANK == 0:
        checkpoint = torch.load(folder / "before/checkpoints/last.ckpt", weights_only=True)
        checkpoint["Digits"]["samples"] = 4 * 64
        torch.save(checkpoint, moved)
    torch.distributed.barrier()
    seen["moved"] = fit(folder / "moved", strategy, ckpt_path=moved)
    try:
        fit(folder / "stop", strategy, guards["stop"], Spoil())
    except GuardStop as stop:
        seen["status"] = stop.code
    seen["events"] = {name: each.events for name, each in guards.items()}
    torch.distributed.barrier()
    record = folder / "skip/flight/step_0000003"
    parts = json.loads((record / "record.json").read_text())["parts"]
    seen["bad"] = [(part["rank"], part["micro_batch"]) for part in parts if part["non_finite_rows"]["error"]]
    seen["files"] = sorted(path.name for path in record.iterdir())
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seen = {name: runs(Path(sys.argv[1]) / name, name) for name in STRATEGIES}
    torch.save({**seen, "errors": errors(Path(sys.argv[1]) / "errors")}, f"rank{RANK}.pt")
