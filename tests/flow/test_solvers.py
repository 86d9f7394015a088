"""Euler against its own closed form on a linear equation, and against the exact flow."""

import math

import pytest
import torch

from fm_stages.flow import euler, time_grid


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
