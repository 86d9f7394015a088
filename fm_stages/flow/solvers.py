"""Solvers of the flow's ODE, one function per solver."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from fm_stages.flow.timesteps import shift_time


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Nodes (num_steps + 1,) of a solver from t = 0 to t = 1, uniform before the shift (> 1: more steps near noise)."""
    if num_steps < 1:
        raise ValueError(f"a solver needs at least one step, got num_steps={num_steps}")
    return shift_time(torch.linspace(0, 1, num_steps + 1), shift)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, grid: Tensor) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from ``grid[0]`` to ``grid[-1]``; one evaluation per step, none at the end.

    Args:
        velocity: maps x (B, ...) and t (B,) to a velocity (B, ...).
        x0: (B, ...), the state at ``grid[0]``.
        grid: (num_steps + 1,), increasing times.

    Returns:
        The state at ``grid[-1]``, in the shape of ``x0``.
    """
    grid = grid.to(x0.device)

    def field(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype).expand(x.shape[0]))

    # asking for the two ends alone keeps the states in between out of memory
    ends = torch.stack([grid[0], grid[-1]])
    return odeint(field, x0, ends, method="euler", options={"grid_constructor": lambda f, y0, t: grid})[-1]
