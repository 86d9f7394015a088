"""Started on two ranks by test_pictures_on_ranks.py: runs with and without pictures, over a shared bank.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 pictures_on_ranks.py FOLDER DEVICE
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist

from fm_stages.data import Digits, pictures_of
from fm_stages.networks import DiT
from fm_stages.oracle import DataBank
from fm_stages.training import FlowMatching, OracleMonitor, SampleGrid, predict_data

TIMEOUT_SEC = 200


class DecodedOnRank0(Digits):
    """As latents whose VAE only one node has."""

    def picture_shape(self, shape):
        return (3, 16, 16) if dist.get_rank() == 0 else None


def train(folder: Path, pictures: bool) -> tuple[FlowMatching, OracleMonitor]:
    torch.manual_seed(0)
    module = FlowMatching(
        DiT(8, 4, 1, 16, 1, 2, 10), optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3)
    )
    monitor = OracleMonitor(every_n_steps=1, window=2)
    grid = SampleGrid(every_n_steps=2, num_samples=10, num_steps=2, guidance_scale=2.0, num_predictions=2)
    L.Trainer(
        max_steps=4,
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        callbacks=[monitor, *([grid] if pictures else [])],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        max_epochs=-1,
    ).fit(module, datamodule=Digits(batch_size=64, shard_bank=True))
    return module, monitor


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT_SEC, exit=True)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    plain, _ = train(folder / "plain", pictures=False)
    module, monitor = train(folder / "pictures", pictures=True)
    assert monitor.oracle.bank.group is not None
    found = predict_data({"raw": module.network.eval()}, monitor.oracle, monitor.profile, num_draws=3)
    data = DecodedOnRank0()
    data.setup()
    latents = DataBank(torch.randn(20, 4, 8, 8), group=dist.group.WORLD)
    saved = {
        "plain": plain.state_dict(),
        "weights": module.state_dict(),
        "profile": monitor.profile.to_json(),
        "found": found,
        "note": pictures_of(latents, data)[1],
    }
    torch.save(saved, folder / f"rank{os.environ['RANK']}.pt")
