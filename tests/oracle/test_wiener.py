"""The Wiener reference against its formula, solved in float64, and against every other linear estimate."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, Oracle, Wiener, linear_reference, wiener


def solved(rows: Tensor, x_t: Tensor, t: Tensor, coefficients, path: Path) -> Tensor:
    """m = mu + a C (a^2 C + s^2 I)^-1 (x_t - a mu), one linear system per query: (B, D) float64."""
    flat = rows.double().flatten(1).numpy()
    mu, covariance = flat.mean(0), np.cov(flat.T, bias=True).reshape(flat.shape[1], -1)
    means = []
    for x, a, s in zip(x_t.double().flatten(1).numpy(), *(c.tolist() for c in coefficients(path, t)[:2]), strict=True):
        system = a**2 * covariance + s**2 * np.eye(len(mu))
        means.append(mu + a * covariance @ np.linalg.solve(system, x - a * mu))
    return torch.from_numpy(np.stack(means))


def test_is_the_closed_formula(digits, path, path_coefficients, generator):
    """On digits, some of whose pixels are constant: their eigenvalues are 0."""
    rows = torch.cat([digits[0], digits[0][:200]])  # copies count
    t = torch.tensor([0.0, 1e-4, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999]).repeat(3)
    index = torch.randint(len(rows), t.shape, generator=generator)
    x_t = path.interpolate(torch.randn(len(t), 1, 8, 8, generator=generator), rows[index], t)
    bank = DataBank(rows)
    mean = Wiener(bank, path).mean(x_t, t)
    assert mean.shape == x_t.shape
    assert mean.dtype == torch.float64  # it is multiplied by A_t, which grows like 1 / (1 - t)
    error = (mean.flatten(1) - solved(rows, x_t, t, path_coefficients, path)).norm(dim=1)
    assert error.max() / bank.rms_norm < 1e-7


def test_labels_make_no_difference(digits, generator):
    x, labels = digits
    x_t, t = torch.randn(5, 1, 8, 8, generator=generator), torch.linspace(0.1, 0.9, 5)
    # an image under two labels: the whole bank counts it twice
    with_labels = DataBank(torch.cat([x, x[:50]]), torch.cat([labels, 9 - labels[:50]]))
    without = DataBank(torch.cat([x, x[:50]]))
    path = LinearPath()
    torch.testing.assert_close(
        Wiener(with_labels, path).mean(x_t, t), Wiener(without, path).mean(x_t, t), rtol=1e-4, atol=1e-5
    )


def test_no_linear_estimate_is_better(path, generator):
    """The mean square error of any perturbed gain or offset is larger, on a bank that is far from Gaussian."""
    num, dims = 20_000, 5
    rows = torch.randn(num, dims, generator=generator).abs() @ torch.randn(dims, dims, generator=generator)
    bank, t = DataBank(rows), torch.full((num,), 0.7 if isinstance(path, VPPath) else 0.5)
    x_t = path.interpolate(torch.randn(num, dims, generator=generator), rows, t)
    best = Wiener(bank, path).mean(x_t, t)

    def loss(mean: Tensor) -> Tensor:  # (num,)
        return (mean.double() - rows).square().mean(1)

    for _ in range(8):
        direction = torch.randn(dims + 1, dims, generator=generator)
        change = 0.1 * (x_t @ direction[:dims] + direction[dims])
        worse = loss(best + change) - loss(best)
        # the expected rise is the size of the change itself: the errors are uncorrelated with x_t
        assert worse.mean().item() == pytest.approx(change.square().mean().item(), rel=0.2)
        assert worse.mean() > 4 * worse.std() / num**0.5


def test_is_the_oracle_of_a_gaussian_bank(generator):
    """Where the data are Gaussian, the posterior mean is linear: the two agree up to the spread of the sample."""
    factor = torch.tensor([[1.0, 0.4], [0.0, 0.5]])
    rows = torch.randn(20_000, 2, generator=generator) @ factor + torch.tensor([0.5, -1.0])
    path, bank = LinearPath(), DataBank(rows)
    t = torch.full((200,), 0.4)
    x_t = path.interpolate(torch.randn(200, 2, generator=generator), rows[:200], t)
    difference = Wiener(bank, path).mean(x_t, t) - Oracle(bank, path).posterior(x_t, t).mean
    assert difference.norm(dim=1).median() < 0.02


def test_ends(digits, path):
    bank = DataBank(digits[0])
    reference = Wiener(bank, path)
    x = digits[0][:6]
    torch.testing.assert_close(reference.mean(x, torch.ones(6)).float(), x, rtol=0, atol=1e-6)
    if not isinstance(path, VPPath):
        mean = bank.mean.view(1, 1, 8, 8).expand(6, 1, 8, 8)
        torch.testing.assert_close(reference.mean(x, torch.zeros(6)), mean, rtol=0, atol=1e-6)


def test_banks_without_spread(path, generator):
    x_t, t = torch.randn(4, 1, 2, 2, generator=generator), torch.linspace(0.0, 1.0, 4)
    for rows in (torch.full((1, 1, 2, 2), 0.3), torch.full((7, 1, 2, 2), 0.3)):
        mean = Wiener(DataBank(rows), path).mean(x_t, t)
        torch.testing.assert_close(mean, torch.full((4, 1, 2, 2), 0.3).double(), rtol=0, atol=1e-6)


def test_one_value_per_row(path_coefficients, path, generator):
    rows = torch.randn(30, 1, generator=generator)
    t, x_t = torch.linspace(0, 0.99, 10), torch.randn(10, 1, generator=generator)
    mean = Wiener(DataBank(rows), path).mean(x_t, t)
    torch.testing.assert_close(mean.double(), solved(rows, x_t, t, path_coefficients, path), rtol=0, atol=1e-6)


def test_lower_precision_does_not_reach_it(digits, path_coefficients, generator):
    path, rows = LinearPath(), digits[0]
    reference = Wiener(DataBank(rows), path)
    t, x_t = torch.linspace(0, 0.99, 20), torch.randn(20, 1, 8, 8, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        mean = reference.mean(x_t, t)
    error = mean.flatten(1) - solved(rows, x_t, t, path_coefficients, path)
    assert error.abs().max() < 1e-6


def test_too_many_values_raise(digits, monkeypatch):
    monkeypatch.setattr(wiener, "MAX_DIMS", 64)
    Wiener(DataBank(digits[0]), LinearPath())
    monkeypatch.setattr(wiener, "MAX_DIMS", 63)
    with pytest.raises(ValueError, match="D = 64 > 63"):
        Wiener(DataBank(digits[0]), LinearPath())


def test_where_there_is_none_a_warning_says_why(digits, monkeypatch):
    bank = DataBank(digits[0])
    assert isinstance(linear_reference(bank, LinearPath()), Wiener)
    monkeypatch.setattr(wiener, "MAX_DIMS", 63)
    with pytest.warns(UserWarning, match="No linear reference .*D = 64 > 63"):
        assert linear_reference(bank, LinearPath()) is None
