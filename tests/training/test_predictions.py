"""One-step predictions against their definition, in float64, from all differences to all rows."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.data import pictures_of
from fm_stages.flow import CosinePath, LinearPath
from fm_stages.oracle import DataBank, GaussianMixtureBank, Oracle, StageProfile, oracle_of
from fm_stages.training import predict_data, prediction_figure, times_around

NUM_ROWS, NUM_CLASSES = 40, 3


def coefficients(path, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma and their derivatives, written again."""
    if isinstance(path, LinearPath):
        return t, 1 - t, 1.0, -1.0
    half = math.pi / 2
    return math.sin(half * t), math.cos(half * t), half * math.cos(half * t), -half * math.sin(half * t)


@pytest.fixture(scope="module")
def bank() -> DataBank:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(NUM_ROWS, 1, 4, 4, generator=generator) * 2 - 1
    return DataBank(rows, torch.arange(NUM_ROWS) % NUM_CLASSES)


@pytest.fixture(scope="module")
def measured(bank) -> StageProfile:
    return StageProfile.measure(Oracle(bank, LinearPath()), 0.1, num_queries=64)


def data(bank: DataBank) -> tuple[Tensor, Tensor]:
    index = torch.arange(bank.num_rows)
    return bank.rows(index).double().flatten(1), bank.labels_of(index)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()])
@pytest.mark.parametrize("label_dropout", [0.1, 1.0])
def test_by_definition(bank, make_network, path, label_dropout):
    network = make_network().eval()
    oracle = Oracle(bank, path)
    profile = StageProfile.measure(oracle, label_dropout, num_queries=64)
    found = predict_data({"raw": network, "twice": lambda *x: 2 * network(*x)}, oracle, profile, num_draws=5, seed=3)
    rows, labels = data(bank)
    assert found.x_t.shape == found.mean.shape == found.predicted["raw"].shape == (5, len(found.t), 1, 4, 4)
    assert found.boundary == profile.boundary
    for draw in range(5):
        same = (rows == found.x1[draw].double().flatten()).all(1)
        assert same.sum() == 1  # a training image, with its own label
        label = -1 if label_dropout == 1 else labels[same].item()
        assert found.labels[draw] == label
        allowed = torch.ones(NUM_ROWS, dtype=torch.bool) if label == -1 else labels == label
        x0 = None
        for column, t in enumerate(found.t):
            a, s, da, ds = coefficients(path, t)
            x_t = found.x_t[draw, column].double().flatten()
            noise = (x_t - a * found.x1[draw].double().flatten()) / s
            if x0 is None:
                x0 = noise  # at the first time, where it is most accurate: the others have the same
            torch.testing.assert_close(noise, x0, rtol=0, atol=1e-4)
            weight = torch.softmax(-(x_t - a * rows[allowed]).square().sum(1) / (2 * s * s), 0)
            mean = weight @ rows[allowed]
            torch.testing.assert_close(found.mean[draw, column].double().flatten(), mean, rtol=0, atol=1e-5)
            with torch.no_grad():
                v = network(found.x_t[draw, column, None], torch.tensor([t]), torch.tensor([label])).double().flatten()
            for name, velocity in (("raw", v), ("twice", 2 * v)):
                expected = (velocity - ds / s * x_t) / (da - a * ds / s)
                predicted = found.predicted[name][draw, column].double().flatten()
                torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)
                distance = (expected - mean).square().mean().sqrt().item()
                assert found.distance(name)[draw, column].item() == pytest.approx(distance, abs=1e-5)


def test_the_oracles_own_velocity_predicts_the_posterior_mean(bank, measured):
    oracle = Oracle(bank, LinearPath())
    found = predict_data({"oracle": oracle.velocity}, oracle, measured)
    assert found.distance("oracle").max() < 1e-5


def test_draws_are_those_of_the_seed(bank, measured, make_network):
    state = torch.get_rng_state()
    oracle, network = Oracle(bank, LinearPath()), {"raw": make_network().eval()}
    state = torch.get_rng_state()
    first, again, other = (predict_data(network, oracle, measured, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.predicted["raw"], again.predicted["raw"])
    assert not torch.isclose(first.x_t, other.x_t).flatten(2).all(2).any()


@pytest.mark.parametrize("boundary", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_times(boundary):
    times = times_around(boundary)
    assert times == sorted(set(times))
    assert (times[0], times[-1]) == (0, 1)
    assert boundary in times
    inner = times_around(boundary, 0.02, 0.98)
    assert inner == sorted(set(inner))
    assert (inner[0], inner[-1]) == (0.02, 0.98)
    assert (boundary in inner) == (0.02 <= boundary <= 0.98)


def test_of_moments_the_images_are_draws(make_network):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(12, 1, 4, 4, generator=generator)
    bank = GaussianMixtureBank(mean, torch.full_like(mean, 0.1))
    oracle = oracle_of(bank, LinearPath())
    profile = StageProfile.measure(oracle, 1.0, num_queries=32)
    found = predict_data({"raw": make_network().eval()}, oracle, profile)
    nearest = (found.x1[:, None] - mean).square().flatten(2).mean(2).sqrt().min(1).values
    assert (nearest < 0.2).all()
    assert (nearest > 0.05).all()
    late = found.t.index(0.98)
    torch.testing.assert_close(found.mean[:, late], found.x1, rtol=0, atol=0.1)
    to_picture, note = pictures_of(bank)
    assert note == ""
    assert prediction_figure(found, to_picture, "step 1").axes


def test_latents_of_moments_are_scaled_by_channel():
    scale = torch.tensor([5.0, 0.1, 1.0, 1.0])[:, None, None]
    mean = torch.randn(500, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    to_picture, note = pictures_of(GaussianMixtureBank(mean, torch.zeros_like(mean)))
    assert "first three of 4 channels" in note
    shown = to_picture(mean)
    assert shown.shape == (500, 4, 4, 3)
    assert shown.std((0, 1, 2)) == pytest.approx([0.4] * 3, rel=0.1)
