"""The memorization index over t: does a velocity follow the training images, rather than images like them?

Of two banks of equal size, T of training and H of held-out images, and x_t made from images that are in neither,

    r(t) = (E||v - u*_H||^2 - E||v - u*_T||^2) / E||u*_H - u*_T||^2.

It is 1 where v is the oracle velocity of T, -1 where it is that of H, and 0 on average where v knows no more of T than
of H. It says how far v lies along the way from u*_H to u*_T: it is 2 <v - (u*_T + u*_H) / 2, u*_T - u*_H> /
||u*_T - u*_H||^2. A training set larger than T holds other images as well, so that the oracle of all of it, the
memorizer, is below 1, at about the share of the training set that T is: a network's index is to be read beside the
memorizer's. The Wiener velocity is near 0 where training images are many; mean and covariance of a few hundred tell
something of just these, too.

Numbers are sums in units of the data: any velocity v is a prediction of the data, m = (v - B_t x_t) / A_t, and
velocities differ by A_t times what their predictions do, which diverges at t = 1. So r(t) of a bin is a ratio of means
of ||m_H - m_T||^2 and the like, which is the definition at one t and stays finite as t -> 1. As t -> 0 both oracles
tend to the means of their banks, which hardly differ: r(t) becomes the ratio of two small numbers that depend on which
images happen to be in T and H, more than on the network. Bins where E||m_H - m_T||^2 is below `LEAST` of its largest
value have no r (NaN), and the average over a stage is the ratio of two integrals over t, not the integral of the ratio,
so that early times weigh as little as they tell.

Shapes: Q images, K bins, B queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fm_stages.flow import Path, keyed_normal, keyed_uniform
from fm_stages.oracle import Oracle, Wiener, gather_objects, timestep_bins
from fm_stages.studies.memorization.references import References
from fm_stages.studies.ranks import Job

LEAST = 0.03
"""Share of the largest E||m_H - m_T||^2 of a bin below which a bin has no r."""

LATEST = 1 - 1e-4
"""The last time that is drawn: A_t is finite, and 1 - t has some digits in float32."""

BATCH = 512
"""Queries at a time."""

MEMORIZER, OWN, WIENER = "memorizer (oracle of all training images)", "oracle of T", "Wiener (no memorizer)"
"""Names of the references."""

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What the data are taken for, given x_t (B, ...), t (B,) and labels (B,): (B, ...)."""


@dataclass(frozen=True)
class Index:
    """r over t of one velocity.

    Attributes:
        r: (K) of each bin; NaN where it has none.
        sem: (K) standard errors.
        navigation: of the stage before the boundary.
        navigation_sem: its standard error; of queries, with T and H as they are.
        refinement: of the stage after it.
        refinement_sem: its standard error.
    """

    r: list[float]
    sem: list[float]
    navigation: float
    navigation_sem: float
    refinement: float
    refinement_sem: float


@dataclass(frozen=True)
class IndexCurves:
    """The index of several velocities, from the same queries.

    Attributes:
        edges: (K + 1) bin edges in t; the boundary is one of them.
        boundary: between the stages.
        num_queries: images, each once in each bin.
        difference: (K) root of E||m_H - m_T||^2 / D: how far T's and H's predictions of the data are apart.
        of: by name.
    """

    edges: list[float]
    boundary: float
    num_queries: int
    difference: list[float]
    of: dict[str, Index]

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@torch.no_grad()
def memorization_index(
    references: References,
    networks: Mapping[str, nn.Module],
    path: Path,
    label_dropout: float,
    boundary: float,
    wiener: Wiener | None = None,
    num_queries: int = 512,
    num_bins: int = 18,
    seed: int = 0,
    job: Job | None = None,
    progress: bool = False,
) -> IndexCurves:
    """Measure r over t of networks and of the references.

    Args:
        references: on the device to work on, where the networks are too.
        networks: by name, ``network(x, t, labels) -> velocity``.
        path: between noise and data.
        label_dropout: share of queries without a label, as the networks were trained; 1: all.
        boundary: between the stages; no bin lies in both.
        wiener: the linear reference, or None.
        num_queries: fresh images, each of them once in each bin; fewer if there are not as many.
        num_bins: bins in logit(t).
        seed: of noise, times and dropped labels.
        job: the ranks; each asks about a part of the images, and every rank calls this.
        progress: whether to show a bar.

    Returns:
        The same on every rank, and for any number of ranks.
    """
    job = job or Job()
    edges = timestep_bins(num_bins, boundary=boundary)
    num = min(num_queries, len(references.fresh))
    own = torch.arange(num).tensor_split(job.num_ranks)[job.rank]
    predictors = _predictors(references, networks, path, wiener)
    sums = torch.zeros(len(own), num_bins, 1 + len(predictors), dtype=torch.float64)
    queries = torch.cartesian_prod(torch.arange(len(own)), torch.arange(num_bins))  # (Q K, 2)
    with tqdm(total=len(queries), desc="Memorization index", unit="query", disable=not progress) as bar:
        for part in queries.split(BATCH):
            image, bins = part.unbind(1)
            drawn = _draw(references, own[image], bins, edges, path, label_dropout, seed)
            sums[image, bins] = _products(references, path, predictors, *drawn).cpu()
            bar.update(len(part))
    together = torch.cat(gather_objects(sums, job.group))  # (Q, K, 1 + number of predictors)
    return _curves(together, list(predictors), edges, boundary, num)


def _predictors(
    references: References, networks: Mapping[str, nn.Module], path: Path, wiener: Wiener | None
) -> dict[str, Predictor]:
    whole, own = Oracle(references.whole, path), Oracle(references.train, path)
    found: dict[str, Predictor] = {}
    for name, network in networks.items():

        def predict(x_t: Tensor, t: Tensor, labels: Tensor, network: nn.Module = network) -> Tensor:
            return path.predict_data(network(x_t, t, labels).double(), x_t.double(), t.double())

        found[name] = predict
    found[MEMORIZER] = lambda x_t, t, labels: _mean(whole, x_t, t, labels)
    found[OWN] = lambda x_t, t, labels: _mean(own, x_t, t, labels)
    if wiener is not None:
        found[WIENER] = lambda x_t, t, labels: wiener.mean(x_t, t)
    return found


def _mean(oracle: Oracle, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return oracle.posterior(x_t, t, labels).mean.double()


def _draw(
    references: References, image: Tensor, bins: Tensor, edges: list[float], path: Path, label_dropout: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t (B, ...), t (B,) and labels (B,) of images (B,) in bins (B,), the same on any number of ranks."""
    device, num_bins = references.whole.device, len(edges) - 1
    position = image * num_bins + bins
    limits = torch.tensor(edges, dtype=torch.float64).clamp(max=min(path.max_time, LATEST))
    u = keyed_uniform(("memorization index t", seed), position).double()
    t = (limits[bins] + u * (limits[bins + 1] - limits[bins])).float().to(device)
    x0 = keyed_normal(("memorization index", seed), position, references.whole.shape).to(device)
    dropped = keyed_uniform(("memorization index labels", seed), position) < label_dropout
    labels = torch.where(dropped, -1, references.fresh_labels[image]).to(device)
    return path.interpolate(x0, references.fresh[image].to(device), t), t, labels


def _products(
    references: References, path: Path, predictors: Mapping[str, Predictor], x_t: Tensor, t: Tensor, labels: Tensor
) -> Tensor:
    """||m_T - m_H||^2 / D and, of each predictor, ||m - m_H||^2 / D - ||m - m_T||^2 / D: (B, 1 + P) float64."""
    train, held_out = (_mean(Oracle(bank, path), x_t, t, labels) for bank in (references.train, references.held_out))
    away, middle = train - held_out, (train + held_out) / 2
    columns = [away.square(), *(2 * away * (m(x_t, t, labels) - middle) for m in predictors.values())]
    return torch.stack([column.flatten(1).mean(1) for column in columns], 1)


def _curves(sums: Tensor, names: list[str], edges: list[float], boundary: float, num: int) -> IndexCurves:
    """r of each velocity from numbers (Q, K, 1 + P) of each image in each bin."""
    below = sums[:, :, 0]
    means = below.mean(0)
    weak = means < LEAST * means.max()
    widths = torch.tensor(edges, dtype=torch.float64).diff()
    early = torch.tensor(edges[1:], dtype=torch.float64) <= boundary + 1e-9
    found = {}
    for i, name in enumerate(names):
        above = sums[:, :, 1 + i]
        r, sem = (torch.where(weak, math.nan, x) for x in _ratio(above, below))
        stages: list[float] = []
        for own in (early, ~early):
            value, error = _ratio((above * widths)[:, own].sum(1), (below * widths)[:, own].sum(1))
            stages += [value.item(), error.item()]
        found[name] = Index(r.tolist(), sem.tolist(), *stages)
    return IndexCurves(edges, boundary, num, means.sqrt().tolist(), found)


def _ratio(above: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of one over mean of the other, over images (Q, ...), and its standard error (delta method)."""
    ratio = above.mean(0) / below.mean(0)
    residual = above - ratio * below
    return ratio, residual.std(0) / (len(above) ** 0.5 * below.mean(0))
