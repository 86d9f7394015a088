"""Each number against its definition, written out in float64, and against the libraries that are known for it."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.mifid import MemorizationInformedFrechetInceptionDistance

from fm_stages.studies.evaluate.features import moments_of
from fm_stages.studies.evaluate.metrics import (
    FAR,
    frechet_distance,
    inception_score,
    kernel_distance,
    memorization_distance,
    memorization_informed,
    precision_recall,
)
from fm_stages.studies.ranks import Job

DIMS = 24


def features(num: int, seed: int, dims: int = DIMS, rank: int | None = None, offset: float = 0.0) -> torch.Tensor:
    """Float32, with variances over two orders of magnitude, or of a low rank, far from 0 if asked for."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or dims, dims, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1, dims)
    return torch.randn(num, rank or dims, generator=generator) @ mix * (1 + 0.1 * seed) + 0.05 * seed + offset


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    a, b = (moments_of(x, Job()) for x in (one, other))
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


class Given(torch.nn.Module):
    """Features in the place of images, for torchmetrics."""

    num_features = DIMS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TestFrechetDistance:
    def test_scipy(self):
        one, other = features(500, 1).double().numpy(), features(400, 2).double().numpy()
        c1, c2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
        root = scipy.linalg.sqrtm(c1 @ c2).real
        plain = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
        assert distance(features(500, 1), features(400, 2)) == pytest.approx(plain, rel=1e-9)

    def test_torchmetrics(self):
        metric = FrechetInceptionDistance(feature=Given())
        for real, num, seed in ((True, 500, 1), (False, 400, 2)):
            for part in features(num, seed).double().split(150):
                metric.update(part, real=real)
        assert distance(features(500, 1), features(400, 2)) == pytest.approx(metric.compute().item(), rel=1e-9)

    def test_torch_fidelity(self):
        both = [fid_features_to_statistics(features(num, seed).double()) for num, seed in ((500, 1), (400, 2))]
        found = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
        assert distance(features(500, 1), features(400, 2)) == pytest.approx(found, rel=1e-9)

    @pytest.mark.parametrize(
        ("nums", "rank"),
        [((DIMS + 2, 400), None), ((DIMS // 2, 400), None), ((10, 12), None), ((400, 400), 5)],
        ids=["as many images as features", "fewer", "fewer of both", "low rank"],
    )
    def test_singular_covariances(self, nums, rank):
        """By factors of the centred features, which never square them."""
        one, other = (features(num, seed, rank=rank) for num, seed in zip(nums, (1, 2), strict=True))
        a, b = ((x.double() - x.double().mean(0)) / (len(x) - 1) ** 0.5 for x in (one, other))
        plain = (one.double().mean(0) - other.double().mean(0)).square().sum() + a.square().sum() + b.square().sum()
        plain -= 2 * torch.linalg.svdvals(a @ b.T).sum()
        assert distance(one, other) == pytest.approx(plain.item(), rel=1e-9)

    def test_far_from_zero(self):
        """The sum of squares would lose all digits of the variances."""
        near, far = ((features(300, 1).double() + c, features(300, 2).double() + c) for c in (0.0, 1e7))
        assert distance(*far) == pytest.approx(distance(*near), rel=1e-6)

    def test_the_same_images(self):
        assert 0 <= distance(features(300, 1), features(300, 1)) < 1e-10


class TestKernelDistance:
    def test_of_all_pairs(self):
        """Over subsets of half the images, whose mean is near the value of all."""
        one, other = features(60, 1).double() / 3, features(60, 2).double() / 3
        mean, std, size = kernel_distance(one, other)

        def kernel(x, y):
            return (x @ y.T / DIMS + 1) ** 3

        def off_diagonal(k):
            return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

        plain = off_diagonal(kernel(one, one)) + off_diagonal(kernel(other, other)) - 2 * kernel(one, other).mean()
        assert size == 30
        assert std > 0
        assert mean == pytest.approx(plain.item(), abs=5 * std / 10)  # 100 subsets, not independent

    def test_subsets_are_those_of_the_seed(self):
        one, other = features(60, 1), features(60, 2)
        assert kernel_distance(one, other, 0) == kernel_distance(one, other, 0) != kernel_distance(one, other, 1)

    def test_too_few(self):
        with pytest.raises(ValueError, match="KID needs 4 images or more of either kind, there are 3"):
            kernel_distance(features(3, 1), features(60, 2))


class TestPrecisionRecall:
    def test_balls(self):
        samples, real = features(80, 1, dims=4), features(90, 2, dims=4)

        def share(inside, of):
            """Of points inside a ball around a point of the other set."""
            distances = torch.tensor([[(a - b).square().sum() for b in of.double()] for a in of.double()]).sqrt()
            radius = distances.sort(1).values[:, 3]
            hits = [any((x - c).norm() <= r for c, r in zip(of.double(), radius, strict=True)) for x in inside.double()]
            return sum(hits) / len(hits)

        precision, recall = precision_recall(samples, real)
        assert precision == pytest.approx(share(samples, real), abs=1e-6)
        assert recall == pytest.approx(share(real, samples), abs=1e-6)
        assert 0 < recall < precision < 1 or 0 < precision < recall < 1

    def test_one_image_has_no_recall(self):
        samples = torch.zeros(50, 4) + features(1, 0, dims=4)
        precision, recall = precision_recall(samples, features(90, 0, dims=4))
        assert (precision, recall) == (1.0, pytest.approx(0, abs=0.02))

    def test_too_few(self):
        with pytest.raises(ValueError, match="precision and recall need 4 images or more of either kind, there are 3"):
            precision_recall(features(3, 1), features(60, 2))


class TestInceptionScore:
    def test_parts(self):
        logits = 2 * features(40, 1, dims=5)
        order = np.random.RandomState(0).permutation(40)
        p = torch.softmax(logits[order].double(), 1).view(10, 4, 5)
        kl = (p * (p / p.mean(1, keepdim=True)).log()).sum(-1).mean(1).exp()
        mean, std = inception_score(logits)
        assert mean == pytest.approx(kl.mean().item(), rel=1e-9)
        assert std == pytest.approx(kl.std(correction=0).item(), rel=1e-9)

    def test_certain_and_balanced_is_the_number_of_classes(self):
        logits = 100 * torch.eye(5).repeat(200, 1)
        assert 4.8 < inception_score(logits)[0] <= 5  # parts of 100 images are not quite balanced

    def test_too_few(self):
        with pytest.raises(ValueError, match="the Inception score needs 20 images or more, there are 19"):
            inception_score(features(19, 1))


class TestMemorizationInformed:
    @pytest.mark.parametrize("noise", [0.01, 0.3, 10.0])
    def test_torchmetrics(self, noise, monkeypatch):
        monkeypatch.setattr("fm_stages.studies.evaluate.metrics.ROWS", 70)
        real = features(300, 1)
        samples = real[:200] + noise * features(200, 2)
        samples[5] = real[7] = 0  # which have no direction
        metric = MemorizationInformedFrechetInceptionDistance(feature=Given())
        metric.update(real.double(), real=True)
        metric.update(samples.double(), real=False)
        found = memorization_distance(real, samples)
        assert memorization_informed(distance(samples, real), found) == pytest.approx(metric.compute().item(), rel=1e-7)
        if noise == 0.01:
            assert found < FAR  # so that it is divided by

    def test_equal_images_have_none(self):
        assert memorization_informed(0.0, 0.0) == 0.0
