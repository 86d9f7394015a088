"""Solvers of the flow's ODE, one function per solver, and the time grids that they go along.

No solver evaluates a velocity at t = 1, where the oracle's is undefined and no network was trained on every path: a
grid that ends there ends with a step that needs only its start, or its middle.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchdiffeq import odeint

from fm_stages.flow.timesteps import shift_time

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Maps x (B, ...) and t (B,) to a velocity (B, ...)."""

Solver = Callable[[Velocity, Tensor, Tensor], Tensor]
"""Maps a velocity, the state (B, ...) at ``grid[0]`` and a grid (num_steps + 1,) to the state at ``grid[-1]``."""

TOLERANCE = 1e-5
"""Error that `dopri5` allows itself in each step, relative and absolute: root mean square over the whole batch."""

LAST_STEP = 1e-4
"""Length of the Euler step with which `dopri5` ends at t = 1."""

SAME_TIME = 1e-6
"""Times no further apart are one node: some roundings of a float32."""


def time_grid(num_steps: int, shift: float = 1.0, nodes: Sequence[float] = ()) -> Tensor:
    """Nodes of a solver from t = 0 to t = 1, uniform before the shift.

    Args:
        num_steps: number of steps.
        shift: > 1 puts more steps near noise.
        nodes: times in [0, 1] that have to be among the nodes. The nearest inner nodes move there, so that there are
            as many steps as without them.

    Returns:
        (num_steps + 1,) float32, increasing.

    Raises:
        ValueError: if there is no step, a node lies outside [0, 1], or there are too few steps for them.
    """
    if num_steps < 1:
        raise ValueError(f"a solver needs at least one step, got num_steps={num_steps}")
    return _through(shift_time(torch.linspace(0, 1, num_steps + 1), shift), nodes)


def stage_grid(num_steps: int, boundary: float, share: float, nodes: Sequence[float] = ()) -> Tensor:
    """As `time_grid`, with a chosen share of the steps before a boundary; uniform before it, and uniform after it.

    A share of one half is what arXiv 2512.02826 compares networks with (Table 1: 25 uniform steps per part).

    Args:
        num_steps: number of steps, of both stages together.
        boundary: t in (0, 1) that parts the stages; a node.
        share: of the steps that go to navigation, in (0, 1): the nearest number of whole ones, at least one in each
            stage.
        nodes: as for `time_grid`; the number of steps of each stage stays.

    Returns:
        (num_steps + 1,) float32, increasing.

    Raises:
        ValueError: if boundary or share is not inside (0, 1), a node lies outside [0, 1], or there are too few steps.
    """
    if not SAME_TIME < boundary < 1 - SAME_TIME or not 0 < share < 1:
        raise ValueError(f"a share of {share} of the steps before t = {boundary}: both must lie inside (0, 1)")
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} cannot be shared out to two stages: take 2 or more")
    num_before = min(max(round(share * num_steps), 1), num_steps - 1)
    before = _through(torch.linspace(0, boundary, num_before + 1), nodes)
    after = _through(torch.linspace(boundary, 1, num_steps - num_before + 1), nodes)
    return torch.cat([before, after[1:]])


def _through(grid: Tensor, nodes: Sequence[float]) -> Tensor:
    """A grid whose nearest inner nodes were moved to those of these times that lie within it; its ends stay."""
    if wrong := [node for node in nodes if not 0 <= node <= 1]:
        raise ValueError(f"nodes of a time grid lie in [0, 1], got {wrong[0]}")
    start, end, num_steps = grid[0].item(), grid[-1].item(), len(grid) - 1
    inner = torch.tensor(sorted(node for node in nodes if start + SAME_TIME < node < end - SAME_TIME))
    inner = inner[inner.diff(prepend=torch.tensor([start])) > SAME_TIME]
    if len(inner) >= num_steps:
        raise ValueError(
            f"num_steps={num_steps} from t = {start:g} to {end:g} have no node for each of "
            f"{', '.join(f'{node:g}' for node in inner.tolist())}: take {len(inner) + 1} steps"
        )
    distance = (inner[:, None] - grid[1:-1]).double() ** 2  # squared: the best assignment then keeps the order
    grid[1 + torch.from_numpy(linear_sum_assignment(distance)[1]).sort().values] = inner
    return grid


def integrate(fields: Sequence[tuple[float, Velocity]], x0: Tensor, grid: Tensor, solver: Solver) -> Tensor:
    """Integrate a velocity that jumps at some times, with no step across a jump.

    Args:
        fields: velocities, each with the time from which on it holds; the first from ``grid[0]`` on.
        x0: (B, ...), the state at ``grid[0]``.
        grid: (num_steps + 1,), increasing; holds these times as nodes.
        solver: of each part.

    Returns:
        The state at ``grid[-1]``.

    Raises:
        ValueError: if a velocity begins between two nodes, or they do not begin one after the other at ``grid[0]``.
    """
    starts = []
    for start, _ in fields:
        distance, node = (grid - start).abs().min(0)
        if distance > SAME_TIME:
            raise ValueError(f"a velocity begins at t = {start:g}, which is no node of the grid: time_grid takes nodes")
        starts.append(int(node))
    if not starts or starts[0] != 0 or any(a > b for a, b in pairwise(starts)):
        raise ValueError(
            f"velocities begin one after the other from t = {grid[0]:g} on, got {[start for start, _ in fields]}"
        )
    x = x0
    for (_, velocity), first, last in zip(fields, starts, [*starts[1:], len(grid) - 1], strict=True):
        if last > first:
            x = solver(velocity, x, grid[first : last + 1])
    return x


def euler(velocity: Velocity, x0: Tensor, grid: Tensor) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from ``grid[0]`` to ``grid[-1]``; one evaluation per step, none at the end.

    Args:
        velocity: maps x (B, ...) and t (B,) to a velocity (B, ...).
        x0: (B, ...), the state at ``grid[0]``.
        grid: (num_steps + 1,), increasing times.

    Returns:
        The state at ``grid[-1]``, in the shape of ``x0``.
    """
    return _along(grid, "euler", velocity, x0)


def midpoint(velocity: Velocity, x0: Tensor, grid: Tensor) -> Tensor:
    """As `euler`, of order 2: each step takes the velocity in its middle; two evaluations per step, none at the end."""
    return _along(grid, "midpoint", velocity, x0)


def heun(velocity: Velocity, x0: Tensor, grid: Tensor) -> Tensor:
    """As `euler`, of order 2: each step takes the mean velocity of its ends; two evaluations per step.

    A step that ends at t = 1 is an Euler step (one evaluation).
    """
    last = len(grid) - (2 if grid[-1] == 1 else 1)
    x = _along(grid[: last + 1], "heun2", velocity, x0)
    return euler(velocity, x, grid[last:])


def dopri5(velocity: Velocity, x0: Tensor, grid: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """As `euler`, by Dormand and Prince's method of order 5, which chooses its own steps between the grid's two ends.

    The step sizes follow the errors of the whole batch, so that a sample depends on those drawn with it, by about the
    tolerance; one that is solved alone does not.

    Args:
        velocity: as for `euler`.
        x0: as for `euler`.
        grid: its ends alone count. At t = 1 an Euler step of `LAST_STEP` ends it.
        tolerance: error of a step, relative and absolute.

    Returns:
        The state at ``grid[-1]``.
    """
    start, end = grid[0].double().cpu(), grid[-1].double().cpu()
    stop = end - LAST_STEP if end == 1 else end
    x = x0
    if stop > start:
        ends = torch.stack([start, stop]).to(x0.device)
        # times in double, whose steps cannot underflow beside t = 1; without step_t the last step would reach beyond
        # the end, and without first_step the choice of the first one might
        options = {"dtype": torch.float64, "step_t": ends[1:], "first_step": (stop - start).item() / 20}
        x = odeint(_field(velocity), x, ends, rtol=tolerance, atol=tolerance, method="dopri5", options=options)[-1]
    return euler(velocity, x, torch.stack([torch.maximum(start, stop), end])) if end == 1 else x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun, "midpoint": midpoint, "dopri5": dopri5}
"""Solvers of the ODE by what a command line or a configuration calls them."""


def solver_named(name: str) -> Solver:
    """The solver of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in SOLVERS:
        raise ValueError(f"there is no solver {name!r}; there are {', '.join(SOLVERS)}")
    return SOLVERS[name]


def _along(grid: Tensor, method: str, velocity: Velocity, x0: Tensor) -> Tensor:
    """Steps of one of torchdiffeq's methods along a grid."""
    if len(grid) < 2:
        return x0
    grid = grid.to(x0.device)
    # asking for the two ends alone keeps the states in between out of memory
    ends = torch.stack([grid[0], grid[-1]])
    return odeint(_field(velocity), x0, ends, method=method, options={"grid_constructor": lambda f, y0, t: grid})[-1]


def _field(velocity: Velocity) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity as torchdiffeq asks for it: f(t, x), with one time for all."""
    return lambda t, x: velocity(x, t.to(x.dtype).expand(x.shape[0]))
