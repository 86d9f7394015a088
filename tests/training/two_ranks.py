"""Started on two ranks by test_two_ranks.py: a module of one's own and the package's, each leaves what it saw.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from fm_stages.data import Digits
from fm_stages.flow import LogitNormalTimesteps
from fm_stages.networks import DiT
from fm_stages.training import (
    Checkpoints,
    FlowMatching,
    HybridTarget,
    OracleMonitor,
    SampleGrid,
    ShiftToBoundary,
    StageAware,
    Throughput,
)

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}


class Recorder(L.Callback):
    """Keeps what each step of this rank returned, and at the end the weights, in ``rank<r>.pt``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.append({name: x.clone() for name, x in outputs.items()})

    def on_fit_end(self, trainer, pl_module) -> None:
        (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, OracleMonitor))
        seen = {
            "steps": self.steps,
            "profile": monitor.profile.to_json(),
            "table": monitor.train.table(),
            "weights": pl_module.state_dict(),
            "metrics": {name: float(x) for name, x in trainer.callback_metrics.items()},
        }
        torch.save(seen, self.folder / f"rank{trainer.global_rank}.pt")


def own(folder: Path, strategy: str, devices: int) -> None:
    """The lines of own_module.py, with a record of what they did."""
    import own_module

    torch.manual_seed(int(os.environ["RANK"]))  # noise of its own on each rank
    own_module.train(
        [Recorder(folder)],
        max_steps=16,
        strategy=strategy,
        devices=devices,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_checkpointing=False,
        **QUIET,
    )


def flow_matching(folder: Path, strategy: str, devices: int, ckpt_path: Path | None = None) -> None:
    """Digits with every callback; labels, flips, a hybrid target, and held-out images that do not divide evenly."""
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 32, 1, 2, 10)
    module = FlowMatching(
        network,
        timesteps=LogitNormalTimesteps(),
        target=HybridTarget(0.5),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3),
        warmup_steps=2,
    )
    callbacks = [
        OracleMonitor(every_n_steps=1, window=2),
        StageAware([ShiftToBoundary(0.6)], gradients_every_n_steps=4),
        SampleGrid(every_n_steps=3, num_samples=10, num_steps=2),
        Throughput(every_n_steps=2),
        Checkpoints(save_top_k=-1),
        Recorder(folder),
    ]
    L.Trainer(
        max_steps=6,
        strategy=strategy,
        devices=devices,
        callbacks=callbacks,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        use_distributed_sampler=False,
        gradient_clip_val=1.0,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        **QUIET,
    ).fit(module, datamodule=Digits(batch_size=64, val_batch_size=50, flip=True), ckpt_path=ckpt_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for run in (own, flow_matching):
        folder = Path(sys.argv[1]) / run.__name__
        folder.mkdir(parents=True, exist_ok=True)
        run(folder, "ddp", 2)
    folder = Path(sys.argv[1]) / "resumed"
    flow_matching(folder, "ddp", 2, Path(sys.argv[1]) / "flow_matching/checkpoints/step_0000003.ckpt")
