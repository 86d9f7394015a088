"""Drawing images from a velocity network: the same seed and index give the same image, whatever the batch.

With a solver of fixed steps and in float32, images drawn in other batches (or on other numbers of ranks) differ by no
more than `SAME_IMAGE`: a network rounds otherwise in other batches. `dopri5` says what it guarantees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fm_stages.flow.experts import Networks, fields_of
from fm_stages.flow.generators import keyed_normal
from fm_stages.flow.guidance import Guidance
from fm_stages.flow.sde import EulerMaruyama
from fm_stages.flow.solvers import Solver, euler, integrate, time_grid

SAME_IMAGE = 1e-5
"""Largest difference of a value of an image between batches, in units of the data; 2e-6 were seen."""


@torch.no_grad()
def sample(
    network: Networks,
    labels: Tensor,
    shape: tuple[int, ...],
    seed: int = 0,
    num_steps: int = 50,
    shift: float = 1.0,
    index: Tensor | None = None,
    solver: Solver | EulerMaruyama = euler,
    guidance: Guidance | None = None,
    grid: Tensor | None = None,
) -> Tensor:
    """Images drawn from noise to data; by Euler steps, with ``num_steps`` network evaluations, unless told otherwise.

    Args:
        network: ``network(x, t, y) -> velocity``; or several, each with the time from which on it draws:
            ``[(0.0, early), (0.1, late)]``. These times become nodes of the time grid.
        labels: (B,) int64 classes, -1 = unconditional.
        shape: (C, H, W) of one image.
        seed: of the noise.
        num_steps: number of solver steps.
        shift: of the time grid, whatever the training's; > 1 puts more steps near noise.
        index: (B,) int64, the number of each image, which with the seed gives its noise; None: 0, 1, ...
        solver: of the ODE, or `EulerMaruyama` of the SDE.
        guidance: of samples with a label; None: none. The ends of its interval become nodes of the time grid.
        grid: (num_steps + 1,), another time grid than that of ``num_steps`` and ``shift``; holds all these nodes.

    Returns:
        (B, C, H, W) float32, in the units of the data the network was trained on.
    """
    index = torch.arange(labels.shape[0]) if index is None else index.cpu()
    guidance = guidance or Guidance()
    solve = solver.seeded(seed, index) if isinstance(solver, EulerMaruyama) else solver
    # drawn on the CPU, so that one seed means one picture on every machine
    x0 = keyed_normal(("sample", seed), index, shape).to(labels.device)
    fields = fields_of(network, guidance, labels)
    if grid is None:
        grid = time_grid(num_steps, shift, [start for start, _ in fields])
    return integrate(fields, x0, grid, solve)


@contextmanager
def count_evaluations(network: nn.Module) -> Iterator[list[int]]:
    """Count the network's evaluations: a list that grows by the size of each batch it was given.

    Its length is the number of evaluations; its sum that of single samples, guided ones counted twice.
    """
    sizes: list[int] = []
    hook = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()
