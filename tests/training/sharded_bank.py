"""Started on two ranks by test_sharded_bank.py: training towards the oracle of a sharded bank and of a copied one.

Usage: python -m torch.distributed.run --standalone --nproc_per_node 2 sharded_bank.py FOLDER DEVICE
"""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from fm_stages.data import Digits
from fm_stages.flow import LinearPath, keyed_normal, keyed_uniform
from fm_stages.oracle import DataBank, Oracle
from fm_stages.oracle.skipping import measure_nearest
from fm_stages.training import HybridTarget, OracleMonitor

TIMEOUT_SEC = 200

NUM_STEPS = 6
BATCHES = (5, 11)
"""Images of a batch on each rank."""

SHARDS = (20, 76)
"""Rows of the bank on each rank."""


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x1, labels = torch.randn(sum(SHARDS), 1, 4, 4, generator=generator), torch.arange(sum(SHARDS)) % 3
    x1[-6:], labels[-6:] = x1[:6], labels[:6]  # images that lie on both ranks
    return x1, labels


def make_bank(device: str, sharded: bool) -> DataBank:
    x1, labels = (x.to(device) for x in make_data())
    if not sharded:
        return DataBank(x1, labels)
    own = slice(0, SHARDS[0]) if dist.get_rank() == 0 else slice(SHARDS[0], None)
    return DataBank(x1[own], labels[own], group=dist.group.WORLD)


class Training(L.LightningModule):
    """A small network, and targets from the oracle: its velocity, or in every other step a hybrid's."""

    path = LinearPath()

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle
        self.hybrid = HybridTarget(0.2)
        self.hybrid.attach(oracle)
        self.network = nn.Sequential(nn.Linear(17, 32), nn.SiLU(), nn.Linear(32, 16))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if getattr(self, "device_mesh", None) is not None and not isinstance(self.network, dist.fsdp.FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        outputs = self.outputs(batch, self.global_step, hybrid=self.global_step % 2 == 1)
        self.losses.append(outputs["loss"].item())
        return outputs

    def validation_step(self, batch, batch_idx):
        return self.outputs(batch, 1000 + batch_idx, hybrid=True)

    def predict_fixed(self, batch, batch_idx=0):
        """Of the probe, which comes out of the bank; as `FlowMatching` does it."""
        x1, labels, position = batch["x1"], batch["labels"], batch["position"]
        t = keyed_uniform(("probe t",), position).to(x1)
        x0 = keyed_normal(("probe noise",), position, tuple(x1.shape[1:])).to(x1)
        x_t = self.path.interpolate(x0, x1, t)
        prediction = self.network(torch.cat([x_t.flatten(1), t[:, None]], 1)).reshape(x1.shape)
        return {"x0": x0, "x1": x1, "x_t": x_t, "t": t, "labels": labels, "prediction": prediction}

    def outputs(self, batch: list[Tensor], seed: int, hybrid: bool) -> dict[str, Tensor]:
        x1, labels, index = batch
        generator = torch.Generator().manual_seed(10 * seed + self.global_rank)
        t = torch.rand(len(x1), generator=generator)
        if self.global_rank == 0:
            t = 0.3 + 0.7 * t  # never before the hybrid's boundary
        x0 = torch.randn(x1.shape, generator=generator).to(x1)
        labels = torch.where((torch.rand(len(x1), generator=generator) < 0.3).to(x1.device), -1, labels)
        t = t.to(x1)
        x_t = self.path.interpolate(x0, x1, t)
        prediction = self.network(torch.cat([x_t.flatten(1), t[:, None]], 1)).reshape(x1.shape)
        target = self.hybrid(self.path, x0, x1, t, labels) if hybrid else self.oracle.target(x0, x1, t, labels, index)
        loss = (prediction - target).square().mean()
        seen = {"loss": loss, "x0": x0, "x1": x1, "x_t": x_t, "t": t, "labels": labels}
        return {**seen, "prediction": prediction.detach(), **({} if hybrid else {"index": index})}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(rank: int, held_out: bool = False) -> DataLoader:
    x1, labels = make_data()
    rows = torch.arange(rank, len(x1), 2)  # on a rank that need not hold them
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(rank))]
    x1 = x1.flip(-1) if held_out else x1
    batches = rows[: 3 * BATCHES[rank]].split(BATCHES[rank])
    return DataLoader(TensorDataset(x1, labels, torch.arange(len(x1))), batch_sampler=[b.tolist() for b in batches])


def train(folder: Path, device: str, strategy: str, sharded: bool) -> dict[str, object]:
    torch.manual_seed(0)
    bank = make_bank(device, sharded)
    measure_nearest(bank)
    module = Training(Oracle(bank, Training.path))
    monitor = OracleMonitor(every_n_steps=2, window=3, num_bins=6, bank=bank)
    trainer = L.Trainer(
        strategy=DDPStrategy()
        if strategy == "ddp"
        else ModelParallelStrategy(
            data_parallel_size=dist.get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
        accelerator=device.replace("cuda", "gpu"),
        devices=dist.get_world_size(),
        max_steps=NUM_STEPS,
        val_check_interval=3,
        num_sanity_val_steps=1,
        callbacks=[monitor],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, loader(dist.get_rank()), loader(dist.get_rank(), held_out=True))
    return {
        "losses": module.losses,
        "profile": monitor.profile.to_json(),
        "table": monitor.train.table(),
        "held out": monitor.held_out[""].table(),
        "probe": monitor.probe[""].table(),
        "num_stored": bank.num_stored,
    }


def planned() -> bool:
    """Whether the digits' bank is sharded where it would be a copy by what rank 0 has free, and not by rank 1's."""
    data = Digits()
    data.setup()
    data._memory_per_rank = lambda: (2**30, 2**20)[dist.get_rank()]
    data.trainer = L.Trainer(accelerator="cpu", devices=dist.get_world_size(), logger=False, enable_checkpointing=False)
    return data.bank().group is not None


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT_SEC, exit=True)
    torch.set_num_threads(1)
    folder, device = Path(sys.argv[1]), sys.argv[2]
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    runs = {
        (strategy, sharded): train(folder, device, strategy, sharded)
        for strategy in ("ddp", "fsdp2")
        for sharded in (True, False)
    }
    if device == "cpu":
        runs["planned"] = planned()
    torch.save(runs, folder / f"rank{dist.get_rank()}.pt")
