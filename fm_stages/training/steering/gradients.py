"""What the oracle target buys: how much a sample's gradient scatters, by timestep, with either target.

The two targets share their expected gradient, so the variance is all that they differ in. The variance of a batch's
gradient is that of one sample over the batch size: regular / oracle is how many times as many samples the conditional
target needs for a gradient that is as good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from fm_stages.flow import keyed_normal, keyed_uniform
from fm_stages.oracle import Oracle, mean_square
from fm_stages.training.logs.loggers import Table


@dataclass
class GradientVariance:
    """Moments of the gradient of ||v - target||^2 / D of one sample, by timestep bin. The weighting is left out.

    Attributes:
        edges: (K + 1) bin edges.
        regular: (K) variance with the conditional target, summed over all parameters.
        oracle: (K) the same with the oracle velocity.
        mean_square: (K) squared norm of the mean gradient, which both targets share; unbiased, hence below 0 at times.
        num_samples: samples in all bins together.
    """

    edges: list[float]
    regular: list[float]
    oracle: list[float]
    mean_square: list[float]
    num_samples: int

    def ratio(self, lo: float = 0.0, hi: float = 1.0) -> float:
        """How many times as many samples the conditional target needs, over the bins inside [lo, hi].

        NaN where no gradient scatters.
        """
        inside = [k for k, (a, b) in enumerate(pairwise(self.edges)) if lo <= a and b <= hi]
        regular, oracle = sum(self.regular[k] for k in inside), sum(self.oracle[k] for k in inside)
        return regular / oracle if oracle > 0 else math.nan

    def table(self) -> Table:
        """One row for each bin."""
        columns = ["t_lo", "t_hi", "variance_regular", "variance_oracle", "mean_square"]
        numbers = zip(self.edges, self.edges[1:], self.regular, self.oracle, self.mean_square, strict=False)
        return columns, [list(row) for row in numbers]


def measure_gradient_variance(
    network: nn.Module,
    oracle: Oracle,
    x1: Tensor,
    labels: Tensor | None,
    index: Tensor | None,
    edges: Sequence[float],
    num_per_bin: int = 8,
    seed: int = 0,
    step: int = 0,
) -> GradientVariance:
    """Measure the variance on rows of a batch, taken in turn, with fresh noise and times that are uniform in each bin.

    Costs a forward and two backward passes of one sample for each of K * num_per_bin samples, and the memory of three
    gradients. Nothing of the run changes: gradients, buffers and random states stay, no hook of DDP runs, nothing is
    compiled anew; and it is float32, whatever autocast says. Ranks that share a bank call it together.

    Args:
        network: called as ``network(x_t, t, labels)``, in whatever mode it is; not sharded.
        oracle: of the training set.
        x1: (B, ...) rows of the training set. A bin with more samples than rows repeats some, and so scatters less.
        labels: (B,) int64 as the network sees them, -1 = null; None: the network and the oracle are told none.
        index: (B,) rows in the bank, where they are known.
        edges: (K + 1) increasing times.
        num_per_bin: samples in each bin.
        seed: of noise and times.
        step: other draws at each step.

    Returns:
        The moments, by bin.

    Raises:
        ValueError: if there is no row, fewer than 2 samples in a bin, or no bin.
    """
    _check(x1, edges, num_per_bin)
    path = oracle.path
    num_bins = len(edges) - 1
    sample = torch.arange(num_bins * num_per_bin)  # M samples, bin after bin
    row = (sample % len(x1)).to(x1.device)
    x1 = x1[row]
    labels, index = (None if each is None else each[row] for each in (labels, index))
    low, high = (torch.tensor(e, dtype=torch.float64)[sample // num_per_bin] for e in (edges[:-1], edges[1:]))
    u = keyed_uniform(("gradient t", seed, step), sample)
    t = (low + (high - low) * u).float().clamp(max=path.max_time).to(x1.device)
    x0 = keyed_normal(("gradient noise", seed, step), sample, tuple(x1.shape[1:]), device=x1.device).to(x1)
    device = x1.device
    with torch.autocast(device.type, enabled=False):
        x_t = path.interpolate(x0, x1, t)
        targets = (
            path.velocity(x0, x1, t),
            oracle.target(x0, x1, t, labels, index if oracle.collapses else None).to(x_t),
        )
    scatter = _Scatter(network)
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),  # for dropout
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),  # a batch of one sample would be compiled for itself
        torch.enable_grad(),
    ):
        moments = [scatter.of(part, x_t, t, labels, targets) for part in sample.split(num_per_bin)]
    regular, best, mean = torch.tensor(moments, dtype=torch.float64).T.tolist()
    return GradientVariance(list(edges), regular, best, mean, len(sample))


class _Scatter:
    """Gradients of single samples, summed as they come."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        # batch statistics of one sample are none that the network should remember
        self.buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def of(
        self, samples: Tensor, x_t: Tensor, t: Tensor, labels: Tensor | None, targets: tuple[Tensor, Tensor]
    ) -> tuple[float, float, float]:
        """Variance with either target, and squared norm of the mean gradient, over these places (n,) of the draws."""
        sums = [[torch.zeros_like(p) for p in self.parameters] for _ in targets]
        squares = [torch.zeros((), dtype=torch.float64, device=x_t.device) for _ in targets]
        for i in samples.tolist():
            one = slice(i, i + 1)
            inputs = x_t[one], t[one], None if labels is None else labels[one]
            prediction = functional_call(self.network, self.buffers, inputs)
            for last, target in enumerate(targets):
                loss = mean_square(prediction.to(target) - target[one]).sum()
                squares[last] += self._add(loss, sums[last], keep_graph=not last)
        n = len(samples)
        total = [get_total_norm(each).double().square() for each in sums]  # ||sum g||^2
        regular, best = (
            ((square - each / n) / (n - 1)).clamp(min=0).item() for square, each in zip(squares, total, strict=True)
        )
        # of the target that scatters less: the mean over all pairs of different samples
        return regular, best, ((total[1] - squares[1]) / (n * (n - 1))).item()

    def _add(self, loss: Tensor, sums: list[Tensor], keep_graph: bool) -> Tensor:
        """Add the gradient to the sums; returns its squared norm."""
        # not backward(): that would add to the run's gradients, and start DDP's reduction
        gradient = torch.autograd.grad(
            loss, self.parameters, retain_graph=keep_graph, allow_unused=True, materialize_grads=True
        )
        for total, part in zip(sums, gradient, strict=True):
            total += part
        return get_total_norm(gradient).double().square()


def _check(x1: Tensor, edges: Sequence[float], num_per_bin: int) -> None:
    """Refuse what has no variance or no bin."""
    if len(x1) == 0:
        raise ValueError("the gradient's variance is measured on rows of a batch, and x1 has none: pass at least one")
    if num_per_bin < 2:
        raise ValueError(f"num_per_bin={num_per_bin}: a variance takes at least 2 samples in each bin")
    if len(edges) < 2 or not all(0 <= a < b <= 1 for a, b in pairwise(edges)):
        raise ValueError(f"need 2 or more increasing edges in [0, 1], as timestep_bins returns them; got {list(edges)}")
