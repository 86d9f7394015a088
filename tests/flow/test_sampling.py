"""Sampling: seeded image by image, and exact where the velocity is known."""

import pytest
import torch
from torch import Tensor, nn

from fm_stages.flow import (
    SAME_IMAGE,
    EulerMaruyama,
    Guidance,
    LinearPath,
    VPPath,
    dopri5,
    euler,
    keyed_normal,
    midpoint,
    sample,
    time_grid,
)
from fm_stages.oracle import DataBank, Oracle


class Linear(nn.Module):
    """v = c(y) x + t, with a coefficient for each label; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([0.3, -0.5, 0.8, -1.1]))  # the last is that of -1
        self.times: list[float] = []
        self.labels: list[list[int]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert t.shape == y.shape == (len(x),)
        self.times.append(t[0].item())
        self.labels.append(y.tolist())
        return self.coefficients[y].view(-1, 1, 1, 1) * x + t.view(-1, 1, 1, 1)


class Memory(nn.Module):
    """The oracle in the place of a network."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.oracle.velocity(x, t, y)


LABELS = torch.tensor([0, 2, -1, 1, 1, 0])


def test_images_are_the_euler_steps_of_the_seeds_noise():
    images = sample(Linear(), LABELS, (2, 3, 3), seed=5, num_steps=6, shift=2.0)
    x = keyed_normal(("sample", 5), torch.arange(6), (2, 3, 3)).double()
    coefficients = torch.tensor([0.3, -0.5, 0.8, -1.1]).double()[LABELS].view(-1, 1, 1, 1)
    grid = [k / (k + 2 * (6 - k)) for k in range(7)]
    for lo, hi in zip(grid, grid[1:], strict=False):
        x = x + (hi - lo) * (coefficients * x + lo)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.double(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_one_evaluation_per_step(num_steps):
    network = Linear()
    images = sample(network, LABELS, (1, 2, 2), num_steps=num_steps)
    assert network.times == time_grid(num_steps)[:-1].tolist()
    assert network.labels == [LABELS.tolist()] * num_steps
    assert not images.requires_grad


def test_an_image_does_not_depend_on_its_batch():
    whole = sample(Linear(), LABELS, (1, 4, 4), seed=1, num_steps=10)
    part = sample(Linear(), LABELS[:2], (1, 4, 4), seed=1, num_steps=10)
    torch.testing.assert_close(part, whole[:2], rtol=0, atol=1e-6)
    other = sample(Linear(), LABELS, (1, 4, 4), seed=2, num_steps=10)
    assert ((other - whole).flatten(1).norm(dim=1) > 0.3).all()


@pytest.mark.parametrize("solver", [euler, midpoint, EulerMaruyama(LinearPath(), "sigma")], ids=["ode", "two", "sde"])
def test_images_are_known_by_their_index(solver):
    """Any batches, in any order, with guidance: the same images."""
    labels, index = torch.arange(70) % 4 - 1, torch.arange(70)
    settings = {"seed": 3, "num_steps": 4, "solver": solver, "guidance": Guidance(2.0, (0.2, 0.9))}
    whole = sample(Linear(), labels, (1, 3, 3), **settings)
    for size in (1, 7, 32):
        for part in list(index.flip(0).split(size))[:5]:
            images = sample(Linear(), labels[part], (1, 3, 3), index=part, **settings)
            torch.testing.assert_close(images, whole[part], rtol=0, atol=SAME_IMAGE)


def test_an_image_of_dopri5_is_its_own_if_it_is_solved_alone():
    def alone(i: int) -> Tensor:
        return sample(Linear(), LABELS[i : i + 1], (1, 3, 3), index=torch.tensor([i]), solver=dopri5)

    images = [torch.cat([alone(i) for i in order]) for order in ([0, 1, 2], [2, 1, 0])]
    assert torch.equal(images[0], images[1].flip(0))
    together = sample(Linear(), LABELS[:3], (1, 3, 3), solver=dopri5)
    assert 0 < (together - images[0]).abs().max() < 1e-3  # as close as the tolerance


def test_the_global_generator_has_no_say():
    torch.manual_seed(0)
    first = sample(Linear(), LABELS, (1, 2, 2), num_steps=2)
    assert torch.equal(sample(Linear(), LABELS, (1, 2, 2), num_steps=2), first)


def test_a_network_in_half_precision_is_integrated_in_full():
    class Half(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(x, 1 / 3, dtype=torch.bfloat16)

    x0 = keyed_normal(("sample", 0), torch.arange(6), (1, 2, 2))
    images = sample(Half(), LABELS, (1, 2, 2), num_steps=50)
    third = torch.tensor(1 / 3, dtype=torch.bfloat16).float()
    torch.testing.assert_close(images, x0 + third, rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", [LinearPath(), VPPath()], ids=lambda path: type(path).__name__)
def test_the_oracle_memorizes(path):
    """Its flow ends on rows of the bank, of the asked class, and about equally often on each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 1, 4, 4, generator=generator)
    classes = torch.arange(8) % 2
    oracle = Oracle(DataBank(rows, classes), path)
    labels = torch.tensor([-1, 0, 1]).repeat(80)
    # on VPPath dx/dt grows near t = 1 like 1 / sqrt(1 - t): the last of 200 steps is off by 0.06
    images = sample(Memory(oracle), labels, (1, 4, 4), num_steps=200)
    distance, row = (images[:, None] - rows).flatten(2).norm(dim=2).min(1)
    assert distance.max() < (1e-5 if isinstance(path, LinearPath) else 0.1)
    assert (classes[row] == labels)[labels >= 0].all()
    counts = row[labels == -1].bincount(minlength=8)
    assert counts.min() >= 2  # 10 are expected
    assert counts.max() <= 22
