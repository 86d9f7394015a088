"""The SDE: its score and coefficients against formulas written out, its marginals against those of Gaussian data."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import (
    DIFFUSIONS,
    CosinePath,
    EulerMaruyama,
    LinearPath,
    Path,
    VPPath,
    euler,
    keyed_normal,
    time_grid,
)

MEAN, STD = 1.5, 0.4
PATHS = [LinearPath(), CosinePath(), VPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


def gaussian_velocity(path: Path):
    """The velocity of data N(MEAN, STD^2)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        a, s = (f(t)[:, None] for f in (path.alpha, path.sigma))
        mean = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        return path.velocity_from_mean(mean, x, t)

    return velocity


@every_path
def test_the_score_is_that_of_the_marginal(path):
    """x_t ~ N(a MEAN, a^2 STD^2 + s^2)."""
    t = torch.tensor([0.0, 0.01, 0.3, 0.8, 0.999], dtype=torch.float64)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    score = path.score(gaussian_velocity(path)(x, t), x, t)
    torch.testing.assert_close(score, -(x - a * MEAN) / (a**2 * STD**2 + s**2), rtol=1e-9, atol=1e-9)


def test_coefficients_are_the_published_ones():
    """w / 2 on the linear path, as functions written out."""
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    expected = {
        "constant": [1.0] * 3,
        "sbdm": [(1 - x) / x for x in t.tolist()],
        "sigma": [1 - x for x in t.tolist()],
        "linear": [1 - x for x in t.tolist()],
        "decreasing": [(math.cos(math.pi * x) + 1) ** 2 / 4 for x in t.tolist()],
        "increasing-decreasing": [math.sin(math.pi * x) ** 2 for x in t.tolist()],
    }
    assert set(expected) == set(DIFFUSIONS)
    for name, values in expected.items():
        w = EulerMaruyama(LinearPath(), name, scale=0.5).w(t)
        torch.testing.assert_close(w, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)


def test_sbdm_on_the_diffusions_own_path_is_its_noise_rate():
    """The reverse SDE of dx = -beta/2 x dt + sqrt(beta) dW has w = beta."""
    t = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    beta = 0.1 + (1 - t) * (20 - 0.1)
    torch.testing.assert_close(EulerMaruyama(VPPath(), "sbdm").w(t), beta, rtol=1e-9, atol=0)


@every_path
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_marginals(path, diffusion):
    """Mean and standard deviation at the end, and that most of the start's noise is forgotten or replaced."""
    index = torch.arange(8000)
    x0 = keyed_normal(("test", 0), index, (1,)).double()
    solve = EulerMaruyama(path, diffusion).seeded(0, index)
    x = solve(gaussian_velocity(path), x0, time_grid(100).double())
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)  # 4 standard errors, and the steps' error
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([x[:, 0], x0[:, 0]]))[0, 1]) < 0.8  # the ODE's is 1


def test_the_steps_are_those_of_the_formula():
    """Linear path, v = 2 x + t, two of three steps with noise; the last one is the ODE's."""
    index = torch.tensor([7, 40])
    x0 = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    grid = torch.tensor([0.2, 0.5, 0.7, 1.0], dtype=torch.float64)
    found = EulerMaruyama(LinearPath(), "constant", 0.3).seeded(5, index)(lambda x, t: 2 * x + t[:, None], x0, grid)
    x, w = x0, 0.6
    for step, (t, end) in enumerate(((0.2, 0.5), (0.5, 0.7))):
        noise = keyed_normal(("sde", 5, step), index, (1,)).double()
        score = (t * (2 * x + t) - x) / (1 - t)
        x = x + (end - t) * (2 * x + t + w / 2 * score) + math.sqrt((end - t) * w) * noise
    x = x + 0.3 * (2 * x + 0.7)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


def test_noise_knows_seed_sample_and_step_alone():
    flow, grid = gaussian_velocity(LinearPath()), time_grid(6)
    solver = EulerMaruyama(LinearPath(), "sigma")
    index = torch.arange(70)
    x0 = keyed_normal(("test", 0), index, (3,))
    whole = solver.seeded(1, index)(flow, x0, grid)
    chosen = torch.tensor([69, 0, 33])
    torch.testing.assert_close(solver.seeded(1, chosen)(flow, x0[chosen], grid), whole[chosen], rtol=0, atol=1e-6)
    in_parts = solver.seeded(1, index)
    x = in_parts(flow, in_parts(flow, x0, grid[:3]), grid[2:])
    torch.testing.assert_close(x, whole, rtol=0, atol=1e-6)
    assert ((solver.seeded(2, index)(flow, x0, grid) - whole).abs().mean(1) > 0.01).all()


def test_without_noise_it_is_the_ode():
    flow, x0 = gaussian_velocity(CosinePath()), torch.linspace(-2, 2, 9)[:, None]
    x = EulerMaruyama(CosinePath(), "sbdm", scale=0.0).seeded(0, torch.arange(9))(flow, x0, time_grid(10))
    torch.testing.assert_close(x, euler(flow, x0, time_grid(10)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"diffusion": "inccreasing-decreasing"}, "there are constant"),
        ({"scale": -1.0}, "-1"),
        ({"scale": math.inf}, "inf"),
    ],
)
def test_arguments_that_cannot_be(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        EulerMaruyama(LinearPath(), **arguments)
