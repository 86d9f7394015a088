"""Started on two ranks by test_resumed_ranks.py: runs that are stopped and go on, on as many ranks and on others.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 resumed_ranks.py FOLDER
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.distributed as dist

from fm_stages import plots
from fm_stages.data import Digits
from fm_stages.networks import DiT
from fm_stages.training import (
    Checkpoints,
    Continuity,
    FlowMatching,
    FSDP2Strategy,
    GapDensity,
    Guards,
    MetricsTable,
    OracleMonitor,
    StageAware,
    Throughput,
)
from fm_stages.training.checkpoints.callback import NotSaved
from fm_stages.training.checkpoints.files import WholeFiles
from fm_stages.training.checkpoints.verify_resume import Trial, verify_resume

BATCH, STEPS, CUT, STOP = 48, 12, 5, 7
"""Images and number of steps; the checkpoint that is gone on from, and where the run that wrote it was stopped."""

STRATEGIES = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}


class Stopped(Exception):
    pass


class Recorder(L.Callback):
    """What this rank drew at each step, by its place in the global batch; ends the run at a step."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.drawn: dict[int, dict[int, torch.Tensor]] = {}
        self.times: dict[int, dict[int, float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step + trainer.fit_loop.epoch_loop._should_accumulate()
        drawn = [
            outputs["x0"].flatten(1),
            outputs["x1"].flatten(1),
            *(outputs[x][:, None] for x in ("labels", "index")),
        ]
        self.drawn.setdefault(step, {}).update(zip(batch["position"].tolist(), torch.cat(drawn, 1), strict=True))
        self.times.setdefault(step, {}).update(zip(batch["position"].tolist(), outputs["t"].tolist(), strict=True))

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.stop:
            raise Stopped


class Forgetful(L.Callback):
    """Loses on one rank what it counted."""

    count = 0

    def on_train_batch_end(self, trainer, *_) -> None:
        self.count += trainer.global_rank

    def state_dict(self) -> dict:
        return {"count": self.count}


class FullDisk(WholeFiles):
    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        raise OSError(28, os.strerror(28), str(path))


def build(
    folder: Path, strategy: Any, devices: int, *callbacks: L.Callback, micro: int | None = 12, **trainer: Any
) -> Trial:
    """Windows of 3 measurements, which are of each rank's last micro-batch, and validation each 4 steps."""
    warnings.filterwarnings("ignore", ".*does not have many workers")
    torch.manual_seed(0)
    made = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        use_distributed_sampler=False,
        callbacks=[
            Guards(),
            OracleMonitor(every_n_steps=1, window=3, num_bins=6, num_probe=40),
            StageAware([GapDensity(warmup_steps=3, every_n_steps=3)]),
            Throughput(every_n_steps=4),
            *callbacks,
            Checkpoints(every_n_train_steps=CUT),
            Continuity(),
        ],
        logger=MetricsTable(folder, name=""),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    network = DiT(8, 4, 1, 24, 2, 2, 10)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)  # noqa: E731
    module = FlowMatching(network, optimizer=optimizer, warmup_steps=3, ema_decay=0.9)
    return Trial(made, module, Digits(batch_size=BATCH, val_batch_size=181, flip=True, micro_batch_size=micro))


def run(
    folder: Path, strategy: Any, devices: int, ckpt_path: Path | None = None, stop: int | None = None, **trainer: Any
) -> dict[str, Any]:
    """Train; what this rank drew, and the weights that came out."""
    trial = build(folder, strategy, devices, recorder := Recorder(stop), **trainer)
    with contextlib.suppress(Stopped):
        trial.trainer.fit(trial.module, datamodule=trial.data, ckpt_path=ckpt_path)
    weights = {} if stop else {k: x.clone() for k, x in trial.trainer.strategy.lightning_module_state_dict().items()}
    return {"drawn": recorder.drawn, "times": recorder.times, "weights": weights}


def rehearse(folder: Path, strategy: str, *planted: type[L.Callback]) -> str:
    """What --verify-resume says."""

    def again(inside: Path) -> Trial:
        return build(inside, STRATEGIES[strategy](), 2, *(callback() for callback in planted))

    try:
        verify_resume(again, again(folder), 3, None)
    except (ValueError, OSError) as error:
        return str(error)
    return "verified"


def no_table(trainer: L.Trainer) -> list[MetricsTable]:
    """What fails on rank 0, which alone has one."""
    if trainer.is_global_zero:
        raise OSError("the table is gone")
    return []


def main(folder: Path) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for name, make in STRATEGIES.items():
        seen[name, "whole"] = run(folder / name / "whole", make(), 2)
        run(folder / name / "parts", make(), 2, stop=STOP)
        last = folder / name / "parts/checkpoints/last.ckpt"
        seen[name, "parts"] = run(folder / name / "parts", make(), 2, last)
        seen[name, "rehearsal"] = rehearse(folder / name / "rehearsal", name)
    seen["forgetful"] = rehearse(folder / "forgetful", "ddp", Forgetful)
    if dist.get_rank() == 0:
        (folder / "file").touch()
    dist.barrier()
    seen["no folder"] = rehearse(folder / "file", "ddp")
    with patch("fm_stages.training.checkpoints.verify_resume.tables", no_table):
        seen["no table"] = rehearse(folder / "no table", "ddp")
    run(folder / "stopped", "ddp", 2, stop=STOP, micro=None)
    seen["from one"] = run(folder / "one", "ddp", 2, folder / "one/checkpoints/last.ckpt", micro=None)
    try:
        run(folder / "full", "ddp", 2, plugins=[FullDisk()])
    except NotSaved as end:
        seen["full"] = end.code
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    plots.save = lambda figure, path: path  # a figure takes a second, and nobody looks at these
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    torch.save(main(folder), folder / f"rank{dist.get_rank()}.pt")
