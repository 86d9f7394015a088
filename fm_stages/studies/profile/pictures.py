"""What the oracle sees of a data set, in two pictures: its posterior over t, and where its ODE leads.

Shapes: K draws, T times.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fm_stages import plots
from fm_stages.data import Pictures, pictures_of
from fm_stages.flow import euler, keyed_generator, keyed_normal, time_grid
from fm_stages.oracle import DataBank, Oracle, largest_weights, nearest_rows
from fm_stages.training import times_around

NUM_TOP = 3
"""Training images shown for each noisy one."""


def draw_pictures(
    oracle: Oracle,
    profile_boundary: float,
    out: Path,
    labels: Tensor | None = None,
    num_draws: int = 4,
    seed: int = 0,
    times: Sequence[float] | None = None,
    num_steps: int = 100,
) -> list[Path]:
    """Draw the posterior of noisy training images, and integrate the oracle's ODE from the same noise.

    Args:
        oracle: of a bank of images that is not sharded.
        profile_boundary: where the stages change.
        out: folder of the figures.
        labels: (num_draws,) int64 class of each draw, -1 = unconditional; None: all unconditional.
        num_draws: noises, each with a training image.
        seed: of the draws.
        times: shown, increasing in [0, 1]; None: around the boundary.
        num_steps: of the solver, besides the steps that end at the times shown.

    Returns:
        Paths of ``posterior.png`` and ``oracle_paths.png``; none, with a warning, for rows that are no pictures.

    Raises:
        ValueError: if there is not one label per draw, times do not increase in [0, 1], or the bank is sharded.
    """
    bank = oracle.bank
    shown = pictures_of(bank)
    if shown is None:
        warnings.warn(f"No pictures: rows of shape {bank.shape} are none, (C, H, W) or (H, W) are.", stacklevel=2)
        return []
    to_picture, note = shown
    labels = torch.full((num_draws,), -1) if labels is None else labels.cpu()
    if labels.shape != (num_draws,):
        raise ValueError(f"need one label for each of {num_draws} draws, got labels of shape {tuple(labels.shape)}")
    times = times_around(profile_boundary) if times is None else list(times)
    if not times or times[0] < 0 or times[-1] > 1 or any(a >= b for a, b in pairwise(times)):
        raise ValueError(f"times increase within [0, 1], got {times}")

    x0 = keyed_normal(("pictures", seed), torch.arange(num_draws), bank.shape).to(bank.device)
    x1 = bank.rows(_random_rows(bank, labels, seed))
    labels = labels.to(bank.device)
    whose = f"{bank.num_rows:,}".replace(",", " ") + " training images"
    whose += ("" if bool((labels == -1).all()) else ", of each draw's class") + note
    figures = {
        "posterior": plots.posterior_strips(
            *_posteriors(oracle, x0, x1, times, labels, to_picture), times,
            f"What the oracle takes a noisy image for ({whose})", profile_boundary,
        ),
        "oracle_paths": plots.oracle_paths(
            *_paths(oracle, x0, times, labels, num_steps, to_picture), times,
            f"Where the oracle's ODE leads from noise ({whose})", profile_boundary,
        ),
    }  # fmt: skip
    return [plots.save(figure, out / f"{name}.png") for name, figure in figures.items()]


def _random_rows(bank: DataBank, labels: Tensor, seed: int) -> Tensor:
    """Index (K,) of a training row for each draw, of its label."""
    generator = keyed_generator("pictures rows", seed)
    all_labels = bank.labels_of(torch.arange(bank.num_rows, device=bank.device)).cpu()
    chosen = []
    for label in labels.tolist():
        bank.slice_of(label)  # raises if there is none
        own = torch.arange(bank.num_rows) if label == -1 else (all_labels == label).nonzero()[:, 0]
        chosen.append(own[torch.randint(len(own), (), generator=generator)])
    return torch.stack(chosen)


def _posteriors(
    oracle: Oracle, x0: Tensor, x1: Tensor, times: list[float], labels: Tensor, to_picture: Pictures
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Noisy images (K, T, ...), posterior means, training images (K, T, n, ...) and their weights (K, T, n)."""
    noisy, mean, top, weights = [], [], [], []
    for time in times:
        t = torch.full((len(x0),), time, device=x0.device)
        x_t = oracle.path.interpolate(x0, x1, t)
        weight, index = largest_weights(oracle, x_t, t, NUM_TOP, labels)
        rows = to_picture(oracle.bank.rows(index.clamp(min=0).flatten()).unflatten(0, index.shape))
        rows[(index == -1).cpu().numpy()] = np.nan  # fewer rows than are shown
        noisy.append(to_picture(x_t))
        mean.append(to_picture(oracle.posterior(x_t, t, labels).mean))
        top.append(rows)
        weights.append(weight.cpu().numpy())
    return np.stack(noisy, 1), np.stack(mean, 1), np.stack(top, 1), np.stack(weights, 1)


def _paths(
    oracle: Oracle, x0: Tensor, times: list[float], labels: Tensor, num_steps: int, to_picture: Pictures
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """States of the ODE (K, T, ...), their posterior means, the nearest training images (K, ...) and distances (K,)."""
    states, mean = [], []
    for time, x in zip(times, integrate(oracle, x0, times, labels, num_steps), strict=True):
        t = torch.full((len(x0),), time, device=x0.device)
        states.append(to_picture(x))
        mean.append(to_picture(oracle.posterior(x, t, labels).mean))
    distance, index = nearest_rows(oracle.bank, x, 1, labels)
    nearest = to_picture(oracle.bank.rows(index[:, 0]))
    return np.stack(states, 1), np.stack(mean, 1), nearest, distance[:, 0].cpu().numpy()


def integrate(oracle: Oracle, x0: Tensor, times: Sequence[float], labels: Tensor, num_steps: int) -> list[Tensor]:
    """States (K, ...) of the oracle's ODE at some increasing times, from noise ``x0`` (K, ...) at t = 0 on.

    The steps are those of an even grid of ``num_steps``, cut at these times. The last one ends on the posterior mean on
    the linear path, nearly so on the cosine path (2e-4 of the rows' norm beside it with 100 steps), and not on
    `VPPath`, whose noise falls like a root there (2e-2).
    """
    even = time_grid(num_steps)
    x, states = x0, []
    for start, end in pairwise([0.0, *times]):
        if end > start:
            between = even[(even > start) & (even < end)]
            grid = torch.cat([torch.tensor([start]), between, torch.tensor([end])])
            x = euler(lambda x_t, t: oracle.velocity(x_t, t, labels), x, grid)
        states.append(x)
    return states
