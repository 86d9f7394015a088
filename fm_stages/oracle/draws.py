"""The posterior of common draws of data and noise, at times that gather where it changes.

Shapes: Q draws, T times, R repetitions of a bootstrap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from fm_stages.flow import keyed_generator, keyed_normal
from fm_stages.oracle import ranks
from fm_stages.oracle.exact import Oracle

COLLAPSED = 0.9
"""Median top1 above which later times have nothing new to tell."""

LATEST = 1 - 2.0**-20
"""The last time that is ever measured: 1 - t still has some digits in float32."""

NARROWEST = 0.02
"""Width in logit(t) below which an interval is not halved any more: about the error of a boundary from 1000 draws."""

CHUNK = 2**22
"""Values of the queries of one call, so that working memory does not grow with Q."""


@dataclass
class Draws:
    """Statistics of Q draws at T increasing times, float64 on the CPU, the same on all ranks.

    Attributes:
        t: (T) times, exact in float32.
        values: by kind of query, and by name (top1, ess, entropy, own, floor), a tensor (T, Q).
        guidance: (T, Q) ||u*_c - u*||^2 / D, if both conditional and unconditional queries were asked; or None.
    """

    t: list[float] = field(default_factory=list)
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    guidance: Tensor | None = None


def measure_draws(
    oracle: Oracle, labels: dict[str, Tensor], index: Tensor, seed: int, num_times: int, progress: bool
) -> Draws:
    """Ask the oracle about the same draws at every time.

    The first third of the times is t = 0 and a grid even in logit(t), carried on towards t = 1 until the posterior has
    collapsed. Each further one halves the interval over which the means and medians change most.

    Args:
        oracle: of the training set.
        labels: for each kind of query the labels (Q,) to condition on, -1 for none.
        index: (Q,) training rows that the draws are made from.
        seed: of the noise.
        num_times: T, at least; more if the posterior collapses late.
        progress: whether to show a progress bar.

    Returns:
        The draws.
    """
    common = _CommonDraws(oracle, labels, index, seed)
    measured: dict[float, tuple[dict[str, dict[str, Tensor]], Tensor | None]] = {}
    latest = _float32(min(oracle.path.max_time, LATEST))  # what a time that is asked for comes back as

    with tqdm(total=num_times, desc="Stages", unit="time", disable=not progress) as bar:

        def measure(t: float) -> dict[str, dict[str, Tensor]]:
            t = min(_float32(t), latest)
            if t not in measured:
                measured[t] = common.at(t)
                bar.total = max(bar.total, len(measured))
                bar.update()
            return measured[t][0]

        measure(0.0)
        grid = torch.linspace(-5, 5, max(2, min(11, num_times // 3)), dtype=torch.float64).tolist()
        for place in grid:
            values = measure(_sigmoid(place))
        while _least_median(values) < COLLAPSED and max(measured) < latest:
            place += 1.0
            values = measure(_sigmoid(place))
        while len(measured) < num_times:
            times = sorted(measured)
            summary = torch.stack([_summary(measured[t][0]) for t in times])
            middle = _middle_of_change(times, summary)
            if middle is None:
                break  # nothing changes any more
            measure(middle)
        bar.total = len(measured)
    times = sorted(measured)
    kinds = {
        kind: {name: torch.stack([measured[t][0][kind][name] for t in times]) for name in measured[0.0][0][kind]}
        for kind in labels
    }
    differences = [measured[t][1] for t in times]
    found = [x for x in differences if x is not None]
    return Draws(times, kinds, torch.stack(found) if found else None)


class _CommonDraws:
    """Data and noise that do not change with t; each rank of a shared bank asks about its part of them."""

    def __init__(self, oracle: Oracle, labels: dict[str, Tensor], index: Tensor, seed: int) -> None:
        self.oracle, bank = oracle, oracle.bank
        self.group = bank.group
        parts = torch.arange(len(index)).tensor_split(ranks.num_ranks(self.group))
        self.sizes = [len(part) for part in parts]
        own = parts[ranks.rank_of(self.group)]
        self.labels = {kind: of_kind[own.to(of_kind.device)].to(bank.device) for kind, of_kind in labels.items()}
        self.x1 = bank.draw(index, keyed_generator("profile draws", seed))[own.to(bank.device)]
        # of all draws, as the data: a rank may have no part of them
        self.x0 = keyed_normal(("profile noise", seed), torch.arange(len(index)), bank.shape)[own].to(bank.device)
        # on every rank the same number of calls
        self.num_calls = max(1, math.ceil(max(self.sizes) * len(labels) * bank.num_dims / CHUNK))

    def at(self, time: float) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
        """Statistics (Q,) by kind and name, and the distance (Q,) between the velocities of the two kinds."""
        parts = [self._of(part, time) for part in torch.arange(len(self.x0)).tensor_split(self.num_calls)]
        columns = ranks.gather(torch.cat(parts, 0), self.sizes, self.group).cpu()  # (Q, 5 or 6 per kind)
        names = ("top1", "ess", "entropy", "own", "floor")
        kinds = list(self.labels)
        values = {
            kind: dict(zip(names, columns[:, i * len(names) : (i + 1) * len(names)].unbind(1), strict=True))
            for i, kind in enumerate(kinds)
        }
        return values, columns[:, -1] if len(kinds) == 2 else None

    def _of(self, own: Tensor, time: float) -> Tensor:
        """All of it for some of the draws, (Q', columns) float64."""
        oracle, num = self.oracle, len(own)
        own = own.to(self.x0.device)
        t = torch.full((num,), time, dtype=torch.float32, device=self.x0.device)
        x_t = oracle.path.interpolate(self.x0[own], self.x1[own], t)
        kinds = len(self.labels)
        labels = torch.cat([of_kind[own] for of_kind in self.labels.values()])
        post = oracle.posterior(x_t.repeat(kinds, *[1] * (x_t.ndim - 1)), t.repeat(kinds), labels)
        scale = oracle.path.mean_coefficient(t[:1].double()).square() / oracle.bank.num_dims

        def scaled(x: Tensor) -> Tensor:
            return torch.where(x == 0, 0.0, scale * x.double())  # the scale is infinite at t = 1

        # given x_t the row that it was made from is distributed as the posterior, so sum g_i^2 is its expected weight
        columns = [post.top1, post.ess, post.entropy, 1 / post.ess, scaled(post.variance)]
        table = torch.stack([x.double() for x in columns], 1).chunk(kinds)
        if kinds == 1:
            return table[0]
        one, other = post.mean.double().flatten(1).chunk(kinds)
        return torch.cat([*table, scaled((one - other).square().sum(1))[:, None]], 1)


def weighted_median(values: Tensor, weight: Tensor) -> Tensor:
    """Smallest of the values (..., Q) at which half of the weight (R, Q) is reached: (R, ...)."""
    ordered, place = values.sort(dim=-1)
    medians = []
    for rows, order in zip(ordered.reshape(-1, values.shape[-1]), place.reshape(-1, values.shape[-1]), strict=True):
        reached = weight[:, order].cumsum(1)
        first = (reached < 0.5 * reached[:, -1:]).sum(1)
        medians.append(rows[first.clamp(max=len(rows) - 1)])
    return torch.stack(medians, 1).reshape(len(weight), *values.shape[:-1])


def first_reaching(level: float, t: Tensor, median: Tensor) -> Tensor:
    """First time at which a median (R, T) over times (T) reaches the level, between times linear: (R,) float64.

    0 if it starts above the level, as that of a single row does; 1 if it does not get there, for at t = 1 the posterior
    of distinct rows has always collapsed.
    """
    reached = median >= level
    after = torch.where(reached.any(1), reached.int().argmax(1), len(t) - 1).clamp(min=1)[:, None]
    high, low = (median.gather(1, place)[:, 0] for place in (after, after - 1))
    t_high, t_low = t[after[:, 0]], t[after[:, 0] - 1]
    between = t_low + (t_high - t_low) * (level - low) / (high - low)
    between = torch.where(reached.any(1), between, 1.0)
    return torch.where(reached[:, 0], 0.0, between)


def _summary(values: dict[str, dict[str, Tensor]]) -> Tensor:
    """What the times gather around (S)."""
    return torch.stack(
        [
            number
            for kind in values.values()
            for number in (kind["top1"].mean(), kind["top1"].median(), kind["entropy"].mean(), kind["floor"].mean())
        ]
    )


def _middle_of_change(times: list[float], summary: Tensor) -> float | None:
    """Middle, in logit(t), of the interval over which a summary (T, S) changes most; None if none changes.

    Each column counts in units of its largest value.
    """
    change = ((summary[1:] - summary[:-1]) / summary.amax(0).clamp(min=1e-12)).abs().amax(1).tolist()
    best, middle = 1e-6, None
    for low, high, size in zip(times, times[1:], change, strict=False):
        if low == 0:
            wide, centre = high > 1e-4, high / 2
        else:
            wide = _logit(high) - _logit(low) > NARROWEST
            centre = _sigmoid((_logit(low) + _logit(high)) / 2)
        if wide and size > best and low < _float32(centre) < high:  # near t = 1 float32 has few times to choose from
            best, middle = size, centre
    return middle


def _least_median(values: dict[str, dict[str, Tensor]]) -> float:
    return min(kind["top1"].median().item() for kind in values.values())


def _float32(t: float) -> float:
    return torch.tensor(t, dtype=torch.float32).item()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(t: float) -> float:
    return math.log(t / (1 - t))
