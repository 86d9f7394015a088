"""The oracle of Gaussian mixtures against its formulas in float64, against draws, and against the oracle of points."""

import copy
import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, GaussianMixtureBank, MixtureOracle, Oracle, Wiener, decompose, mixture

TIMES = [0.0, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999]
STATISTICS = ["mean", "top1", "ess", "entropy", "variance"]


def by_precision(mean: Tensor, std: Tensor, x_t: Tensor, t: Tensor, coefficients, path: Path) -> dict[str, Tensor]:
    """The posterior from densities and from precisions, which add up: 1/std^2 + a^2/s^2; no two rows are equal."""
    mean, std, x_t = (x.double().flatten(1) for x in (mean, std, x_t))
    found: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    for x, a, s in zip(x_t, *(c.tolist() for c in coefficients(path, t)[:2]), strict=True):
        marginal = torch.distributions.Normal(a * mean, (s**2 + (a * std) ** 2).sqrt())
        weight = torch.softmax(marginal.log_prob(x).sum(1), 0)
        precision = 1 / std**2 + a**2 / s**2
        centre = (mean / std**2 + a * x / s**2) / precision
        m = weight @ centre
        found["mean"].append(m)
        found["top1"].append(weight.max())
        found["ess"].append(1 / weight.square().sum())
        found["entropy"].append(-torch.special.xlogy(weight, weight).sum())
        found["variance"].append(weight @ ((centre - m).square() + 1 / precision).sum(1))
    return {name: torch.stack(values) for name, values in found.items()}


def assert_is(posterior, truth: dict[str, Tensor], rows=slice(None), tol: float = 1e-5) -> None:
    torch.testing.assert_close(posterior.mean[rows].double().flatten(1), truth["mean"], rtol=tol, atol=tol)
    for name in STATISTICS[1:]:
        torch.testing.assert_close(getattr(posterior, name)[rows].double(), truth[name], rtol=tol, atol=tol)


@pytest.fixture
def moments(generator) -> tuple[Tensor, Tensor, Tensor]:
    """60 rows of 3 classes; stds from 1e-3 to 1, as a VAE's: sharp where the image is, broad where it says nothing."""
    mean = torch.randn(60, 2, 2, 2, generator=generator)
    std = 10 ** (-3 * torch.rand(60, 2, 2, 2, generator=generator))
    return mean, std, torch.arange(60) % 3


def queries(bank: GaussianMixtureBank, path: Path, t: Tensor, generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, data and x_t of training rows."""
    index = torch.randint(len(bank), t.shape, generator=generator)
    x1 = bank.draw(index, generator)
    x0 = torch.randn(x1.shape, generator=generator)
    return x0, x1, path.interpolate(x0, x1, t)


class TestAgainstFloat64:
    def test_all_times_and_labels(self, moments, path, path_coefficients, generator):
        mean, std, labels = moments
        bank = GaussianMixtureBank(mean, std, labels)
        t = torch.tensor(TIMES).repeat(8)
        _, _, x_t = queries(bank, path, t, generator)
        asked = torch.randint(-1, 3, t.shape, generator=generator)
        posterior = MixtureOracle(bank, path).posterior(x_t, t, asked)
        assert posterior.mean.shape == x_t.shape
        assert (posterior.top1 < 0.9).sum() > 20  # the comparison is not about single rows alone
        for label in range(-1, 3):
            of, mine = (slice(None) if label == -1 else labels == label), asked == label
            truth = by_precision(mean[of], std[of], x_t[mine], t[mine], path_coefficients, path)
            assert_is(posterior, truth, mine)

    @pytest.mark.parametrize("values", [1, 17, 1000])
    def test_pieces_make_no_difference(self, moments, values, monkeypatch, generator):
        mean, std, labels = moments
        t = torch.tensor(TIMES).repeat(3)
        bank, path = GaussianMixtureBank(mean, std, labels), LinearPath()
        _, _, x_t = queries(bank, path, t, generator)
        whole = MixtureOracle(bank, path).posterior(x_t, t)
        monkeypatch.setattr(mixture, "CPU_VALUES", values)
        monkeypatch.setattr(mixture, "QUERIES", 3)
        parts = MixtureOracle(bank, path).posterior(x_t, t)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-6)

    def test_far_from_all_rows(self, moments, path, path_coefficients, generator):
        mean, std, _ = moments
        x_t, t = 100 * torch.randn(30, 2, 2, 2, generator=generator), torch.linspace(0.01, 0.95, 30)
        posterior = MixtureOracle(GaussianMixtureBank(mean, std), path).posterior(x_t, t)
        truth = by_precision(mean, std, x_t, t, path_coefficients, path)
        assert_is(posterior, truth)

    def test_the_determinant_belongs_to_the_weights(self):
        """At the common mean of a sharp and a broad row the sharp one is the more likely, by the ratio of widths."""
        bank = GaussianMixtureBank(torch.zeros(2, 1), torch.tensor([[0.0], [3.0]]))
        posterior = MixtureOracle(bank, LinearPath()).posterior(torch.zeros(1, 1), torch.tensor([0.5]))
        ratio = math.sqrt(0.25 + 0.25 * 9) / 0.5
        assert posterior.top1.item() == pytest.approx(ratio / (1 + ratio), rel=1e-6)

    def test_copies_weigh_as_copies(self, moments, generator):
        mean, std, labels = moments
        path, t = LinearPath(), torch.full((20,), 0.2)
        copies = torch.tensor([0, 0, 1, 2, 2, 2])
        bank = GaussianMixtureBank(torch.cat([mean, mean[copies]]), torch.cat([std, std[copies]]))
        assert (len(bank), bank.num_distinct) == (66, 60)
        _, _, x_t = queries(bank, path, t, generator)
        posterior = MixtureOracle(bank, path).posterior(x_t, t)
        # copies that are told apart by a change that is too small to matter
        nudged = torch.cat([mean, mean[copies] + 1e-6 * torch.arange(1, 7).view(6, 1, 1, 1)])
        apart = MixtureOracle(GaussianMixtureBank(nudged, torch.cat([std, std[copies]])), path).posterior(x_t, t)
        torch.testing.assert_close(posterior.mean, apart.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(posterior.variance, apart.variance, rtol=1e-3, atol=1e-4)
        assert (posterior.top1 >= apart.top1 - 1e-4).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_rows_as_they_come(self, moments, dtype, path_coefficients, generator):
        mean, std, _ = (x.to(dtype) for x in moments)
        path, t = LinearPath(), torch.tensor(TIMES)
        bank = GaussianMixtureBank(mean, std)
        _, _, x_t = queries(bank, path, t, generator)
        truth = by_precision(mean, std, x_t, t, path_coefficients, path)
        assert_is(MixtureOracle(bank, path).posterior(x_t, t), truth)

    def test_scale_and_shift(self, moments, path_coefficients, generator):
        mean, std, _ = moments
        path, t = LinearPath(), torch.tensor(TIMES).repeat(2)
        scale, shift = torch.tensor([-0.3, 2.0]).view(2, 1, 1), 0.7
        bank = GaussianMixtureBank(mean, std, scale=scale, shift=shift)
        _, _, x_t = queries(bank, path, t, generator)
        truth = by_precision(mean * scale + shift, std * scale.abs(), x_t, t, path_coefficients, path)
        assert_is(MixtureOracle(bank, path).posterior(x_t, t), truth)

    def test_precision_settings_do_not_reach_it(self, moments, path_coefficients, generator):
        mean, std, _ = moments
        path, t = LinearPath(), torch.tensor(TIMES)
        bank = GaussianMixtureBank(mean, std)
        _, _, x_t = queries(bank, path, t, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = MixtureOracle(bank, path).posterior(x_t, t)
        assert_is(posterior, by_precision(mean, std, x_t, t, path_coefficients, path))


class TestPoints:
    def test_is_the_oracle_of_points(self, digits, path, brute_force, generator):
        x, labels = digits[0][:500], digits[1][:500]
        bank = GaussianMixtureBank(x, torch.zeros_like(x), labels)
        t = torch.tensor(TIMES).repeat(4)
        x0, x1, x_t = queries(bank, path, t, generator)
        asked = torch.where(torch.arange(len(t)) % 2 == 0, torch.randint(10, t.shape, generator=generator), -1)
        posterior = MixtureOracle(bank, path).posterior(x_t, t, asked)
        truth = brute_force(x, labels, x_t, t, path, asked)
        assert_is(posterior, {name: getattr(truth, name) for name in STATISTICS})
        points = Oracle(DataBank(x, labels), path)
        torch.testing.assert_close(
            MixtureOracle(bank, path).target(x0, x1, t), points.target(x0, x1, t), rtol=1e-4, atol=1e-3
        )

    def test_some_values_are_points(self, moments, generator):
        """Such values have no variance once the row is known; with a tiny std in their place nothing changes."""
        mean, std, _ = moments
        std[:, 0] = 0
        path, t = LinearPath(), torch.tensor(TIMES[:-1]).repeat(3)
        bank = GaussianMixtureBank(mean, std)
        x0, x1, x_t = queries(bank, path, t, generator)
        posterior = MixtureOracle(bank, path).posterior(x_t, t)
        tiny = MixtureOracle(GaussianMixtureBank(mean, std.clamp(min=1e-6)), path).posterior(x_t, t)
        for name in STATISTICS:
            torch.testing.assert_close(getattr(posterior, name), getattr(tiny, name), rtol=1e-3, atol=1e-4)
        known = posterior.top1 > 1 - 1e-6
        assert known.sum() > 5
        torch.testing.assert_close(posterior.mean[known][:, 0], x1[known][:, 0], rtol=0, atol=1e-5)
        assert ((posterior.mean - x1)[known][:, 1].abs() > 1e-3).any()


class TestEnds:
    def test_at_the_data_end_x_t_is_the_data(self, moments, path, generator):
        mean, std, labels = moments
        std[:20] = 0  # points and clouds
        bank = GaussianMixtureBank(mean, std, labels)
        x1 = bank.draw(torch.arange(60), generator)
        posterior = MixtureOracle(bank, path).posterior(x1, torch.ones(60))
        torch.testing.assert_close(posterior.mean, x1, rtol=0, atol=1e-6)
        assert posterior.variance.max() < 1e-12
        assert posterior.top1[:20].min() > 0.999  # a point that x_t lies on outweighs every cloud

    def test_at_the_data_end_weights_are_those_of_the_density(self, generator):
        mean, std = torch.randn(30, 2, generator=generator), 0.5 + torch.rand(30, 2, generator=generator)
        x = torch.randn(10, 2, generator=generator)
        posterior = MixtureOracle(GaussianMixtureBank(mean, std), LinearPath()).posterior(x, torch.ones(10))
        density = torch.distributions.Normal(mean.double(), std.double()).log_prob(x[:, None].double()).sum(2)
        torch.testing.assert_close(posterior.top1.double(), density.softmax(1).amax(1), rtol=1e-5, atol=0)

    def test_at_the_noise_end_all_rows_weigh_alike(self, moments, generator):
        mean, std, labels = moments
        bank = GaussianMixtureBank(mean, std, labels)
        for path in (LinearPath(), CosinePath()):
            posterior = MixtureOracle(bank, path).posterior(
                torch.randn(5, 2, 2, 2, generator=generator), torch.zeros(5)
            )
            torch.testing.assert_close(posterior.ess, torch.full((5,), 60.0))
            torch.testing.assert_close(posterior.mean[0], bank.mean.float().view(2, 2, 2))
            total = bank.covariance().diagonal().sum().float()
            torch.testing.assert_close(posterior.variance, total.expand(5))

    @pytest.mark.parametrize("gap", [1e-3, 1e-5, 2**-24, 0])
    def test_targets_reach_the_end(self, moments, path, path_coefficients, gap, generator):
        """u* = a' m + s' E[x_0 | x_t], E[x_0 | x_t] = sum w_i s (x_t - a m_i) / v_i, which subtracts nothing large."""
        mean, std, _ = moments
        std = std.clamp(min=0.01)
        bank = GaussianMixtureBank(mean, std)
        t = torch.full((60,), 1 - gap)
        x0, x1, _ = queries(bank, path, t, generator)
        target = MixtureOracle(bank, path).target(x0, x1, t)
        assert target.dtype == torch.float32
        assert bool(torch.isfinite(target).all())
        wide = t.double().clamp(max=1 - 1e-8)
        a, s, _, _ = (c[:, None] for c in path_coefficients(path, wide))
        x_t = a * x1.double().flatten(1) + s * x0.double().flatten(1)
        expected = torch.empty_like(x_t)
        for b in range(60):
            variance = s[b] ** 2 + (a[b] * std.double().flatten(1)) ** 2
            away = x_t[b] - a[b] * mean.double().flatten(1)
            weight = torch.softmax(-0.5 * (away**2 / variance + variance.log()).sum(1), 0)
            noise = weight @ (s[b] * away / variance)
            d_a, d_s = path.d_alpha(wide[b : b + 1]), path.d_sigma(wide[b : b + 1])
            expected[b] = d_a * (x_t[b] - s[b] * noise) / a[b] + d_s * noise
        torch.testing.assert_close(target.double().flatten(1), expected, rtol=1e-5, atol=1e-5)


class TestDraws:
    """What the posterior claims about data drawn from the mixture, at one time, in three dimensions."""

    NUM = 100_000

    @pytest.fixture
    def drawn(self, generator):
        mean, std = torch.randn(8, 3, generator=generator), 0.1 + 0.5 * torch.rand(8, 3, generator=generator)
        bank, path = GaussianMixtureBank(mean, std, torch.arange(8) % 2), LinearPath()
        t = torch.full((self.NUM,), 0.55)
        index = torch.randint(8, t.shape, generator=generator)
        x1, x0 = bank.draw(index, generator), torch.randn(self.NUM, 3, generator=generator)
        return MixtureOracle(bank, path), x0, x1, t, bank.labels_of(index)

    def test_mean_is_the_best_prediction_and_variance_its_error(self, drawn):
        oracle, x0, x1, t, labels = drawn
        x_t = oracle.path.interpolate(x0, x1, t)
        for asked in (None, labels):
            posterior = oracle.posterior(x_t, t, asked)
            assert posterior.top1.median() < 0.95
            error = x1 - posterior.mean
            features = torch.cat([torch.ones_like(x_t), x_t, x_t**2, x_t.sin(), posterior.mean], 1)
            products = (features[:, :, None] * error[:, None]).flatten(1)
            z = products.mean(0) / (products.std(0) / self.NUM**0.5)
            assert z.abs().max() < 4.5  # 45 of them
            surprise = error.square().sum(1) - posterior.variance
            for weight in (torch.ones_like(t), x_t[:, 0], posterior.variance):
                product = surprise * weight
                assert abs(product.mean() / (product.std() / self.NUM**0.5)) < 4

    def test_regular_is_gap_plus_floor(self, drawn):
        oracle, x0, x1, t, labels = drawn
        prediction = 0.5 * x0.roll(1, 0) + oracle.path.interpolate(x0, x1, t)
        parts = decompose(oracle, x0, x1, t, prediction, labels, wiener=Wiener(oracle.bank, oracle.path))
        difference = parts.regular - parts.gap - parts.floor
        assert abs(difference.mean() / (difference.std() / self.NUM**0.5)) < 4
        assert parts.floor.mean() > 0.1
        assert parts.gap.mean() > 0.1
        best = decompose(oracle, x0, x1, t, oracle.target(x0, x1, t, labels), labels)
        assert best.gap.max() < 1e-9
        assert parts.wiener.mean() > 0.01

    def test_moments_are_those_of_the_draws(self, drawn):
        oracle, _, x1, _, _ = drawn
        bank = oracle.bank
        torch.testing.assert_close(bank.mean.float(), x1.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(bank.covariance().float(), x1.T.cov(correction=0), rtol=0, atol=0.03)
        assert bank.rms_norm == pytest.approx(x1.square().sum(1).mean().sqrt().item(), rel=0.01)

    def test_targets_average_to_the_conditional_ones(self, drawn):
        oracle, x0, x1, t, labels = drawn
        difference = oracle.target(x0, x1, t, labels) - oracle.path.velocity(x0, x1, t)
        assert (difference.mean(0) / (difference.std(0) / self.NUM**0.5)).abs().max() < 4


def test_one_row_is_the_wiener_reference(path, generator):
    mean, std = torch.randn(1, 6, generator=generator), torch.rand(1, 6, generator=generator)
    bank = GaussianMixtureBank(mean, std)
    t, x_t = torch.linspace(0.05, 0.95, 20), torch.randn(20, 6, generator=generator)
    posterior = MixtureOracle(bank, path).posterior(x_t, t)
    torch.testing.assert_close(posterior.mean, Wiener(bank, path).mean(x_t, t).float(), rtol=1e-5, atol=1e-5)
    assert (posterior.top1 == 1).all()
    assert (posterior.variance > 0).all()  # the row is no point


def test_memory_does_not_grow_with_the_bank(monkeypatch):
    """What one block holds is bounded by its values; the bank here has 30 times as many, the pairs 2000 times."""
    sizes: list[int] = []
    block = mixture._of_block

    def recorded(x_t, a, s, mean, *rest):
        sizes.append(len(x_t) * mean.numel())
        return block(x_t, a, s, mean, *rest)

    monkeypatch.setattr(mixture, "_of_block", recorded)
    monkeypatch.setattr(mixture, "CPU_VALUES", 2**12)
    bank = GaussianMixtureBank(torch.randn(2000, 64), torch.rand(2000, 64))
    MixtureOracle(bank, LinearPath()).posterior(torch.randn(64, 64), torch.linspace(0, 1, 64))
    assert max(sizes) <= 2**12
    assert sum(sizes) == 64 * 2000 * 64


class TestNoPoints:
    def test_indices_are_refused(self, moments, generator):
        mean, std, labels = moments
        bank, path = GaussianMixtureBank(mean, std, labels), LinearPath()
        oracle, index = MixtureOracle(bank, path), torch.arange(5)
        x0, x1, _ = queries(bank, path, torch.full((5,), 0.5), generator)
        t = torch.full((5,), 0.5)
        with pytest.raises(ValueError, match="is a distribution and no point.* and no index"):
            bank.rows(index)
        with pytest.raises(ValueError, match="no point"):
            oracle.target(x0, x1, t, index=index)
        with pytest.raises(ValueError, match="no point"):
            decompose(oracle, x0, x1, t, x0, index=index)
        assert bool(torch.isfinite(oracle.target(x0, x1, t)).all())

    def test_banks_do_not_fit_other_oracles(self, moments):
        mean, std, _ = moments
        with pytest.raises(TypeError, match=r"Oracle needs a DataBank, .* got GaussianMixtureBank"):
            Oracle(GaussianMixtureBank(mean, std), LinearPath())
        with pytest.raises(TypeError, match="MixtureOracle needs a GaussianMixtureBank, .* got DataBank"):
            MixtureOracle(DataBank(mean), LinearPath())

    def test_is_exact(self, moments):
        mean, std, _ = moments
        assert MixtureOracle(GaussianMixtureBank(mean, std), LinearPath()).approximate is None


class TestBank:
    def test_what_it_says_of_itself(self, moments, generator):
        mean, std, labels = moments
        bank = GaussianMixtureBank(mean, std, labels)
        assert repr(bank) == "GaussianMixtureBank(60 rows, 60 distinct, shape (2, 2, 2), 3 labels)"
        assert (len(bank), bank.num_dims, bank.classes, bank.label_counts[1]) == (60, 8, [0, 1, 2], 20)
        assert copy.deepcopy(bank) is bank
        assert torch.equal(bank.labels_of(torch.arange(60)), labels)
        same = bank.draw(torch.arange(60), torch.Generator().manual_seed(1))
        assert torch.equal(same, bank.draw(torch.arange(60), torch.Generator().manual_seed(1)))
        assert "no labels" in repr(GaussianMixtureBank(mean, std))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"std": -torch.ones(4, 2)}, "row 0 has a negative std or NaN"),
            ({"std": torch.tensor([[1.0, 1], [1, math.nan], [1, 1], [1, 1]])}, "row 1 has a negative std or NaN"),
            ({"std": torch.full((4, 2), math.inf)}, "NaN or infinity"),
            ({"mean": torch.full((4, 2), math.nan)}, "NaN or infinity"),
            ({"std": torch.ones(4, 1)}, r"mean is \(4, 2\), std \(4, 1\)"),
            ({"mean": torch.ones(4), "std": torch.ones(4)}, r"for each of its values: mean is \(4,\)"),
            ({"mean": torch.ones(0, 2), "std": torch.ones(0, 2)}, "at least one row"),
            ({"mean": torch.ones(4, 2, dtype=torch.int64)}, "floating point: mean is torch.int64"),
            ({"std": torch.ones(4, 2, dtype=torch.uint8)}, "floating point: .* std torch.uint8"),
            ({"labels": torch.zeros(3, dtype=torch.int64)}, "one integer label per row"),
            ({"labels": torch.zeros(4)}, "one integer label per row"),
            ({"labels": torch.full((4,), -1)}, "0 or larger"),
            ({"scale": 0.0}, "scale"),
        ],
    )
    def test_bad_input_raises(self, change, message):
        with pytest.raises(ValueError, match=message):
            GaussianMixtureBank(**({"mean": torch.ones(4, 2), "std": torch.ones(4, 2)} | change))

    def test_bad_queries_raise_as_of_any_oracle(self, moments):
        mean, std, labels = moments
        oracle, x = MixtureOracle(GaussianMixtureBank(mean, std, labels), VPPath()), torch.zeros(2, 2, 2, 2)
        with pytest.raises(ValueError, match="no row of the bank has label 3"):
            oracle.posterior(x, torch.tensor([0.5, 0.5]), torch.tensor([3, -1]))
        with pytest.raises(ValueError, match="times must lie in"):
            oracle.posterior(x, torch.tensor([0.5, 1.5]))
        with pytest.raises(ValueError, match="undefined at t = 1"):
            oracle.velocity(x, torch.ones(2))
