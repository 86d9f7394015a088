"""Started on two ranks by test_preemption.py; each leaves what it saw. Usage: torchrun ... preempted_ranks.py FOLDER.

Rank 1 alone gets a signal, in the middle of an optimizer step; then the run goes on. Besides: ranks that found
different checkpoints, and a run that is told of fewer ranks than there are.
"""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch

from fm_stages import cli
from fm_stages.data import Digits
from fm_stages.networks import DiT
from fm_stages.training import Checkpoints, FlowMatching, Preempted, Preemption
from fm_stages.training.checkpoints.resume import SameStart

RANK, STEPS = int(os.environ["RANK"]), 6


class Signal(L.Callback):
    """SIGTERM to rank 1 itself, before the second micro-batch of step 3."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if RANK == 1 and batch_idx == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None) -> FlowMatching:
    torch.manual_seed(0)
    network = DiT(8, 4, 1, 16, 1, 2, 10)
    module = FlowMatching(network, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    checkpoints = Checkpoints(monitor=None)
    L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_steps=STEPS,
        accumulate_grad_batches=2,
        callbacks=[*callbacks, checkpoints, Preemption(checkpoints)],
        default_root_dir=folder,
        use_distributed_sampler=False,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, datamodule=Digits(batch_size=64), ckpt_path=ckpt_path)
    return module


def refusal(*callbacks: L.Callback) -> str:
    try:
        fit(folder / "refused", *callbacks)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    seen = {"whole": fit(folder / "whole").state_dict()}
    try:
        fit(folder / "parts", Signal())
    except Preempted as stop:
        seen["status"] = stop.code
    last = folder / "parts/checkpoints/last.ckpt"
    seen["step"] = torch.load(last, weights_only=True)["global_step"]
    seen["waiting"] = (folder / "parts/preempted.txt").exists()
    seen["parts"] = fit(folder / "parts", ckpt_path=last).state_dict()
    start = SameStart()
    start.start = 4 * RANK, "last.ckpt" if RANK else "none"
    seen["different checkpoints"] = refusal(start)
    sys.argv = ["fm-stages", "fit", "--config", str(Path(__file__).parents[3] / "configs/digits_dit.yaml")]
    sys.argv += ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    try:
        cli.main()
    except SystemExit as end:
        seen["one device"] = end.code
    torch.save(seen, folder / f"rank{RANK}.pt")
