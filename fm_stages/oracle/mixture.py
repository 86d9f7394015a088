"""The exact oracle of a bank whose rows are Gaussians.

What the network sees of row i is x_1 ~ N(m_i, diag d_i^2). Along x_t = a x_1 + s x_0, value by value,

    v_i = s^2 + a^2 d_i^2                                               variance of x_t given row i
    log w_i = -1/2 sum [(x_t - a m_i)^2 / v_i + log v_i] + log count    the determinant belongs to the weights
    mu_i = m_i + a d_i^2 (x_t - a m_i) / v_i                            mean of x_1 given x_t and row i
    s^2 d_i^2 / v_i                                                     its variance

so the posterior is a mixture of N(mu_i, .) with weights w_i: its mean is sum w_i mu_i, its variance that within the
rows plus that between them. Source: Bayes' rule for Gaussians; with d = 0 it is arXiv 2512.02826, Theorem 2.1.

Past the boundary one row holds the posterior, but a row is no point: the floor does not vanish there.

Shapes: B queries, N rows, C rows of a piece, D values per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fm_stages.flow import Path, expand_time
from fm_stages.oracle import ranks
from fm_stages.oracle.bank import DataBank, count_columns
from fm_stages.oracle.exact import Oracle
from fm_stages.oracle.inputs import check_tensor
from fm_stages.oracle.merge import Partial
from fm_stages.oracle.mixture_bank import GaussianMixtureBank

CPU_VALUES, GPU_VALUES = 2**18, 2**21
"""Values of pairs of a query and a row at a time, some six float64 copies of which are held: on a CPU in its caches."""

QUERIES = 16
"""Queries per such block, or more of them where that many take all rows at once."""

LEAST_LOGIT = -80.0
"""Rows this far below the largest are not summed: 10^15 of them would not change a float64 sum."""

LAST_TIME = 1 - 1e-8
"""Stands for t = 1 in targets, which then are their limit."""


class MixtureOracle(Oracle):
    """The exact oracle of a `GaussianMixtureBank`: every pair of a query and a row, in float64, nothing left out.

    Its cost is that of B N D logarithms: 60,000 rows of 784 values take 0.4 to 0.9 s per query and CPU core. ``top1``,
    ``ess`` and ``entropy`` are those of the rows' weights, which no longer say that the posterior is a point; the floor
    does. Indices of own rows are of no use to it, and `target` and `decompose` refuse them.

    Args:
        bank: the training distribution.
        path: the path that x_t was made with.
    """

    collapses = False
    takes = GaussianMixtureBank
    query_dtype = torch.float64
    bank: GaussianMixtureBank  # type: ignore[assignment]

    def __init__(self, bank: GaussianMixtureBank, path: Path) -> None:
        super().__init__(bank, path, tolerance=0.0)  # type: ignore[arg-type]

    @torch.no_grad()
    def target(
        self, x0: Tensor, x1: Tensor, t: Tensor, labels: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """See `Oracle.target`. In float64 throughout, for the posterior mean never has the bits of x1 here."""
        with ranks.together(self.bank.group) as meeting:
            if index is not None:
                self.bank.rows(index)  # raises
            check_tensor("data", x1)
            self.check(meeting, x0, t, labels, None, x1)
        wide, x0, x1 = t.double().clamp(max=LAST_TIME), x0.double(), x1.double()
        mean = self.posterior(self.path.interpolate(x0, x1, wide), wide, labels).mean
        scale = expand_time(self.path.mean_coefficient(wide), x1)
        return (self.path.velocity(x0, x1, wide) + scale * (mean - x1)).float()

    def _may_skip(self) -> bool:
        return False  # a row is no point, so that no query collapses on it

    def _partial(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Partial:
        """The posterior of queries (B, D) over the rows of this rank."""
        part = Partial.empty(x_t)
        a, s = self.coefficients(t)
        pairs = (CPU_VALUES if x_t.device.type == "cpu" else GPU_VALUES) // self.bank.num_dims
        for label in labels.unique().tolist():
            rows = self.bank.slice_of(label)
            places = torch.arange(rows.start, rows.stop, device=x_t.device)
            for queries in (labels == label).nonzero()[:, 0].split(max(QUERIES, pairs // max(len(places), 1))):
                own = part[queries]
                for place in places.split(max(1, pairs // len(queries))) if len(places) else ():
                    log_count = self.bank.log_count(place, count_columns(torch.full_like(place, label)))
                    own = own.merge(
                        _of_block(x_t[queries], a[queries], s[queries], *self.bank.moments(place), log_count, own.peak)
                    )
                part[queries] = own
        return part


def _of_block(
    x_t: Tensor, a: Tensor, s: Tensor, mean: Tensor, variance: Tensor, log_count: Tensor, peak: Tensor
) -> Partial:
    """The posterior of queries (B, D) over rows with moments (C, D); ``peak`` (B,) is the largest logit elsewhere."""
    alpha, noise = a[:, :, None], s[:, :, None].square()
    away = x_t[:, None] - alpha * mean  # (B, C, D), like all with three axes
    total = noise + alpha.square() * variance
    pull = away / total
    logits = log_count - 0.5 * (away.mul_(pull) + total.log()).sum(2)
    top = logits.amax(1)

    used = (logits >= torch.maximum(top, peak)[:, None] + LEAST_LOGIT).any(0).nonzero()[:, 0]
    if not len(used):
        return Partial.empty(x_t)
    logits, mean, variance = logits[:, used], mean[used], variance[used]
    means = mean + alpha * variance * pull[:, used]
    within = (noise * variance / total[:, used]).sum(2)
    top, first = logits.max(1)
    depth = logits - top[:, None]
    weights = depth.exp()
    best = means[torch.arange(len(means), device=first.device), first]
    away = means - best[:, None]
    return Partial(
        peak=top,
        best=best,
        weight=weights.sum(1),
        square=weights.square().sum(1),
        depth=(weights * depth).sum(1),
        moment=(weights[:, None] @ away)[:, 0],
        spread=(weights * (away.square().sum(2) + within)).sum(1),
    )


def oracle_of(bank: DataBank | GaussianMixtureBank, path: Path) -> Oracle:
    """The oracle that suits a bank: of points, or of distributions."""
    return MixtureOracle(bank, path) if isinstance(bank, GaussianMixtureBank) else Oracle(bank, path)
