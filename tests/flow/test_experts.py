"""Experts of stages: images in closed form, and who is asked when."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fm_stages.flow import (
    SOLVERS,
    EulerMaruyama,
    Guidance,
    LinearPath,
    count_evaluations,
    heun,
    keyed_normal,
    sample,
    stage_grid,
    time_grid,
)

SHAPE, LABELS = (1, 3, 3), torch.tensor([0, 1, -1, 1])
SDE = EulerMaruyama(LinearPath(), "sigma")
FIXED = [*(SOLVERS[name] for name in ("euler", "heun", "midpoint")), SDE]


class Expert(nn.Module):
    """v = c(y) x + constant; keeps the times and batches that it was given."""

    def __init__(self, c: tuple[float, float, float], constant: float = 0.0) -> None:
        super().__init__()
        self.c, self.constant = torch.tensor(c), constant  # the last c is that of -1
        self.seen: list[tuple[float, int]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append((t[0].item(), len(y)))
        return self.c[y].view(-1, 1, 1, 1) * x + self.constant


def noise(num: int = 4, seed: int = 0) -> Tensor:
    return keyed_normal(("sample", seed), torch.arange(num), SHAPE)


@pytest.mark.parametrize("solver", [*SOLVERS.values(), EulerMaruyama(LinearPath(), scale=0.0)])
def test_constant_velocities_draw_two_straight_lines(solver):
    """Exact for every solver if no step straddles the split; any that did would mix the two."""
    early, late = Expert((0, 0, 0), 2.0), Expert((0, 0, 0), -5.0)
    images = sample([(0.0, early), (0.13, late)], LABELS, SHAPE, num_steps=7, solver=solver)
    torch.testing.assert_close(images, noise() + 0.13 * 2 - 0.87 * 5, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("solver", "per_step", "at_end"), list(zip(FIXED, (1, 2, 2, 1), (1, 1, 2, 1), strict=True)))
def test_each_is_asked_in_its_stage_alone(solver, per_step, at_end):
    early, late = Expert((0.5, 1, 2)), Expert((-0.5, 3, 1))
    grid = stage_grid(10, 0.2, 0.3)
    with count_evaluations(early) as first, count_evaluations(late) as second:
        sample([(0.0, early), (0.2, late)], LABELS, SHAPE, solver=solver, grid=grid)
    assert len(first) == 3 * per_step
    assert len(second) == 6 * per_step + at_end  # no velocity at t = 1
    assert max(t for t, _ in early.seen) <= 0.2 + 1e-6
    assert min(t for t, _ in late.seen) >= 0.2 - 1e-6


def test_euler_steps_with_guidance_across_the_split():
    """Guided from within the one stage into the other: four parts, whose ends are nodes."""
    early, late = Expert((0.5, 1, 2)), Expert((-0.5, 3, 0.25))
    images = sample(
        [(0.0, early), (0.4, late)], LABELS, SHAPE, seed=3, num_steps=9, guidance=Guidance(3.0, (0.23, 0.71))
    )
    grid = time_grid(9, nodes=(0.23, 0.4, 0.71))
    assert [t for t, _ in early.seen + late.seen] == pytest.approx(grid[:-1].tolist())
    x = noise(seed=3)
    for t, end in pairwise(grid.tolist()):
        own = (early if t < 0.4 - 1e-6 else late).c
        c, is_guided = own[LABELS], 0.23 - 1e-6 <= t < 0.71 - 1e-6
        if is_guided:
            c = torch.where(LABELS == -1, c, own[-1] + 3 * (c - own[-1]))
        x = x + (end - t) * c.view(-1, 1, 1, 1) * x
    torch.testing.assert_close(images, x, rtol=1e-4, atol=1e-5)
    assert {rows for t, rows in early.seen + late.seen if 0.22 < t < 0.7} == {7}
    assert {rows for t, rows in early.seen + late.seen if t < 0.22 or t > 0.7} == {4}


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.6), (0.3, 1.0), (0.1, 0.3), (0.5, 0.9)])
@pytest.mark.parametrize("solver", FIXED)
def test_one_network_twice_is_that_network_with_the_split_as_a_node(solver, interval):
    network, settings = Expert((0.5, 1, 2)), {"solver": solver, "guidance": Guidance(2.0, interval)}
    alone = sample(network, LABELS, SHAPE, grid=time_grid(8, nodes=(0.3, *interval)), **settings)
    twice = sample([(0.0, network), (0.3, network)], LABELS, SHAPE, num_steps=8, **settings)
    assert torch.equal(alone, twice)


def test_any_number_of_experts():
    """The second one's stage lies within the guidance of the first: none of it is left."""
    networks = [(start, Expert((0, 0, 0), v)) for start, v in ((0.0, 1.0), (0.2, 10.0), (0.5, 100.0))]
    images = sample(networks, LABELS, SHAPE, num_steps=10, solver=heun, guidance=Guidance(2.0, (0.1, 0.4)))
    torch.testing.assert_close(images, noise() + 0.2 + 3 + 50, rtol=0, atol=1e-5)


@pytest.mark.parametrize("starts", [(), (0.1,), (0.0, 0.5, 0.2), (0.0, 0.0), (0.0, 1.0), (0.0, float("nan"))])
def test_stages_that_cannot_be(starts):
    with pytest.raises(ValueError, match="experts draw from increasing times on"):
        sample([(start, Expert((0, 0, 0))) for start in starts], LABELS, SHAPE)


def test_a_grid_without_the_split():
    with pytest.raises(ValueError, match=r"begins at t = 0\.23, which is no node of the grid"):
        sample([(0.0, Expert((0, 0, 0))), (0.23, Expert((0, 0, 0)))], LABELS, SHAPE, grid=time_grid(10))
