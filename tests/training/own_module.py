"""The oracle beside a LightningModule of one's own: nothing of this file but the imports comes from fm_stages.training.

What the monitor asks for is what `training_step` returns, a path, and the training set as a bank.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fm_stages.flow import CosinePath
from fm_stages.oracle import DataBank
from fm_stages.training import OracleMonitor

NUM_IMAGES = 512


class ConvNet(nn.Module):
    """Velocity (B, 1, 8, 8) of x (B, 1, 8, 8) at times t (B,) for classes y (B,), -1 for none."""

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.null = num_classes
        self.classes = nn.Embedding(num_classes + 1, width)
        self.time = nn.Linear(1, width)
        self.first, self.second, self.last = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, width), (width, width), (width, 1))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        condition = self.classes(torch.where(y == -1, self.null, y)) + self.time(t[:, None])  # (B, width)
        hidden = nn.functional.silu(self.first(x) + condition[:, :, None, None])
        return self.last(nn.functional.silu(self.second(hidden)))


class OwnModule(L.LightningModule):
    path = CosinePath()

    def __init__(self) -> None:
        super().__init__()
        self.network = ConvNet()

    def training_step(self, batch, batch_idx):
        x1, y = batch
        y = torch.where(torch.rand(len(y), device=y.device) < 0.1, -1, y)  # label dropout: -1 is the null class
        x0, t = torch.randn_like(x1), torch.rand(len(x1), device=x1.device)  # t = 0 is noise, t = 1 is data
        x_t = self.path.interpolate(x0, x1, t)
        v = self.network(x_t, t, y)
        loss = (v - self.path.velocity(x0, x1, t)).square().mean()
        return {"loss": loss, "x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": v.detach(), "labels": y}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class OwnData(L.LightningDataModule):
    def setup(self, stage=None) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images = torch.from_numpy(digits.images[:NUM_IMAGES] / 8 - 1).float()[:, None]  # (N, 1, 8, 8) in [-1, 1]
        self.labels = torch.from_numpy(digits.target[:NUM_IMAGES]).long()

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.images, self.labels), batch_size=32, shuffle=True)

    def bank(self) -> DataBank:
        return DataBank(self.images, self.labels)


def train(callbacks=(), **kwargs) -> None:
    monitor = OracleMonitor(every_n_steps=1, window=8)
    trainer = L.Trainer(callbacks=[monitor, *callbacks], precision="bf16-mixed", **kwargs)
    trainer.fit(OwnModule(), datamodule=OwnData())
