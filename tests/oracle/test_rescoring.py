"""The queries that float32 products cannot resolve: found by a bound that holds, and scored again exactly."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, Oracle, rescoring, stream


def close_rows(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Triplets that differ by 1e-3 in one value, some of them under several labels."""
    x = torch.randn(100, 12, generator=generator)
    near, nearer = x.clone(), x.clone()
    near[:, 3] += 1e-3
    nearer[:, 7] -= 1e-3
    return torch.cat([x, near, nearer, x[:10], x[:10]]), torch.cat([torch.arange(300) % 2, torch.zeros(20).long()])


@pytest.fixture
def setting(generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows, labels, and queries at times on both sides of where the triplets come apart."""
    x, labels = close_rows(generator)
    t = 1 - torch.logspace(-0.1, -6, 80)[torch.randperm(80, generator=generator)]
    index = torch.randint(100, (80,), generator=generator)
    x_t = LinearPath().interpolate(torch.randn(80, 12, generator=generator), x[index], t)
    return x, labels, x_t, t, torch.where(torch.arange(80) % 2 == 0, labels[index], -1)


def assert_true(posterior, truth, t: Tensor) -> None:
    assert (posterior.mean.double() - truth.mean).norm(dim=1).max() < 1e-5 * math.sqrt(12)
    assert (posterior.top1 - truth.top1).abs().max() < 1e-3
    assert (posterior.ess / truth.ess - 1).abs().max() < 1e-3
    assert (posterior.entropy - truth.entropy).abs().max() < 2e-3
    floor = posterior.variance / (1 - t.double()) ** 2 / 12
    assert (floor - truth.floor).abs().max() < 1e-3


def test_close_rows_of_mixed_labels(setting, brute_force):
    x, labels, x_t, t, asked = setting
    truth = brute_force(x, labels, x_t, t, LinearPath(), asked)
    assert ((truth.top1 > 0.4) & (truth.top1 < 0.95)).sum() > 15
    assert_true(Oracle(DataBank(x, labels), LinearPath()).posterior(x_t, t, asked), truth, t)


@pytest.mark.parametrize("max_values", [1, 50])
def test_by_pieces(setting, brute_force, max_values, monkeypatch):
    x, labels, x_t, t, asked = setting
    monkeypatch.setattr(rescoring, "MAX_VALUES", max_values)
    truth = brute_force(x, labels, x_t, t, LinearPath(), asked)
    assert_true(Oracle(DataBank(x, labels), LinearPath()).posterior(x_t, t, asked), truth, t)


def test_everything_may_be_scored_again(setting, brute_force, monkeypatch):
    """Also where nothing had to be: both ways give the truth, and the second one to more digits."""
    x, labels, x_t, t, asked = setting
    monkeypatch.setattr(stream, "COARSE", 0.0)
    truth = brute_force(x, labels, x_t, t, LinearPath(), asked)
    posterior = Oracle(DataBank(x, labels), LinearPath()).posterior(x_t, t, asked)
    assert (posterior.top1 - truth.top1).abs().max() < 1e-6
    torch.testing.assert_close(posterior.mean.double(), truth.mean, rtol=0, atol=1e-6)
    assert (posterior.entropy - truth.entropy).abs().max() < 1e-5


def test_without_it_close_rows_are_confused(setting, brute_force, monkeypatch):
    x, labels, x_t, t, asked = setting
    monkeypatch.setattr(stream, "COARSE", math.inf)
    truth = brute_force(x, labels, x_t, t, LinearPath(), asked)
    posterior = Oracle(DataBank(x, labels), LinearPath(), tolerance=0).posterior(x_t, t, asked)
    assert (posterior.top1 - truth.top1).abs().max() > 0.1


def test_pieces_of_the_bank_change_nothing(setting, brute_force, monkeypatch):
    """The best row of a query may come after rows that were taken for possible ones."""
    x, labels, x_t, t, asked = setting
    monkeypatch.setattr(stream, "CPU_VALUES", 1)
    monkeypatch.setattr(stream, "BLOCK", 7)
    truth = brute_force(x, labels, x_t, t, LinearPath(), asked)
    assert_true(Oracle(DataBank(x, labels), LinearPath()).posterior(x_t, t, asked), truth, t)


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_rows_of_one_query_may_be_summed_both_ways(most, setting, brute_force, monkeypatch):
    """Where one piece of the bank holds too many rows to be scored again and another one does not."""
    x, labels, x_t, t, asked = setting
    clear = t < 0.97  # from there on only scoring again resolves the triplets
    monkeypatch.setattr(stream, "CPU_VALUES", 1)
    monkeypatch.setattr(stream, "BLOCK", 7)
    monkeypatch.setattr(stream, "MAX_CANDIDATES", most)
    monkeypatch.setattr(stream, "FEW", most)
    truth = brute_force(x, labels, x_t[clear], t[clear], LinearPath(), asked[clear])
    posterior = Oracle(DataBank(x, labels), LinearPath()).posterior(x_t[clear], t[clear], asked[clear])
    assert_true(posterior, truth, t[clear])


@pytest.mark.parametrize("t", [0.9, 0.97, 0.99])
def test_queries_in_the_middle_of_rows_on_a_sphere(t, brute_force, generator):
    """Where a sampler may pass: the product with x_t - a mean is 0, and a^2 ||x_i||^2 / s^2 is not."""
    x = torch.nn.functional.normalize(torch.randn(400, 300, generator=generator)) * 17
    x, t = torch.cat([x, -x]), torch.full((8,), t)
    x_t = 1e-4 * (1 - t[:, None]) * torch.randn(8, 300, generator=generator)
    truth = brute_force(x, None, x_t, t, LinearPath())
    posterior = Oracle(DataBank(x), LinearPath()).posterior(x_t, t)
    assert (posterior.mean.double() - truth.mean).norm(dim=1).max() / 17 < 1e-5
