"""What networks and the oracle take noisy training images for, in one step, from noise to data.

Shapes: K draws, T times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fm_stages import plots
from fm_stages.data import Pictures
from fm_stages.flow import keyed_generator, keyed_normal, unguided
from fm_stages.oracle import Oracle, StageProfile
from fm_stages.training.logs.loggers import Table

EARLY, LATE = (0, 0.4, 0.6, 0.8), (0, 0.1, 0.25, 0.5, 0.75, 1)
"""Times shown, as shares of the way to the boundary, and of the way from it to 1: close together where the stages
change."""

FIRST, LAST = 0.02, 0.98
"""The times nearest to noise and data. At t = 1 itself every prediction is x_t, whatever the network says, and at
t = 0 some paths divide by the little data that x_t holds."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of the data from the same x_t, by t.

    Attributes:
        t: (T,) times, increasing.
        boundary: between the stages.
        x1: (K, ...) training images.
        labels: (K,) int64 as networks and oracle are given them, -1 = none.
        x_t: (K, T, ...) these images under noise.
        mean: (K, T, ...) the oracle's: the posterior mean.
        predicted: (K, T, ...) by network.
    """

    t: list[float]
    boundary: float
    x1: Tensor
    labels: Tensor
    x_t: Tensor
    mean: Tensor
    predicted: dict[str, Tensor]

    def distance(self, name: str) -> Tensor:
        """Between a network's predictions and the oracle's, root mean square over the values: (K, T).

        Its square, times A_t^2, is the gap of that draw.
        """
        return (self.predicted[name] - self.mean).flatten(2).square().mean(2).sqrt()

    def table(self) -> Table:
        """One row for each draw and time: its label, and each network's `distance`."""
        names = list(self.predicted)
        distances = [self.distance(name).tolist() for name in names]
        rows = [
            [k, label, t, *(of_network[k][i] for of_network in distances)]
            for k, label in enumerate(self.labels.tolist())
            for i, t in enumerate(self.t)
        ]
        return ["draw", "label", "t", *(f"distance_{name}" for name in names)], rows


@torch.no_grad()
def predict_data(
    networks: Mapping[str, nn.Module], oracle: Oracle, profile: StageProfile, num_draws: int = 4, seed: int = 0
) -> Predictions:
    """Ask networks and oracle for the data in noisy training images, all for the same ones.

    Images and noise depend on seed and bank alone. The label is the image's own, or none where the networks see none.

    Args:
        networks: by name, in evaluation mode, on the device of the oracle's bank.
        oracle: of the training set. If its bank is sharded every rank calls this.
        profile: says where the stages change, and whether the networks see labels.
        num_draws: K, training images, each with a noise.
        seed: of both.
    """
    bank, path = oracle.bank, oracle.path
    generator = keyed_generator("predictions", seed)
    index = torch.randint(bank.num_rows, (num_draws,), generator=generator)
    x1 = bank.draw(index, generator)
    labels = bank.labels_of(index) if profile.label_dropout < 1 else torch.full_like(index, -1, device=bank.device)
    x0 = keyed_normal(("predictions", seed), torch.arange(num_draws), bank.shape).to(bank.device)

    times = times_around(profile.boundary, FIRST, LAST)
    t = torch.tensor(times, device=bank.device).repeat(num_draws)  # (K * T,)
    each = labels.repeat_interleave(len(times))
    x_t = path.interpolate(x0.repeat_interleave(len(times), 0), x1.repeat_interleave(len(times), 0), t)
    by_time = (num_draws, len(times))
    return Predictions(
        t=times,
        boundary=profile.boundary,
        x1=x1,
        labels=labels,
        x_t=x_t.unflatten(0, by_time),
        mean=oracle.posterior(x_t, t, each).mean.unflatten(0, by_time),
        predicted={
            name: path.predict_data(unguided(network, each)(x_t, t), x_t, t).unflatten(0, by_time)
            for name, network in networks.items()
        },
    )


def prediction_figure(found: Predictions, to_picture: Pictures, step: str, note: str = "") -> Figure:
    """The figure; ``to_picture`` and ``note`` as `fm_stages.data.pictures_of` gives them."""
    return plots.prediction_strips(
        to_picture(found.x_t),
        to_picture(found.mean),
        {name: to_picture(x) for name, x in found.predicted.items()},
        {name: found.distance(name).cpu().numpy() for name in found.predicted},
        to_picture(found.x1),
        ["no label" if label == -1 else f"class {label}" for label in found.labels.tolist()],
        found.t,
        f"One-step predictions of the data from noisy training images, beside the oracle's ({step}{note})",
        found.boundary,
    )


def times_around(boundary: float, first: float = 0.0, last: float = 1.0) -> list[float]:
    """Times from the first to the last, close together around the boundary, which is one of them if it lies between."""
    times = [share * boundary for share in EARLY] + [boundary + share * (1 - boundary) for share in LATE]
    return sorted({min(max(time, first), last) for time in times})
