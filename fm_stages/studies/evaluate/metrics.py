"""The numbers that compare images with real ones, each a function of features alone."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

SUBSETS, SUBSET = 100, 1000
"""Of KID: how many subsets, and the images in each, as published; fewer images make smaller subsets."""

NEIGHBOUR = 3
"""Of precision and recall: the neighbour whose distance is the radius."""

SPLITS = 10
"""Of the Inception score."""

FAR = 0.1
"""Of MIFID: a mean distance above it counts as 1, as in torchmetrics."""

ROWS = 2048


def has_fidelity() -> bool:
    """Whether torch-fidelity is installed, which knows KID, Inception score, precision and recall."""
    return importlib.util.find_spec("torch_fidelity") is not None


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians: FID, where they are the moments of features.

    The trace of the root of C1 C2 is the sum of the singular values of R1^T R2 with C = R R^T. The roots are taken of
    symmetric matrices, so that singular ones, as those of fewer images than features, cost no digits. The eigenvalues
    of C1 C2, which is what is usually taken, gave a result off by 6e-5 for covariances of rank 10 in 128 features.

    Args:
        mean1: (F,) float64.
        covariance1: (F, F) float64.
        mean2: as mean1.
        covariance2: as covariance1.

    Returns:
        The distance, 0 or more.

    Source: arXiv 1706.08500.
    """
    shared = torch.linalg.svdvals(_root(covariance1).T @ _root(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """R with R R^T = C; what is 0 but for rounding is 0."""
    values, vectors = torch.linalg.eigh(covariance)
    smallest = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors * torch.where(values > smallest, values, 0).sqrt()


def kernel_distance(samples: Tensor, real: Tensor, seed: int = 0) -> tuple[float, float, int]:
    """KID, by torch-fidelity: squared MMD with a cubic kernel; unbiased, so that it may be below 0.

    Args:
        samples: (N, F) features.
        real: (M, F) features.
        seed: of the subsets.

    Returns:
        The mean over `SUBSETS` subsets, their standard deviation, and the images in each: at most half of the smaller
        set, for subsets that are the same do not differ.

    Raises:
        ValueError: if there are fewer than 4 of either.

    Source: arXiv 1801.01401.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    fewer = min(len(samples), len(real))
    if fewer < 4:
        raise ValueError(f"KID needs 4 images or more of either kind, there are {fewer}")
    size = min(SUBSET, fewer // 2)
    found = kid_features_to_metric(
        samples.double().cpu(),
        real.double().cpu(),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    """Inception score of logits (N, K), by torch-fidelity: mean and standard deviation over `SPLITS` parts.

    Raises:
        ValueError: if there are fewer than 2 images to a part.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < 2 * SPLITS:
        raise ValueError(f"the Inception score needs {2 * SPLITS} images or more, there are {len(logits)}")
    found = isc_features_to_metric(logits, SPLITS, True, seed)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]


def precision_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of samples inside the balls of real images, and of real ones inside those of samples, by torch-fidelity.

    A ball reaches to the third neighbour among its own kind. Both shares grow with the numbers of images.

    Args:
        samples: (N, F) features.
        real: (M, F) features.

    Raises:
        ValueError: if there are too few for a third neighbour.

    Source: arXiv 1904.06991.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    fewer = min(len(samples), len(real))
    if fewer <= NEIGHBOUR:
        raise ValueError(f"precision and recall need {NEIGHBOUR + 1} images or more of either kind, there are {fewer}")
    settings = {"prc_neighborhood": NEIGHBOUR, "prc_batch_size": ROWS, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(samples.double(), real.double(), **settings)  # float32 loses digits of distances
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def memorization_distance(real: Tensor, samples: Tensor) -> float:
    """What torchmetrics divides FID by for MIFID: mean over real images of the cosine distance to the nearest sample.

    As `MemorizationInformedFrechetInceptionDistance`, which holds all pairs at once, by blocks. Features without a sum
    are left out, as there.

    Args:
        real: (M, F) features of training images.
        samples: (N, F) features.

    Returns:
        The distance, in [0, 1].

    Raises:
        ValueError: if all of either kind are left out.
    """
    real, samples = (x.double() for x in (real, samples))
    real, samples = (x[x.sum(1) != 0] for x in (real, samples))
    if not len(real) or not len(samples):
        raise ValueError("all features of one kind of images sum to 0, so that they have no cosines")
    real, samples = (x / x.norm(dim=1, keepdim=True) for x in (real, samples))
    nearest = []
    for part in real.split(ROWS):
        cosines = [(part @ others.T).abs().amax(1) for others in samples.split(ROWS)]
        nearest.append(1 - torch.stack(cosines).amax(0))
    return float(torch.cat(nearest).mean())


def memorization_informed(frechet: float, distance: float) -> float:
    """MIFID of a FID and a `memorization_distance`, both to the training images, as torchmetrics puts them together."""
    return frechet / (distance + 1e-14) if frechet > 1e-8 and distance < FAR else frechet if frechet > 1e-8 else 0.0
