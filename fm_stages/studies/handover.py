"""``fm-stages handover``: the oracle draws until tau and the model after it, and the other way round.

The oracle alone ends on training images, a model that generalises does not. From the tau on at which the oracle has
bound a sample to one training image, the model that takes over should not leave it; up to the tau at which a model has
made an image of its own, the oracle that takes over still turns it into a training image. So the figure and the table
show in which stage a model generalises.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm import tqdm

from fm_stages import plots
from fm_stages.data import TrainingData, remove_parts
from fm_stages.flow import Solver, Velocity, keyed_generator, keyed_normal, solver_named, time_grid, unguided
from fm_stages.oracle import DataBank, Oracle
from fm_stages.studies.commands import check_least, command_parser, parse_options
from fm_stages.studies.memorization.measure import MEMORIZED, nearest_sources
from fm_stages.studies.models import WEIGHTS, Trained, label_rule, labels_of, load_trained
from fm_stages.studies.text_files import write_json

ORDERS = ("oracle first", "model first")
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Closeness:
    """How close images come to the training set, on average.

    Attributes:
        order: who draws first; or held-out images.
        tau: where the other takes over.
        num: images.
        distance: mean distance to the nearest training image, root mean square over the values.
        distance_sem: its standard error.
        ratio: mean of the distance to the nearest over that to the second nearest training image.
        ratio_sem: its standard error.
        memorized: share of images whose ratio is below `MEMORIZED`.
        as_oracle: share of images whose nearest training image is the one on which the oracle alone ends from the same
            noise; None for held-out images.
    """

    order: str
    tau: float | None
    num: int
    distance: float
    distance_sem: float
    ratio: float
    ratio_sem: float
    memorized: float
    as_oracle: float | None = None


@dataclass(frozen=True)
class Handover:
    """What was drawn and measured.

    Attributes:
        taus: (T) increasing, from 0 to 1.
        closeness: of each order and tau, and last of held-out images.
        images: (2, T, K, C, H, W) the first images of each order and tau.
        nearest: (2, T, K, C, H, W) the training image nearest to each.
        ratios: (2, T, K) their ratios.
    """

    taus: list[float]
    closeness: list[Closeness]
    images: Tensor
    nearest: Tensor
    ratios: Tensor


def hand_over(oracle: Velocity, model: Velocity, x0: Tensor, taus: list[float], grid: Tensor, solver: Solver) -> Tensor:
    """Integrate from noise, with a change of the velocity at each of several times.

    Args:
        oracle: one velocity.
        model: the other.
        x0: (B, ...), noise.
        taus: (T) times of the change, increasing, nodes of the grid; 0 and 1 are no change.
        grid: from 0 to 1.
        solver: of the ODE.

    Returns:
        (2, T, B, ...) the ends: with the oracle before tau, and with the model before tau.
    """
    nodes = [int((grid - tau).abs().argmin()) for tau in taus]
    ends = []
    for first, second in ((oracle, model), (model, oracle)):
        x, own = x0, []
        for last, node in pairwise([0, *nodes]):  # the way to tau is gone once for all later ones
            x = solver(first, x, grid[last : node + 1]) if node > last else x
            own.append(solver(second, x, grid[node:]) if node < len(grid) - 1 else x)
        ends.append(torch.stack(own))
    return torch.stack(ends)


@torch.no_grad()
def study_handover(
    trained: Trained,
    taus: list[float],
    num: int = 128,
    num_shown: int = 5,
    rule: str = "balanced",
    num_steps: int = 50,
    solver: Solver | None = None,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Handover:
    """Draw from the same noise with every tau, in both orders, and look for the nearest training images.

    Args:
        trained: the model; its data are read.
        taus: in [0, 1]; 0 and 1, where one draws alone, are added.
        num: noises.
        num_shown: of these, for the figure.
        rule: for the labels, as of `labels_of`; the oracle gets the same.
        num_steps: of the solver.
        solver: of the ODE; None: Euler.
        seed: of noise and held-out images.
        batch_size: noises that are drawn together.
        device: where to compute.

    Returns:
        Numbers and pictures.

    Raises:
        ValueError: if the checkpoint names no data, or its rows are distributions.
    """
    data = trained.data
    if data is None:
        raise ValueError("the checkpoint names no data, and without a training set there is no oracle to hand over to")
    taus = sorted({0.0, *taus, 1.0})
    data.setup()
    bank = data.bank().to(device)
    if not isinstance(bank, DataBank):
        raise ValueError(
            "the training set is one of distributions (moments), drawn anew at every step: no sample has a nearest row "
            "there, so there is no hand-over to measure"
        )
    oracle, network = Oracle(bank, trained.module.path), trained.network.to(device)
    grid = time_grid(num_steps, nodes=taus)
    drawn = []
    for index in tqdm(torch.arange(num).split(batch_size), desc="Handing over", unit="batch"):
        labels = labels_of(index, rule, trained.num_classes, seed).to(device)
        x0 = keyed_normal(("sample", seed), index, trained.shape).to(device)

        def exact(x: Tensor, t: Tensor, labels: Tensor = labels) -> Tensor:
            return oracle.velocity(x, t, labels)

        drawn.append(hand_over(exact, unguided(network, labels), x0, taus, grid, solver or solver_named("euler")))
    images = torch.cat(drawn, dim=2)  # (2, T, N, C, H, W)
    distance, row = nearest_sources(bank, images.flatten(0, 2), data.flip)
    distance, row = distance.unflatten(0, images.shape[:3]), row.unflatten(0, images.shape[:3])  # (2, T, N, 2)
    same = (row[..., 0] == row[0, -1, :, 0]).double().mean(-1)  # (2, T): as where the oracle draws alone
    found = [
        _closeness(order, tau, distance[i, j], same[i, j].item())
        for i, order in enumerate(ORDERS)
        for j, tau in enumerate(taus)
    ]
    held_out = _held_out(data, num, seed).to(device)
    found.append(_closeness("held-out images", None, nearest_sources(bank, held_out, data.flip)[0]))
    shown = row[:, :, :num_shown, 0]
    nearest = bank.rows(shown.flatten()).float().unflatten(0, shown.shape)
    return Handover(
        taus, found, images[:, :, :num_shown].cpu(), nearest.cpu(), _ratio(distance)[:, :, :num_shown].cpu()
    )


def _ratio(distance: Tensor) -> Tensor:
    """Nearest over second nearest (...), of distances (..., 2)."""
    return distance[..., 0] / distance[..., 1]


def _closeness(order: str, tau: float | None, distance: Tensor, as_oracle: float | None = None) -> Closeness:
    """Of distances (N, 2)."""
    (near, near_sem), (ratio, ratio_sem) = (_mean(x) for x in (distance[:, 0], _ratio(distance)))
    memorized = (_ratio(distance) < MEMORIZED).double().mean().item()
    return Closeness(order, tau, len(distance), near, near_sem, ratio, ratio_sem, memorized, as_oracle)


def _mean(x: Tensor) -> tuple[float, float]:
    """Mean (N,) and its standard error."""
    return x.mean().item(), (x.std() / len(x) ** 0.5).item() if len(x) > 1 else 0.0


def _held_out(data: TrainingData, num: int, seed: int) -> Tensor:
    """Held-out images drawn at random, (N, C, H, W)."""
    dataset: Any = data.val_dataloader().dataset
    chosen = torch.randperm(len(dataset), generator=keyed_generator("handover", seed))[:num]
    return dataset[chosen, torch.arange(len(chosen))]["x1"]


def table(found: list[Closeness]) -> str:
    """The numbers as text, a line for each tau."""
    head = f"{'':24}{'nearest':>16}{'nearest / second':>20}{'memorized':>12}{'as oracle':>12}"
    lines = [head]
    for c in found:
        name = c.order if c.tau is None else f"{c.order}, tau {c.tau:.2f}"
        numbers = f"{c.distance:9.3f} ± {c.distance_sem:.3f}{c.ratio:12.3f} ± {c.ratio_sem:.3f}{c.memorized:12.0%}"
        lines.append(f"{name:24}{numbers}" + ("" if c.as_oracle is None else f"{c.as_oracle:12.0%}"))
    return "\n".join(lines)


def handover_parser() -> ArgumentParser:
    """The options of the command."""
    parser = command_parser("handover", __doc__)
    option = parser.add_argument
    option("--ckpt", type=str, required=True, help="checkpoint of fm-stages fit")
    option("--taus", type=float, nargs="+", default=list(TAUS), help="times of the hand-over, in t")
    option("--num", type=int, default=128, help="noises, the same for every tau")
    option("--columns", type=int, default=5, help="of these in the figure")
    option("--weights", choices=[*WEIGHTS, None], default=None, help="default: ema where they are kept")
    option("--labels", type=str, default=None, help="balanced (default), drawn, null, a class, or 0,3,5")
    option("--solver", type=str, default="euler", help="euler, heun, midpoint or dopri5")
    option("--num_steps", type=int, default=50, help="solver steps")
    option("--batch_size", type=int, default=64, help="noises that are drawn together")
    option("--seed", type=int, default=0, help="of noise, and of which held-out images")
    option("--out", type=str | None, default=None, help="folder of the results; default: beside the run")
    return parser


def handover_command(arguments: list[str] | None = None) -> None:
    """The command: prints the table, writes ``handover.json`` and ``handover.png``.

    Args:
        arguments: those after ``fm-stages handover``; None: of this process.
    """
    options = _parse(arguments)
    solver = solver_named(options.solver)
    time_grid(options.num_steps, nodes=options.taus)  # refuses what cannot be
    trained = load_trained(options.ckpt, options.weights)
    rule = label_rule(options.labels, trained)
    out = Path(options.out or Path(options.ckpt).absolute().parent.parent / "handover")
    found = study_handover(
        trained, options.taus, options.num, min(options.columns, options.num), rule, options.num_steps, solver,
        options.seed, options.batch_size, "cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip
    print(f"\n{table(found.closeness)}\n")
    out.mkdir(parents=True, exist_ok=True)
    remove_parts(out)
    settings = {
        **{name: options[name] for name in ("ckpt", "num", "solver", "num_steps", "seed")},
        **{"weights": trained.weights, "step": trained.step, "labels": rule, "taus": found.taus},
    }
    closeness = [asdict(c) for c in found.closeness]
    write_json(out / "handover.json", {"settings": settings, "closeness": closeness})
    title = f"{trained.weights} weights, step {trained.step}: who draws before tau, and who after it"
    memorized = (found.ratios < MEMORIZED).numpy()
    pictures = _pictures(found.images), _pictures(found.nearest)
    figure = plots.handover(*pictures, memorized, found.taus, closeness, title)
    print(f"Figure and JSON: {plots.save(figure, out / 'handover.png').parent}")


def _parse(arguments: list[str] | None) -> Namespace:
    options = parse_options(handover_parser(), arguments)
    check_least(options, 1, "num", "columns", "batch_size")
    if wrong := [tau for tau in options.taus if not 0 <= tau <= 1]:
        raise ValueError(f"--taus {wrong[0]} must lie in [0, 1]")
    return options


def _pictures(images: Tensor) -> np.ndarray:
    """Images (..., C, H, W) to (..., H, W) or, of three channels, (..., H, W, 3)."""
    return (images.movedim(-3, -1) if images.shape[-3] == 3 else images[..., 0, :, :]).numpy()
