"""Guidance: its formula, which samples cost a second row, and where along t it holds."""

import math

import pytest
import torch
from torch import Tensor, nn

from fm_stages.flow import Guidance, count_evaluations, guided, heun, keyed_normal, sample, time_grid

LABELS = torch.tensor([0, 2, -1, 1])


class Scaled(nn.Module):
    """v = c(y) x in every channel; keeps the batches and times that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.c = torch.tensor([0.5, -1.0, 2.0, 0.25])  # the last is that of -1
        self.seen: list[tuple[float, list[int]]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert len(x) == len(t) == len(y)
        self.seen.append((t[0].item(), y.tolist()))
        return self.c[y].view(-1, 1, 1, 1) * x


X = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
T = torch.full((4,), 0.5)


def test_formula_on_all_channels():
    expected = [0.25 + 3 * (0.5 - 0.25), 0.25 + 3 * (2.0 - 0.25), 0.25, 0.25 + 3 * (-1.0 - 0.25)]
    v = guided(Scaled(), LABELS, 3.0)(X, T)
    torch.testing.assert_close(v, torch.tensor(expected).view(-1, 1, 1, 1) * X, rtol=1e-6, atol=1e-6)


def test_first_channels_alone():
    """The others keep the label's velocity, as in the published code."""
    whole, plain = guided(Scaled(), LABELS, 3.0)(X, T), Scaled()(X, T, LABELS)
    part = guided(Scaled(), LABELS, 3.0, num_channels=3)(X, T)
    assert torch.equal(part[:, :3], whole[:, :3])
    assert torch.equal(part[:, 3:], plain[:, 3:])


def test_each_sample_its_own_scale_and_no_second_row_where_nothing_moves():
    network = Scaled()
    scale = torch.tensor([1.0, 0.0, 4.0, 2.0])
    v = guided(network, LABELS, scale)(X, T)
    factor = torch.tensor([0.5, 0.25, 0.25, 0.25 + 2 * (-1.0 - 0.25)])
    torch.testing.assert_close(v, factor.view(-1, 1, 1, 1) * X, rtol=1e-6, atol=1e-6)
    assert network.seen == [(0.5, [0, 2, -1, 1, -1, -1])]


@pytest.mark.parametrize(("labels", "scale"), [(LABELS, 1.0), (torch.full((4,), -1), 5.0)])
def test_what_is_not_guided_costs_nothing(labels, scale):
    network = Scaled()
    images = sample(network, labels, (4, 2, 2), num_steps=3, guidance=Guidance(scale))
    assert [y for _, y in network.seen] == [labels.tolist()] * 3
    assert torch.equal(images, sample(network, labels, (4, 2, 2), num_steps=3))


def test_interval():
    """Its ends are nodes, N steps are N evaluations, and rows are doubled within it alone."""
    network = Scaled()
    with count_evaluations(network) as sizes:
        images = sample(network, LABELS, (4, 2, 2), 3, 7, guidance=Guidance(3.0, (0.31, 0.62)))
    assert len(sizes) == len(network.seen) == 7
    grid = time_grid(7, nodes=(0.31, 0.62))
    assert [t for t, _ in network.seen] == pytest.approx(grid[:-1].tolist())
    inside = [len(y) == 7 for _, y in network.seen]
    assert inside == [0.31 - 1e-6 <= t < 0.62 - 1e-6 for t in grid[:-1].tolist()]
    assert sizes == [7 if guided else 4 for guided in inside]
    x = keyed_normal(("sample", 3), torch.arange(4), (4, 2, 2))
    for (t, end), is_guided in zip(zip(grid, grid[1:], strict=False), inside, strict=True):
        c = network.c[LABELS]
        c = torch.where(LABELS != -1, 0.25 + 3 * (c - 0.25), c) if is_guided else c
        x = x + (end - t) * c.view(-1, 1, 1, 1) * x
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)


def test_a_solver_of_two_stages_never_mixes_guided_and_plain():
    network = Scaled()
    sample(network, LABELS, (4, 2, 2), num_steps=6, solver=heun, guidance=Guidance(2.0, (0.3, 0.6)))
    assert len(network.seen) == 11
    sizes = [len(y) for _, y in network.seen]
    steps = [sizes[i : i + 2] for i in range(0, 11, 2)]
    assert all(len(set(step)) == 1 for step in steps)
    assert {len(y) for t, y in network.seen if t < 0.29 or t > 0.61} == {4}
    assert {7, 4} == set(sizes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"scale": -0.5}, "-0.5"),
        ({"scale": math.nan}, "nan"),
        ({"interval": (0.5, 0.5)}, "0.5 0.5"),
        ({"interval": (0.6, 0.5)}, "0.6 0.5"),
        ({"interval": (-0.1, 0.5)}, "-0.1 0.5"),
        ({"num_channels": 0}, "num_channels=0"),
    ],
)
def test_arguments_that_cannot_be(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Guidance(**arguments)
