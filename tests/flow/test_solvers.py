"""Solvers against closed forms of their own steps, against the exact flow of Gaussian data, and on time grids."""

import math
from itertools import pairwise

import pytest
import scipy.integrate
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fm_stages.flow import (
    SOLVERS,
    CosinePath,
    LinearPath,
    Path,
    VPPath,
    dopri5,
    euler,
    heun,
    integrate,
    midpoint,
    solver_named,
    stage_grid,
    time_grid,
)
from fm_stages.oracle import DataBank, Oracle

MEAN, STD = 1.5, 0.4
PATHS = [LinearPath(), CosinePath(), VPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


class GaussianFlow:
    """The velocity of data N(MEAN, STD^2), whose flow keeps quantiles; remembers the times it was asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        self.times.append(t[0].item())
        a, s = (f(t)[:, None] for f in (self.path.alpha, self.path.sigma))
        mean = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        return self.path.velocity_from_mean(mean, x, t)

    def ends(self, x0: Tensor) -> Tensor:
        zero = torch.zeros(1, dtype=x0.dtype)
        a, s = self.path.alpha(zero), self.path.sigma(zero)
        return MEAN + STD * (x0 - a * MEAN) / (a**2 * STD**2 + s**2).sqrt()


NOISE = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]


class TestTimeGrid:
    def test_uniform_nodes(self):
        torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), rtol=0, atol=0)

    def test_shifted_nodes(self):
        grid = time_grid(4, shift=3.0)
        expected = [0, 0.25 / (0.25 + 3 * 0.75), 0.5 / (0.5 + 3 * 0.5), 0.75 / (0.75 + 3 * 0.25), 1]
        torch.testing.assert_close(grid, torch.tensor(expected), rtol=1e-6, atol=0)
        assert (grid[0].item(), grid[-1].item()) == (0, 1)

    @pytest.mark.parametrize("num_steps", [0, -1])
    def test_no_steps_raise(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps={num_steps}"):
            time_grid(num_steps)

    def test_a_node_takes_the_place_of_the_nearest(self):
        grid = time_grid(4, nodes=(0.6, 0.0, 1.0))
        torch.testing.assert_close(grid, torch.tensor([0.0, 0.25, 0.6, 0.75, 1.0]), rtol=0, atol=0)

    def test_nodes_that_want_the_same_place_share_out_two(self):
        assert time_grid(4, nodes=(0.51, 0.49)).tolist() in (
            pytest.approx([0, 0.49, 0.51, 0.75, 1]),
            pytest.approx([0, 0.25, 0.49, 0.51, 1]),
        )

    @given(
        num_steps=st.integers(5, 40),
        shift=st.floats(0.1, 10),
        nodes=st.lists(st.floats(0, 1, width=32), max_size=4),
    )
    def test_nodes_are_there_and_the_number_of_steps_stays(self, num_steps, shift, nodes):
        grid = time_grid(num_steps, shift, nodes)
        assert grid.shape == (num_steps + 1,)
        assert (grid.diff() > 0).all()
        assert all((grid - node).abs().min() <= 1e-6 for node in nodes)
        plain = time_grid(num_steps, shift)
        assert sum(a != b for a, b in zip(grid, plain, strict=True)) <= len(set(nodes))

    @pytest.mark.parametrize(
        ("num_steps", "nodes", "complaint"),
        [(2, (0.2, 0.4), "num_steps=2"), (1, (0.5,), "num_steps=1"), (5, (1.2,), "1.2"), (5, (math.nan,), "nan")],
    )
    def test_nodes_that_cannot_be(self, num_steps, nodes, complaint):
        with pytest.raises(ValueError, match=complaint):
            time_grid(num_steps, nodes=nodes)


class TestStageGrid:
    def test_uniform_on_either_side(self):
        expected = [0, 0.05, 0.1, 0.15, 0.2, 0.6, 1]
        assert stage_grid(6, 0.2, 2 / 3).tolist() == pytest.approx(expected)

    @given(
        num_steps=st.integers(2, 60),
        boundary=st.floats(0.01, 0.99),
        share=st.floats(0.001, 0.999),
    )
    def test_the_share_is_that_of_whole_steps(self, num_steps, boundary, share):
        grid = stage_grid(num_steps, boundary, share)
        assert grid.shape == (num_steps + 1,)
        assert (grid.diff() > 0).all()
        assert (grid[0], grid[-1]) == (0, 1)
        before = int((grid < boundary - 1e-6).sum())  # steps that start before it
        assert (grid - boundary).abs().min() < 1e-6
        assert 1 <= before <= num_steps - 1
        assert abs(before - share * num_steps) <= 0.5 or before in (1, num_steps - 1)

    def test_nodes_leave_the_numbers_of_steps(self):
        """0.19 is near the boundary, which does not make room for it in the other stage."""
        grid = stage_grid(7, 0.2, 3 / 7, (0.19, 0.2, 0.25, 0.0, 1.0)).tolist()
        assert grid == pytest.approx([0, 0.2 / 3, 0.19, 0.2, 0.25, 0.6, 0.8, 1])

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ((1, 0.2, 0.5), "num_steps=1 cannot be shared out"),
            ((5, 0.0, 0.5), r"before t = 0\.0: both must lie inside"),
            ((5, 1.0, 0.5), r"before t = 1\.0"),
            ((5, 0.2, 0.0), r"share of 0\.0"),
            ((5, 0.2, math.nan), "share of nan"),
            ((5, 0.2, 0.5, (1.5,)), "got 1.5"),
            ((4, 0.2, 0.5, (0.05, 0.1)), r"num_steps=2 from t = 0 to 0\.2 have no node for each .*: take 3 steps"),
        ],
    )
    def test_what_cannot_be(self, arguments, complaint):
        with pytest.raises(ValueError, match=complaint):
            stage_grid(*arguments)


class TestEuler:
    @pytest.mark.parametrize("shift", [1.0, 3.0])
    def test_steps_on_a_linear_equation(self, shift):
        """dx/dt = (2 t - 3) x: a step of length h from t multiplies x by 1 + h (2 t - 3)."""
        grid = time_grid(7, shift).double()
        x0 = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
        factor = 1.0
        for t, h in zip(grid[:-1].tolist(), grid.diff().tolist(), strict=True):
            factor *= 1 + h * (2 * t - 3)
        result = euler(lambda x, t: (2 * t[:, None] - 3) * x, x0, grid)
        torch.testing.assert_close(result, factor * x0, rtol=1e-12, atol=0)

    def test_is_of_order_one(self):
        """The error of dx/dt = -2 t x, whose solution is exp(-t^2), halves with the step."""
        x0 = torch.ones(1, 1, dtype=torch.float64)
        errors = [
            euler(lambda x, t: -2 * t[:, None] * x, x0, time_grid(num).double()).item() - math.exp(-1)
            for num in (50, 100, 200, 400)
        ]
        ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
        assert ratios == pytest.approx([2, 2, 2], rel=0.03)

    def test_part_of_the_interval(self):
        grid = torch.tensor([0.3, 0.4, 0.8], dtype=torch.float64)
        x0 = torch.zeros(1, 1, dtype=torch.float64)
        assert euler(lambda x, t: t[:, None], x0, grid).item() == pytest.approx(0.3 * 0.1 + 0.4 * 0.4)

    def test_evaluates_once_per_step_and_never_at_the_end(self):
        seen = []

        def velocity(x, t):
            assert t.shape == (3,)
            assert t.dtype == x.dtype == torch.float32
            assert (t == t[0]).all()
            seen.append(t[0].item())
            return torch.zeros_like(x)

        grid = time_grid(9, 2.0)
        x0 = torch.randn(3, 1, 2, 2)
        assert torch.equal(euler(velocity, x0, grid), x0)
        assert seen == grid[:-1].tolist()


class TestOrder:
    """On the flow of Gaussian data, whose solution is known."""

    @every_path
    @pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (midpoint, 2)])
    def test_error_falls_with_the_order(self, path, solver, order):
        flow = GaussianFlow(path)
        # to t = 0.9: VPPath's velocity diverges at 1, and heun ends there with an Euler step, of the same order
        grids = [torch.linspace(0.1, 0.9, num + 1, dtype=torch.float64) for num in (80, 160)]
        solution = scipy.integrate.solve_ivp(
            lambda t, x: flow(torch.from_numpy(x)[:, None], torch.full((len(x),), t)).flatten().numpy(),
            (0.1, 0.9), NOISE.flatten().numpy(), rtol=1e-11, atol=1e-11,
        )  # fmt: skip
        exact = torch.from_numpy(solution.y[:, -1:])
        coarse, fine = ((solver(flow, NOISE, grid) - exact).abs().max().item() for grid in grids)
        assert coarse / fine > 0.7 * 2**order
        # two terms of the midpoint's error cancel on this flow
        assert coarse / fine < 1.4 * 2**order or (solver is midpoint and isinstance(path, LinearPath))

    @every_path
    @pytest.mark.parametrize(
        ("name", "error", "evaluations"),
        [("euler", 2e-2, 100), ("heun", 4e-3, 199), ("midpoint", 3e-4, 200), ("dopri5", 1e-4, None)],
    )
    def test_ends_at_the_data_without_asking_there(self, path, name, error, evaluations):
        flow = GaussianFlow(path)
        x = SOLVERS[name](flow, NOISE, time_grid(100).double())
        assert (x - flow.ends(NOISE)).abs().max() < error
        assert min(flow.times) >= 0
        assert max(flow.times) < 1
        assert len(flow.times) == evaluations or name == "dopri5"

    def test_the_tolerance_of_dopri5(self):
        errors = []
        for tolerance in (1e-3, 1e-7):
            flow = GaussianFlow(CosinePath())
            x = dopri5(flow, NOISE, time_grid(1).double(), tolerance)
            errors.append(((x - flow.ends(NOISE)).abs().max().item(), len(flow.times)))
        (coarse, few), (fine, many) = errors
        assert fine < 1e-6 < coarse < 1e-2
        assert few < many < 300

    @every_path
    @pytest.mark.parametrize("name", SOLVERS)
    def test_the_oracle_is_integrated_to_a_row(self, path, name):
        """float32, on a posterior that collapses: the stiffest velocity there is."""
        rows = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        oracle = Oracle(DataBank(rows), path)
        x0 = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        x = SOLVERS[name](oracle.velocity, x0, time_grid(100))
        distance = (x[:, None] - rows).flatten(2).norm(dim=2).min(1).values.max()
        # the noise of VPPath falls like sqrt(1 - t): a step to t = 1 leaves a part of what was there at its start
        left = {"euler": 0.4, "heun": 0.4, "midpoint": 0.1, "dopri5": 0.02}
        assert distance < (left[name] if isinstance(path, VPPath) else 1e-2 if isinstance(path, CosinePath) else 1e-4)

    def test_names(self):
        assert solver_named("heun") is heun
        with pytest.raises(ValueError, match="no solver 'rk45'; there are euler, heun, midpoint, dopri5"):
            solver_named("rk45")


class TestIntegrate:
    """dx/dt = 1 before 0.3, x + 1 (so that order matters) up to 0.7, -1 after it."""

    FIELDS = (
        (0.0, lambda x, t: torch.ones_like(x)),
        (0.3, lambda x, t: x + 1),
        (0.7, lambda x, t: -torch.ones_like(x)),
    )

    @pytest.mark.parametrize(("name", "error"), [("euler", 2e-2), ("heun", 2e-4), ("midpoint", 2e-4), ("dopri5", 1e-5)])
    def test_jumps_are_not_smeared(self, name, error):
        grid = time_grid(40, nodes=(0.3, 0.7)).double()
        x0 = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        expected = (x0 + 0.3 + 1) * math.exp(0.4) - 1 - 0.3
        assert (integrate(self.FIELDS, x0, grid, SOLVERS[name]) - expected).abs().max() < error

    @pytest.mark.parametrize("name", SOLVERS)
    def test_each_velocity_is_asked_within_its_part_alone(self, name):
        seen: list[list[float]] = [[], [], []]

        def field(part: int):
            return lambda x, t: seen[part].append(t[0].item()) or x

        fields = [(start, field(part)) for part, start in enumerate((0.0, 0.3, 0.7))]
        integrate(fields, torch.ones(2, 1), time_grid(9, 2.0, (0.3, 0.7)), SOLVERS[name])
        for times, (low, high) in zip(seen, pairwise((0.0, 0.3, 0.7, 1.0)), strict=True):
            assert times
            assert low - 1e-6 <= min(times) <= max(times) <= high + 1e-6

    def test_one_velocity_is_the_solver_alone(self):
        flow, x0 = GaussianFlow(LinearPath()), NOISE.float()
        assert torch.equal(integrate([(0.0, flow)], x0, time_grid(7), heun), heun(flow, x0, time_grid(7)))

    def test_a_velocity_may_begin_at_the_end(self):
        x0 = torch.zeros(1, 1)
        fields = [(0.0, lambda x, t: x + 1), (1.0, lambda x, t: x / 0)]
        assert torch.equal(integrate(fields, x0, time_grid(3), euler), euler(fields[0][1], x0, time_grid(3)))

    def test_starts_that_cannot_be(self):
        velocity = self.FIELDS[0][1]
        with pytest.raises(ValueError, match=r"begins at t = 0\.33, which is no node"):
            integrate([(0.0, velocity), (0.33, velocity)], torch.zeros(1, 1), time_grid(4), euler)
        for starts in ([], [0.5], [0.0, 0.75, 0.5]):
            with pytest.raises(ValueError, match="one after the other from t = 0 on"):
                integrate([(start, velocity) for start in starts], torch.zeros(1, 1), time_grid(4), euler)
