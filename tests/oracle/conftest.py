"""The truth that the oracle is held against: the posterior by its definition, in float64, from all differences."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath
from fm_stages.oracle import Posterior

PATHS = [LinearPath(), CosinePath(), VPPath()]
TIMES = [0.0, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999]


@dataclass
class Exact:
    """Float64 statistics; (B, D) and (B,)."""

    mean: Tensor
    top1: Tensor
    ess: Tensor
    entropy: Tensor
    variance: Tensor
    floor: Tensor  # A^2 variance / D
    velocity: Tensor  # (B, D), A m + B x_t


def coefficients(path: Path, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """alpha, sigma, A and B by the table of the design, written again: u* = A m + B x_t."""
    t = t.double()
    if isinstance(path, LinearPath):
        return t, 1 - t, 1 / (1 - t), -1 / (1 - t)
    if isinstance(path, CosinePath):
        half = math.pi / 2
        sigma = torch.sin(half * (1 - t))
        return torch.sin(half * t), sigma, half / sigma, -half * torch.sin(half * t) / sigma
    log_alpha = -((1 - t) ** 2) * 19.9 / 4 - (1 - t) * 0.05
    slope, variance = (1 - t) * 19.9 / 2 + 0.05, -torch.expm1(2 * log_alpha)
    return log_alpha.exp(), variance.sqrt(), slope * log_alpha.exp() / variance, slope - slope / variance


def exact_of_class(rows: Tensor, x_t: Tensor, t: Tensor, path: Path) -> Exact:
    """Softmax over the distinct rows, times how often each occurs, from the differences x_t - a x_i themselves."""
    distinct, count = torch.unique(rows.double().flatten(1), dim=0, return_counts=True)
    x_t = x_t.double().flatten(1)
    alpha, sigma, scale, pull = (c[:, None] for c in coefficients(path, t))
    logits = torch.stack([-(x - a * distinct).square().sum(1) for x, a in zip(x_t, alpha, strict=True)])
    logits = logits / (2 * sigma**2) + count.double().log()
    weight = torch.softmax(logits, 1)
    mean = weight @ distinct
    variance = torch.stack([w @ (distinct - m).square().sum(1) for w, m in zip(weight, mean, strict=True)])
    return Exact(
        mean=mean,
        top1=weight.max(1).values,
        ess=1 / weight.square().sum(1),
        entropy=-torch.special.xlogy(weight, weight).sum(1),
        variance=variance,
        floor=scale[:, 0] ** 2 * variance / distinct.shape[1],
        velocity=scale * mean + pull * x_t,
    )


def exact_posterior(
    rows: Tensor, labels: Tensor | None, x_t: Tensor, t: Tensor, path: Path, queries: Tensor | None = None
) -> Exact:
    """For each query over the rows of its label, or over all rows where that is -1 or missing."""
    if queries is None:
        return exact_of_class(rows, x_t, t, path)
    parts = {}
    for query in queries.unique().tolist():
        mine = queries == query
        parts[query] = exact_of_class(rows if query == -1 else rows[labels == query], x_t[mine], t[mine], path)
    joined = {}
    for name in Exact.__dataclass_fields__:
        sample = getattr(next(iter(parts.values())), name)
        joined[name] = sample.new_empty(len(queries), *sample.shape[1:])
        for query, part in parts.items():
            joined[name][queries == query] = getattr(part, name)
    return Exact(**joined)


def exact_target(rows: Tensor, x0: Tensor, x1: Tensor, t: Tensor, path: Path) -> tuple[Tensor, Tensor]:
    """u* = u_cond + A sum g_i (x_i - x1), with x_t - a x_i = s x0 + a (x1 - x_i), and u_cond; both (B, D)."""
    rows, x0, x1 = (x.double().flatten(1) for x in (rows, x0, x1))
    alpha, sigma, scale, pull = coefficients(path, t)
    towards = []
    for i in range(len(t)):
        away = rows - x1[i]
        log_weight = -(sigma[i] * x0[i] - alpha[i] * away).square().sum(1) / (2 * sigma[i] ** 2)
        towards.append(torch.softmax(log_weight, 0) @ away)
    # u_cond = a' x1 + s' x0 with s' = B s, a' = A + B a
    conditional = (scale + pull * alpha)[:, None] * x1 + (pull * sigma)[:, None] * x0
    return conditional + scale[:, None] * torch.stack(towards), conditional


def largest_errors(posterior: Posterior, truth: Exact, rows: Tensor) -> dict[str, float]:
    """Over queries, of each statistic: the mean and the variance in units of the rows' RMS norm, ess relative."""
    unit = rows.double().flatten(1).square().sum(1).mean().sqrt()
    errors = {
        "mean": (posterior.mean.double().flatten(1) - truth.mean).norm(dim=1) / unit,
        "top1": (posterior.top1 - truth.top1).abs(),
        "ess": (posterior.ess / truth.ess - 1).abs(),
        "entropy": (posterior.entropy - truth.entropy).abs(),
        "variance": (posterior.variance - truth.variance).abs() / unit**2,
    }
    return {name: error.max().item() for name, error in errors.items()}


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., Exact]:
    return exact_posterior


@pytest.fixture(scope="session")
def brute_force_target() -> Callable[..., tuple[Tensor, Tensor]]:
    return exact_target


@pytest.fixture(scope="session")
def errors_of() -> Callable[..., dict[str, float]]:
    return largest_errors


@pytest.fixture(scope="session")
def path_coefficients() -> Callable[[Path, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    return coefficients


@pytest.fixture(scope="session")
def times() -> list[float]:
    return TIMES


@pytest.fixture(params=PATHS, ids=lambda path: type(path).__name__)
def path(request) -> Path:
    return request.param


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 digits, 17 grey levels spread over [-1, 1], with exact zeros among them."""
    from sklearn.datasets import load_digits

    source = load_digits()
    return torch.from_numpy(source.images / 8 - 1).float()[:, None], torch.from_numpy(source.target).long()


@pytest.fixture(scope="session")
def fashion_mnist() -> tuple[Tensor, Tensor]:
    """The 60,000 training images in [-1, 1]."""
    folder = FilePath(os.environ.get("FM_STAGES_DATA") or "data") / "FashionMNIST/raw"
    files = [folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"]
    if not all(file.exists() for file in files):
        pytest.skip("no Fashion-MNIST files: set FM_STAGES_DATA to the folder that has them")
    pixels = np.fromfile(files[0], dtype=np.uint8)[16:].reshape(-1, 1, 28, 28)
    labels = np.fromfile(files[1], dtype=np.uint8)[8:]
    return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(labels).long()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def small(generator) -> tuple[Tensor, Tensor]:
    """60 images of 3 classes, some of them twice or more: within a class, and under two labels."""
    x = torch.randn(50, 2, 2, 2, generator=generator)
    labels = torch.arange(50) % 3
    return torch.cat([x, x[[0, 0, 1, 2, 3, 3, 3, 4, 4, 4]]]), torch.cat(
        [labels, torch.tensor([0, 0, 1, 2, 0, 1, 2, 2, 2, 1])]
    )


@pytest.fixture
def queries_of(generator) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Queries at every time, around the rows of a bank, for mixed labels."""

    def make(path: Path, x: Tensor, labels: Tensor, times: list[float] = TIMES, per_time: int = 6) -> tuple:
        t = torch.tensor(times).repeat_interleave(per_time)
        index = torch.randint(len(x), t.shape, generator=generator)
        x_t = path.interpolate(torch.randn(x[index].shape, generator=generator), x[index], t)
        asked = torch.where(torch.rand(t.shape, generator=generator) < 0.5, labels[index], -1)
        foreign = torch.rand(t.shape, generator=generator) < 0.1  # as in a sampler that is asked for any class
        asked[foreign] = (asked[foreign] + 1) % labels.max()
        shuffled = torch.randperm(len(t), generator=generator)
        return x_t[shuffled], t[shuffled], asked[shuffled]

    return make


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)
