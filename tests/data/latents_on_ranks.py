"""Started on two ranks by test_latents_on_ranks.py: each residency, with copies and shards of the bank.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 latents_on_ranks.py FOLDER DEVICE
"""

from __future__ import annotations

import errno
import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from fm_stages.data import Latents, latent_index, normalisation, shared_memory
from fm_stages.networks import DiT
from fm_stages.training import FlowMatching, OracleMonitor, OracleTarget

TIMEOUT_SEC = 200
NUM_STEPS = 6


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def fit(data: Latents, num_ranks: int, steps: int = NUM_STEPS, ckpt: Path | None = None, save: Path | None = None):
    """Train a small network towards the oracle beside the monitor; this rank's losses, and the monitor's curves."""
    torch.manual_seed(0)
    network = DiT(6, 2, 4, 16, 1, 2, num_classes=3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    module = FlowMatching(network, target=OracleTarget())
    losses, monitor = Losses(), OracleMonitor(every_n_steps=3, window=1, num_bins=4)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=DDPStrategy() if num_ranks > 1 else "auto",
        devices=num_ranks,
        max_steps=steps,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        default_root_dir=data.data_dir.parent / "run",
        callbacks=[losses, monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    if save is not None:
        trainer.save_checkpoint(save)
    return losses.seen, repr(monitor.train.table())  # which has NaN, unequal to itself


def calls(name: str, place: Any, found: list) -> Callable[[], None]:
    """Note each call of a function; returns what undoes that."""
    own = getattr(place, name)

    def noted(*arguments: Any) -> Any:
        found.append(name)
        return own(*arguments)

    setattr(place, name, noted)
    return lambda: setattr(place, name, own)


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def run(folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    shared_memory.SHM = folder / "shm"  # in /dev/shm other tests may have files, too
    shared_memory.SHM.mkdir(exist_ok=True)
    found: dict[str, Any] = {"made": [], "verified": []}
    undo = calls("channel_statistics", normalisation, found["made"])
    undo_verified = calls("sha256_of", latent_index, found["verified"])
    for case, options in {
        "disk": {"residency": "disk", "shard_bank": True, "verify": True},
        "ram": {"residency": "ram", "shard_bank": True},
        "device, copies": {"residency": "device", "shard_bank": False},
        "device, shards": {"residency": "device", "shard_bank": True},
        "moments, disk": {"residency": "disk", "shard_bank": True},
        "moments, device": {"residency": "device", "shard_bank": True},
    }.items():
        place = folder / ("moments" if case.startswith("moments") else "latents")
        data = Latents(str(place), batch_size=8, val_batch_size=4, val_fraction=0.1, **options)
        found[case] = fit(data, 2)
        if case == "ram":
            memory = data._ready().train.memory
            if rank == 1:
                memory[0] = 123.0
            dist.barrier()
            found["shared"] = memory[0].unique().tolist()
            found["left"] = os.listdir(shared_memory.SHM)
    undo()
    undo_verified()

    data = Latents(str(folder / "latents"), residency="ram", batch_size=8)
    own = os.posix_fallocate

    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.posix_fallocate = no_room
    found["no room"] = error_of(lambda: fit(data, 2))
    os.posix_fallocate = own
    found["left"] += os.listdir(shared_memory.SHM)
    own_shm, shared_memory.SHM = shared_memory.SHM, folder / f"shm{rank}"
    shared_memory.SHM.mkdir()
    found["apart"] = error_of(lambda: fit(data, 2))
    found["left"] += os.listdir(shared_memory.SHM)
    shared_memory.SHM = own_shm
    found["batch"] = error_of(lambda: fit(Latents(str(folder / "latents"), batch_size=7), 2))
    place = folder / ("latents" if rank == 0 else "nowhere")
    found["one rank"] = error_of(lambda: fit(Latents(str(place), batch_size=8), 2))
    return found


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT_SEC, exit=True)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.save(run(folder), folder / f"rank{dist.get_rank()}.pt")
