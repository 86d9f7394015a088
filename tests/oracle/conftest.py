"""The truth that the oracle is held against: the posterior by its definition, in float64, from all differences."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath

PATHS = [LinearPath(), CosinePath(), VPPath()]


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


@pytest.fixture(scope="session")
def brute_force() -> Callable[..., Exact]:
    return exact_posterior


@pytest.fixture(scope="session")
def path_coefficients() -> Callable[[Path, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
    return coefficients


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
