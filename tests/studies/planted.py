"""Data, networks, paths and times for the doctor: sound ones, and each with the fault that its name says."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fm_stages.data import ImageData, Opened, Splits
from fm_stages.flow import LinearPath, UniformTimesteps

NUM_TRAIN, NUM_VAL = 240, 24


class Patterns(ImageData):
    """Images of 2x4x4 random pixels, in three classes."""

    def read(self) -> Splits:
        generator = torch.Generator().manual_seed(0)
        num = NUM_TRAIN + NUM_VAL
        images = torch.randint(0, 256, (num, 2, 4, 4), generator=generator, dtype=torch.uint8)
        labels = torch.arange(num) % 3
        self.spoil(images, labels)
        names = ["a", "b", "c"]
        return Splits(images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:], names)

    def spoil(self, images: Tensor, labels: Tensor) -> None:
        """Sound ones do nothing."""


class Copied(Patterns):
    def spoil(self, images: Tensor, labels: Tensor) -> None:
        images[:30], labels[:30] = images[30].clone(), 0


class Unscaled(Patterns):
    """As latents that nobody multiplied by 0.18: std 11."""

    def open(self) -> Opened:
        opened = super().open()
        for rows in (opened.train, opened.val):
            rows.scale, rows.shift = 40 / 255, -20.0
        return opened


class WithoutOneClass(Patterns):
    def spoil(self, images: Tensor, labels: Tensor) -> None:
        labels[labels == 1] = 2


class SameForAllRanks(Patterns):
    """Every rank reads what rank 0 should."""

    def train_dataloader(self):
        with self.trainer.speaking_for(0):
            return super().train_dataloader()


class _Changed:
    """A loader whose images are not those of the bank."""

    def __init__(self, loader, change) -> None:
        self.loader, self.change, self.dataset = loader, change, loader.dataset

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({**batch, "x1": self.change(batch["x1"])} for batch in self.loader)


class Augmented(Patterns):
    """Upside down, which no row of the bank is."""

    def train_dataloader(self):
        return _Changed(super().train_dataloader(), lambda x1: x1.flip(-2))


class Rounded(Patterns):
    def train_dataloader(self):
        return _Changed(super().train_dataloader(), lambda x1: x1 * (1 + 1e-6))


class Straight(nn.Module):
    """Towards the mean of the data, 0, on the linear path: sign -1 points to noise, backwards takes 1 - t for t."""

    def __init__(self, sign: float = 1.0, backwards: float = 0.0, constant: float = 0.0) -> None:
        super().__init__()
        self.sign, self.backwards, self.constant = (
            nn.Parameter(torch.tensor(float(x))) for x in (sign, backwards, constant)
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = torch.where(self.backwards > 0, 1 - t, t).view(-1, 1, 1, 1)
        s = 1 / 3  # variance of uniform pixels in [-1, 1]
        best = x * (t * s - (1 - t)) / (t**2 * s + (1 - t) ** 2)
        return self.sign * torch.where(self.constant > 0, x * t * (1 - t), best)


class OneChannel(Straight):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, :1]


class Diverged(Straight):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) / 0


class WithoutNull(Straight):
    """Its table has a row for each class, and none for the null class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) + self.table(y).view(-1, 1, 1, 1)


class OtherWay(LinearPath):
    """t = 0 is data."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class WrongSlope(LinearPath):
    def d_alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.ones_like(t)


class OneTime(UniformTimesteps):
    def icdf(self, u: Tensor) -> Tensor:
        return torch.full_like(u, 0.5)


class NotItsInverse(UniformTimesteps):
    def icdf(self, u: Tensor) -> Tensor:
        return u**2


class Negative(UniformTimesteps):
    def icdf(self, u: Tensor) -> Tensor:
        return u - 0.1
