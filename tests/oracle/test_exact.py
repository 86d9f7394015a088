"""The oracle against the posterior's definition in float64 (see conftest.py), and against draws of its own process."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath
from fm_stages.oracle import DataBank, Oracle, Posterior
from fm_stages.oracle import exact as module

STATISTICS = ["mean", "top1", "ess", "entropy", "variance"]


def noisy(path: Path, x1: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    return path.interpolate(torch.randn(x1.shape, generator=generator), x1, t)


def error_of_mean(posterior: Posterior, truth, rows: Tensor) -> float:
    """The measure of the design: ||m - m_64|| over the RMS norm of the rows, maximum over queries."""
    unit = rows.double().flatten(1).square().sum(1).mean().sqrt()
    return ((posterior.mean.double().flatten(1) - truth.mean).norm(dim=1).max() / unit).item()


def assert_exact(posterior: Posterior, truth, rows: Tensor, path_coefficients, path: Path, t: Tensor, tol=1e-5) -> None:
    assert error_of_mean(posterior, truth, rows) <= min(tol, 1e-5)
    scale = path_coefficients(path, t)[2]
    floor = scale**2 * posterior.variance / rows[0].numel()
    assert (posterior.top1 - truth.top1).abs().max() <= tol
    assert (posterior.ess / truth.ess - 1).abs().max() <= tol
    assert (posterior.entropy - truth.entropy).abs().max() <= tol
    assert ((floor - truth.floor).abs() / truth.floor.clamp(min=1)).max() <= tol
    for name in STATISTICS[1:]:
        assert getattr(posterior, name).shape == t.shape
        assert getattr(posterior, name).dtype == torch.float32
    assert (posterior.top1 > 0).all()
    assert (posterior.top1 <= 1).all()
    assert (posterior.entropy >= 0).all()
    assert (posterior.variance >= 0).all()


def assert_same(one: Posterior, other: Posterior, rtol: float = 2e-5, atol: float = 1e-5) -> None:
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=rtol, atol=atol)


class TestAgainstFloat64:
    def test_digits(self, digits, path, queries_of, brute_force, path_coefficients):
        x, labels = digits
        x_t, t, asked = queries_of(path, x, labels)
        posterior = Oracle(DataBank(x, labels), path).posterior(x_t, t, asked)
        assert posterior.mean.shape == x_t.shape
        truth = brute_force(x, labels, x_t, t, path, asked)
        assert truth.top1[truth.top1 < 0.99].numel() > 30  # the comparison is not about collapsed posteriors alone
        assert_exact(posterior, truth, x, path_coefficients, path, t)

    def test_copies_and_two_labels(self, small, path, queries_of, brute_force, path_coefficients):
        x, labels = small
        x_t, t, asked = queries_of(path, x, labels, per_time=12)
        oracle = Oracle(DataBank(x, labels), path)
        assert_exact(
            oracle.posterior(x_t, t, asked), brute_force(x, labels, x_t, t, path, asked), x, path_coefficients, path, t
        )
        assert_exact(oracle.posterior(x_t, t), brute_force(x, None, x_t, t, path), x, path_coefficients, path, t)
        unlabelled = Oracle(DataBank(x), path)
        assert_same(unlabelled.posterior(x_t, t), oracle.posterior(x_t, t))

    def test_where_the_variance_changes_its_formula(self, path, brute_force, path_coefficients, generator):
        """Centred at the mean before alpha = sigma, at the best row from there on; 4 values per row do not collapse."""
        x = torch.randn(500, 4, generator=generator)
        middle = 0.5 if not isinstance(path, VPPath) else 0.741
        t = torch.linspace(middle - 0.02, middle + 0.02, 64)
        x_t = noisy(path, x[:64], t, generator)
        truth = brute_force(x, None, x_t, t, path)
        assert truth.top1.median() < 0.3
        posterior = Oracle(DataBank(x), path).posterior(x_t, t)
        assert_exact(posterior, truth, x, path_coefficients, path, t, tol=2e-5)
        torch.testing.assert_close(posterior.variance.double(), truth.variance, rtol=1e-4, atol=0)

    def test_queries_that_no_row_explains(self, small, path, brute_force, path_coefficients, generator):
        """Far from all data, as early in sampling: the weights are those of the definition all the same."""
        x, _ = small
        x_t = 30 * torch.randn(40, *x.shape[1:], generator=generator)
        t = torch.linspace(0, 0.6, 40)
        assert_exact(
            Oracle(DataBank(x), path).posterior(x_t, t),
            brute_force(x, None, x_t, t, path),
            x,
            path_coefficients,
            path,
            t,
            5e-5,
        )

    @pytest.mark.parametrize(("scale", "offset"), [(1e-3, 0.0), (1e3, 0.0), (1.0, 10.0)])
    def test_data_of_other_units(self, scale, offset, brute_force, path_coefficients, generator):
        path = LinearPath()
        x = scale * (torch.randn(300, 1, 4, 4, generator=generator) + offset)
        t = torch.sigmoid(torch.linspace(-3, 3, 60)) if scale == 1 else torch.sigmoid(torch.linspace(-3, 3, 60)) / 2
        t = t if scale != 1e-3 else 1 - t / 100
        x_t = noisy(path, x[:60], t, generator)
        truth = brute_force(x, None, x_t, t, path)
        posterior = Oracle(DataBank(x), path).posterior(x_t, t)
        assert error_of_mean(posterior, truth, x) < 1e-5
        assert (posterior.top1 - truth.top1).abs().max() < 1e-4

    @pytest.mark.parametrize("scale", [1e-2, 1e2])
    def test_variance_in_other_units(self, scale, path, brute_force, path_coefficients, generator):
        """Also between the time where rows reach as far as the noise, and the time when they would in other units."""
        x = scale * torch.randn(300, 1, 4, 4, generator=generator)
        t = torch.linspace(0.01, 0.9, 300)
        x_t = noisy(path, x, t, generator)
        posterior, truth = Oracle(DataBank(x), path).posterior(x_t, t), brute_force(x, None, x_t, t, path)
        assert (posterior.variance - truth.variance).abs().max() < 1e-5 * x.square().sum() / len(x)

    def test_one_value_per_row(self, brute_force, path, path_coefficients, generator):
        x = torch.randn(200, 1, generator=generator)
        t = torch.linspace(0, 0.9, 50)
        x_t = noisy(path, x[:50], t, generator)
        assert_exact(
            Oracle(DataBank(x), path).posterior(x_t, t),
            brute_force(x, None, x_t, t, path),
            x,
            path_coefficients,
            path,
            t,
            5e-5,
        )

    def test_near_duplicates(self, brute_force, generator):
        """Pairs that differ in one value by one grey level; below t = 0.95 noise hides which is which."""
        path = LinearPath()
        x = torch.randint(256, (300, 1, 16, 16), generator=generator) / 127.5 - 1
        twin = x.clone()
        twin[:, 0, 3, 5] += 1 / 127.5
        rows = torch.cat([x, twin])
        t = torch.tensor([0.3, 0.5, 0.7, 0.8, 0.9]).repeat(8)
        x_t = noisy(path, x[:40], t, generator)
        truth = brute_force(rows, None, x_t, t, path)
        posterior = Oracle(DataBank(rows), path).posterior(x_t, t)
        assert error_of_mean(posterior, truth, rows) < 1e-5
        assert (posterior.ess / truth.ess - 1).abs().max() < 1e-3

    @pytest.mark.parametrize("t", [0.95, 0.98, 0.99, 0.995, 0.9999, 1 - 2**-24])
    def test_near_duplicates_near_the_data(self, t, brute_force, path_coefficients, generator):
        path = LinearPath()
        x = torch.randint(256, (300, 1, 28, 28), generator=generator) / 127.5 - 1
        twin = x.clone()
        twin[:, 0, 3, 5] += 1 / 127.5
        rows, t = torch.cat([x, twin]), torch.full((40,), t)
        x_t = noisy(path, x[:40], t, generator)
        truth = brute_force(rows, None, x_t, t, path)
        assert_exact(Oracle(DataBank(rows), path).posterior(x_t, t), truth, rows, path_coefficients, path, t)

    # 0.95 is just below the time from which on rows are scored again
    @pytest.mark.parametrize(
        ("t", "tol"), [(0.95, 3e-4), (0.99, 1e-5), (0.999, 1e-5), (0.9999, 1e-5), (1 - 1e-6, 1e-5)]
    )
    def test_one_value_per_row_near_the_data(self, t, tol, brute_force, path_coefficients, generator):
        path = LinearPath()
        x, t = torch.randn(2000, 1, generator=generator), torch.full((40,), t)
        x_t = noisy(path, x[:40], t, generator)
        truth = brute_force(x, None, x_t, t, path)
        assert_exact(Oracle(DataBank(x), path).posterior(x_t, t), truth, x, path_coefficients, path, t, tol)


def float64_posterior(rows: Tensor, x_t: Tensor, t: Tensor, coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, top1 and variance over many rows; by products, whose float64 digits suffice up to t = 0.999."""
    alpha, sigma = (c[:, None] for c in coefficients[:2])
    x_t = x_t.double().flatten(1)
    pieces = rows.flatten(1).split(8192)
    centre = rows.flatten(1).mean(0, dtype=torch.float64)
    logits, squares = [], []
    for piece in pieces:
        x = piece.double() - centre
        squares.append(x.square().sum(1))
        logits.append(alpha * (x_t - alpha * centre) @ x.T - alpha**2 / 2 * squares[-1])
    weight = torch.softmax(torch.cat(logits, 1) / sigma**2, 1)
    mean = sum(w @ (p.double() - centre) for w, p in zip(weight.split(8192, 1), pieces, strict=True))
    return mean + centre, weight.max(1).values, weight @ torch.cat(squares) - mean.square().sum(1)


@pytest.fixture(scope="module")
def bank(fashion_mnist) -> DataBank:
    return DataBank(*fashion_mnist)


class TestFashionMNIST:
    """60,000 rows of 784 values: where bfloat16 logits are off by 10 %, and TF32 by some per cent."""

    def test_posterior(self, fashion_mnist, bank, path, path_coefficients, generator):
        x, labels = fashion_mnist
        assert bank.num_rows == 60_000
        times = [0.0, 1e-4, 0.05, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 0.9, 0.999]
        t = torch.tensor(times).repeat_interleave(3)
        index = torch.randint(len(x), t.shape, generator=generator)
        x_t = noisy(path, x[index], t, generator)
        oracle = Oracle(bank, path)
        coefficients = path_coefficients(path, t)

        posterior = oracle.posterior(x_t, t)
        mean, top1, variance = float64_posterior(x, x_t, t, coefficients)
        assert 3 < (top1 < 0.99).sum() < 36
        unit = x.flatten(1).square().sum(1).double().mean().sqrt()
        assert bank.rms_norm == pytest.approx(unit.item(), rel=1e-6)
        assert (posterior.mean.double().flatten(1) - mean).norm(dim=1).max() / unit <= 1e-5
        assert (posterior.top1 - top1).abs().max() <= 1e-4
        floor = coefficients[2] ** 2 * (posterior.variance - variance).abs() / 784
        assert floor.max() <= 2e-5

        asked = labels[index]
        posterior = oracle.posterior(x_t, t, asked)
        for label in asked.unique().tolist():
            mine = asked == label
            mean, top1, _ = float64_posterior(x[labels == label], x_t[mine], t[mine], [c[mine] for c in coefficients])
            assert (posterior.mean[mine].double().flatten(1) - mean).norm(dim=1).max() / unit <= 1e-5
            assert (posterior.top1[mine] - top1).abs().max() <= 1e-4

    def test_lower_precision_does_not_reach_it(
        self, fashion_mnist, bank, matmul_precision, path_coefficients, generator
    ):
        x, _ = fashion_mnist
        path = LinearPath()
        t = torch.tensor([0.2, 0.25, 0.3, 0.35, 0.4, 0.5])
        x_t = noisy(path, x[:6], t, generator)
        mean = float64_posterior(x, x_t, t, path_coefficients(path, t))[0]
        matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            posterior = Oracle(bank, path).posterior(x_t, t)
        assert (posterior.mean.double().flatten(1) - mean).norm(dim=1).max() / bank.rms_norm <= 1e-5


class TestPrecision:
    def test_inputs_of_other_precisions(self, digits, brute_force, generator):
        x, path = digits[0], LinearPath()
        oracle = Oracle(DataBank(x), path)
        t = torch.linspace(0.1, 0.8, 16, dtype=torch.float64)
        x_t = noisy(path, x[:16], t.float(), generator)
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            given = x_t.to(dtype)
            posterior, truth = oracle.posterior(given, t), brute_force(x, None, given, t, path)
            assert posterior.mean.dtype == oracle.velocity(given, t).dtype == dtype
            assert posterior.top1.dtype == posterior.variance.dtype == torch.float32
            assert (posterior.top1 - truth.top1).abs().max() < 1e-5
            step = max(torch.finfo(dtype).eps, 1e-7)
            torch.testing.assert_close(posterior.mean.double().flatten(1), truth.mean, rtol=step, atol=1e-5)
            # the product A m + B x_t is made in float32, and rounded once at the end
            torch.testing.assert_close(
                oracle.velocity(given, t).double().flatten(1), truth.velocity, rtol=step, atol=1e-4
            )
        coarse = t.bfloat16()
        posterior = oracle.posterior(x_t, coarse)
        assert (posterior.top1 - brute_force(x, None, x_t, coarse, path).top1).abs().max() < 1e-5


class TestInvariance:
    @pytest.fixture
    def setting(self, small, queries_of) -> tuple[Oracle, tuple[Tensor, Tensor, Tensor]]:
        x, labels = small
        path = LinearPath()
        return Oracle(DataBank(x, labels), path), queries_of(path, x, labels)

    @pytest.mark.parametrize("limit", ["MAX_QUERIES", "MAX_QUERY_VALUES"])
    def test_number_of_queries_at_a_time(self, setting, limit, monkeypatch):
        oracle, queries = setting
        whole = oracle.posterior(*queries)
        monkeypatch.setattr(module, limit, 7 if limit == "MAX_QUERIES" else 5 * oracle.bank.num_dims)
        assert_same(oracle.posterior(*queries), whole)

    def test_more_queries_than_one_pass_takes(self, small, brute_force, path_coefficients, generator):
        x, labels = small
        path = LinearPath()
        index = torch.randint(len(x), (2 * module.MAX_QUERIES + 3,), generator=generator)
        t = torch.rand(len(index), generator=generator)
        x_t, asked = noisy(path, x[index], t, generator), torch.where(index % 2 == 0, labels[index], -1)
        posterior = Oracle(DataBank(x, labels), path).posterior(x_t, t, asked)
        truth = brute_force(x, labels, x_t, t, path, asked)
        early = t < 0.95
        assert error_of_mean(posterior, truth, x) < 1e-5
        assert (posterior.top1 - truth.top1)[early].abs().max() < 2e-5

    def test_a_query_does_not_depend_on_its_batch(self, setting):
        oracle, (x_t, t, asked) = setting
        whole = oracle.posterior(x_t, t, asked)
        for i in range(0, len(t), 9):
            one = oracle.posterior(x_t[i : i + 1], t[i : i + 1], asked[i : i + 1])
            assert_same(one, Posterior(*(getattr(whole, name)[i : i + 1] for name in STATISTICS)))

    def test_order_of_the_rows(self, small, setting, generator):
        (x, labels), (oracle, queries) = small, setting
        order = torch.randperm(len(x), generator=generator)
        assert_same(
            Oracle(DataBank(x[order], labels[order]), oracle.path).posterior(*queries), oracle.posterior(*queries)
        )

    def test_a_bank_three_times_over(self, small, setting):
        """Distinct rows are what is counted: neither top1 nor ess see the copies."""
        (x, labels), (oracle, queries) = small, setting
        tripled = Oracle(DataBank(x.repeat(3, 1, 1, 1), labels.repeat(3)), oracle.path)
        assert_same(tripled.posterior(*queries), oracle.posterior(*queries))

    def test_names_of_the_labels(self, small, setting):
        (x, labels), (oracle, (x_t, t, asked)) = small, setting
        renamed = Oracle(DataBank(x, 100 - 7 * labels), oracle.path)
        assert_same(
            renamed.posterior(x_t, t, torch.where(asked == -1, -1, 100 - 7 * asked)), oracle.posterior(x_t, t, asked)
        )

    def test_channels_last_queries(self, setting):
        oracle, (x_t, t, asked) = setting
        assert_same(
            oracle.posterior(x_t.to(memory_format=torch.channels_last), t, asked), oracle.posterior(x_t, t, asked)
        )

    def test_inputs_are_left_as_they_were(self, setting):
        oracle, queries = setting
        before = [q.clone() for q in queries]
        table = oracle.bank.rows(torch.arange(60))
        oracle.posterior(*queries)
        assert all(torch.equal(q, b) for q, b in zip(queries, before, strict=True))
        assert torch.equal(oracle.bank.rows(torch.arange(60)), table)


class TestEnds:
    @pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
    def test_noise_says_nothing(self, small, path, generator):
        x, labels = small
        oracle, x_t = Oracle(DataBank(x, labels), path), torch.randn(9, 2, 2, 2, generator=generator)
        asked = torch.tensor([-1, 0, 1, 2, -1, 0, 1, 2, -1])
        posterior = oracle.posterior(x_t, torch.zeros(9), asked)
        for i, label in enumerate(asked.tolist()):
            rows = (x if label == -1 else x[labels == label]).double()
            distinct, count = rows.flatten(1).unique(dim=0, return_counts=True)
            torch.testing.assert_close(posterior.mean[i].double(), rows.mean(0), rtol=0, atol=1e-6)
            share = count / len(rows)
            assert posterior.top1[i].item() == pytest.approx(share.max().item(), rel=1e-6)
            assert posterior.ess[i].item() == pytest.approx(1 / share.square().sum().item(), rel=1e-5)
            assert posterior.entropy[i].item() == pytest.approx(-(share * share.log()).sum().item(), rel=1e-5)
            spread = rows.flatten(1).var(0, correction=0).sum().item()
            assert posterior.variance[i].item() == pytest.approx(spread, rel=1e-5)

    @pytest.mark.parametrize("t", [1 - 1e-4, 1 - 1e-6, 1 - 2**-24, 1.0])
    def test_at_the_data_the_nearest_row_is_all(self, digits, path, t, generator):
        x, labels = digits
        oracle = Oracle(DataBank(x, labels), path)
        index = torch.randint(len(x), (40,), generator=generator)
        times, asked = torch.full((40,), t), torch.where(index % 2 == 0, labels[index], -1)
        posterior = oracle.posterior(noisy(path, x[index], times, generator), times, asked)
        torch.testing.assert_close(posterior.mean, x[index], rtol=0, atol=1e-12)
        assert posterior.top1.tolist() == posterior.ess.tolist() == [1] * 40
        assert posterior.entropy.max() < 1e-11
        assert posterior.variance.max() < 1e-11

    def test_at_one_of_any_input_the_nearest_row(self, digits, path, generator):
        x, labels = digits
        x_t = torch.rand(40, 1, 8, 8, generator=generator) * 2 - 1
        asked = torch.arange(40) % 11 - 1
        posterior = Oracle(DataBank(x, labels), path).posterior(x_t, torch.ones(40), asked)
        distance = (x_t.double()[:, None] - x.double()).flatten(2).square().sum(2)  # (40, N)
        distance[(asked[:, None] != labels) & (asked[:, None] != -1)] = math.inf
        torch.testing.assert_close(posterior.mean, x[distance.argmin(1)], rtol=0, atol=1e-12)

    @pytest.mark.parametrize("norm", [1e4, 1e7, 1e9])
    @pytest.mark.parametrize("num_rows", [50, 3000])
    def test_at_the_data_with_norms_whose_squares_leave_float32(self, norm, num_rows, path, generator):
        x = norm / 8 * torch.randn(num_rows, 64, generator=generator)
        posterior = Oracle(DataBank(x), path).posterior(x[:4] * path.alpha(torch.ones(4))[:, None], torch.ones(4))
        assert torch.equal(posterior.mean, x[:4])
        assert posterior.top1.tolist() == [1.0] * 4

    @pytest.mark.parametrize("t", [1 - 1e-6, 1 - 2**-24, 1.0])
    def test_at_the_data_an_image_under_two_labels_is_one(self, digits, t):
        x, labels = digits
        oracle = Oracle(DataBank(torch.cat([x, x[:5]]), torch.cat([labels, 9 - labels[:5]])), LinearPath())
        posterior = oracle.posterior(x[:5], torch.full((5,), t))
        assert posterior.top1.tolist() == posterior.ess.tolist() == [1] * 5

    def test_one_row(self, path, generator):
        x = torch.randn(1, 3, 2, generator=generator)
        x_t, t = torch.randn(20, 3, 2, generator=generator), torch.linspace(0, 1, 20)
        posterior = Oracle(DataBank(x), path).posterior(x_t, t)
        assert torch.equal(posterior.mean, x.expand(20, 3, 2))
        assert posterior.top1.tolist() == posterior.ess.tolist() == [1] * 20
        assert posterior.entropy.tolist() == posterior.variance.tolist() == [0] * 20

    @pytest.mark.parametrize("copies", [2, 3, 1000])
    def test_one_image_many_times(self, path, copies, generator):
        x = torch.randn(1, 3, 2, generator=generator).expand(copies, 3, 2)
        x0, t = torch.randn(20, 3, 2, generator=generator), torch.linspace(0, 0.99, 20)
        oracle = Oracle(DataBank(x, torch.arange(copies) % 2), path)
        for asked in (None, torch.zeros(20).long()):
            posterior = oracle.posterior(x0, t, asked)
            torch.testing.assert_close(posterior.mean, x[:1].expand(20, 3, 2), rtol=1e-6, atol=0)
            assert posterior.top1.min() == 1
            assert posterior.variance.max() < 1e-6
            u_cond = path.velocity(x0, x[:1].expand(20, 3, 2), t)
            torch.testing.assert_close(
                oracle.target(x0, x[:1].expand(20, 3, 2), t, asked), u_cond, rtol=1e-4, atol=1e-4
            )

    def test_a_constant_bank_has_no_spread(self, path, generator):
        x = torch.full((50, 1, 3, 3), 0.7)
        posterior = Oracle(DataBank(x), path).posterior(
            torch.randn(10, 1, 3, 3, generator=generator), torch.linspace(0, 1, 10)
        )
        assert torch.equal(posterior.mean, x[:10])
        assert posterior.variance.tolist() == [0] * 10


def test_memory_does_not_grow_with_the_bank(generator):
    """More than the bank itself: at most a few pieces. All logits at once would take 200 MB for the larger one."""
    peaks = []
    for num_rows in (20_000, 200_000):
        bank = DataBank(torch.randn(num_rows, 2, generator=generator))
        x_t, t = torch.randn(256, 2, generator=generator), torch.full((256,), 0.3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            Oracle(bank, LinearPath()).posterior(x_t, t)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
        peaks.append(held.max().item())
    assert peaks[0] > 2**20  # the profiler does see what is allocated
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 2**25


class TestTarget:
    @pytest.mark.parametrize("per_time", [4])
    def test_against_float64_at_every_time(
        self, digits, path, per_time, times, brute_force_target, path_coefficients, generator
    ):
        x, _ = digits
        bank = DataBank(x)
        last = [1 - 1e-4, path.max_time] if isinstance(path, VPPath) else [1 - 1e-4, 1 - 1e-6, 1 - 2**-24]
        t = torch.tensor(times[0 if not isinstance(path, VPPath) else 3 :] + last).repeat_interleave(per_time)
        index = torch.randint(len(x), t.shape, generator=generator)
        x0, x1 = torch.randn(len(t), 1, 8, 8, generator=generator), x[index]
        truth, conditional = brute_force_target(x, x0, x1, t, path)
        target = Oracle(bank, path).target(x0, x1, t)
        assert target.isfinite().all()
        assert target.dtype == torch.float32
        error = (target.double().flatten(1) - truth).norm(dim=1)
        scale = path_coefficients(path, t)[2]
        collapsed = t >= 0.95
        assert (error / (scale * bank.rms_norm))[~collapsed].max() <= 1e-5
        # there u* = u_cond: nothing but float32 rounding is allowed, however large A is
        assert (error / conditional.norm(dim=1))[collapsed].max() <= 1e-5
        assert (truth - conditional).norm(dim=1)[collapsed].max() < 1e-3

    def test_with_labels(self, digits, brute_force_target, generator):
        x, labels = digits
        path = LinearPath()
        t, index = torch.linspace(0.05, 0.95, 30), torch.randint(len(x), (30,), generator=generator)
        x0, asked = (
            torch.randn(30, 1, 8, 8, generator=generator),
            torch.where(torch.arange(30) % 3 > 0, labels[index], -1),
        )
        target = Oracle(DataBank(x, labels), path).target(x0, x[index], t, asked)
        for i, label in enumerate(asked.tolist()):
            rows, one = x if label == -1 else x[labels == label], slice(i, i + 1)
            truth, _ = brute_force_target(rows, x0[one], x[index[one]], t[one], path)
            torch.testing.assert_close(target[one].double().flatten(1), truth, rtol=0, atol=2e-5)

    def test_is_finite_at_one(self, digits, generator):
        x, _ = digits
        for path in (LinearPath(), CosinePath()):
            x0, t = torch.randn(8, 1, 8, 8, generator=generator), torch.ones(8)
            target = Oracle(DataBank(x), path).target(x0, x[:8], t)
            torch.testing.assert_close(target, path.velocity(x0, x[:8], t), rtol=0, atol=1e-5)

    def test_is_finite_at_one_without_zeros_in_the_data(self, generator):
        x = torch.randn(50, 6, generator=generator)
        for path in (LinearPath(), CosinePath()):
            x0, t = torch.randn(8, 6, generator=generator), torch.ones(8)
            target = Oracle(DataBank(x), path).target(x0, x[:8], t)
            torch.testing.assert_close(target, path.velocity(x0, x[:8], t), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("t", [1 - 1e-4, 1 - 1e-5, 1 - 2**-24])
    def test_near_duplicates_near_one(self, t, brute_force_target, generator):
        path = LinearPath()
        x = torch.randint(256, (300, 1, 28, 28), generator=generator) / 127.5 - 1
        twin = x.clone()
        twin[:, 0, 3, 5] += 1 / 127.5
        rows, t = torch.cat([x, twin]), torch.full((100,), t)
        x0, x1 = torch.randn(100, 1, 28, 28, generator=generator), rows[250:350]
        truth, _ = brute_force_target(rows, x0, x1, t, path)
        error = Oracle(DataBank(rows), path).target(x0, x1, t).double().flatten(1) - truth
        assert error.square().mean(1).max() < 1e-4

    def test_index_stands_for_the_row(self, small, generator):
        x, labels = small
        oracle = Oracle(DataBank(x, labels), LinearPath())
        index = torch.randint(len(x), (40,), generator=generator)
        x0, t = torch.randn(40, 2, 2, 2, generator=generator), torch.linspace(0, 0.999, 40)
        target = oracle.target(x0, x[index], t, labels[index])
        assert torch.equal(oracle.target(x0, x[index], t, labels[index], index), target)
        # what a half-precision pipeline hands over is replaced by the bank's own bits
        assert torch.equal(oracle.target(x0, x[index].bfloat16(), t, labels[index], index), target)

    def test_agrees_with_the_velocity(self, digits, path, generator):
        x, labels = digits
        oracle = Oracle(DataBank(x, labels), path)
        t, index = torch.linspace(0.1, 0.9, 40), torch.randint(len(x), (40,), generator=generator)
        x0, asked = torch.randn(40, 1, 8, 8, generator=generator), torch.where(index % 2 == 0, labels[index], -1)
        x_t = path.interpolate(x0, x[index], t)
        torch.testing.assert_close(
            oracle.velocity(x_t, t, asked), oracle.target(x0, x[index], t, asked), rtol=0, atol=5e-5
        )


class TestVelocity:
    def test_against_float64(self, digits, path, queries_of, brute_force, path_coefficients):
        x, labels = digits
        x_t, t, asked = queries_of(path, x, labels)
        velocity = Oracle(DataBank(x, labels), path).velocity(x_t, t, asked).double().flatten(1)
        truth = brute_force(x, labels, x_t, t, path, asked).velocity
        # A m + B x_t subtracts terms of size A |x|: rounding is what that size allows
        scale = path_coefficients(path, t)[2].abs() * x.flatten(1).norm(dim=1).double().mean()
        assert ((velocity - truth).norm(dim=1) / scale).max() <= 1e-5

    def test_is_undefined_at_one(self, digits, path):
        oracle = Oracle(DataBank(digits[0]), path)
        with pytest.raises(ValueError, match="undefined at t = 1"):
            oracle.velocity(digits[0][:3], torch.tensor([0.5, 1.0, 0.9]))
        assert oracle.velocity(digits[0][:1], torch.tensor([1 - 2**-24])).isfinite().all()

    def test_times_that_round_to_one(self, digits):
        oracle, t = Oracle(DataBank(digits[0]), LinearPath()), torch.tensor([1 - 1e-12], dtype=torch.float64)
        with pytest.raises(ValueError, match="undefined at t = 1"):
            oracle.velocity(digits[0][:1].double(), t)

    def test_no_false_gradient(self, digits):
        """B_t alone, without A_t dm/dx, would look like one."""
        oracle, x_t = Oracle(DataBank(digits[0]), LinearPath()), digits[0][:2].clone().requires_grad_()
        assert not oracle.velocity(x_t, torch.tensor([0.3, 0.6])).requires_grad

    def test_is_the_mean_of_conditional_velocities(self, path, generator):
        """E[u_cond | x_t] = u*: u_cond - u* is orthogonal to every function of x_t. A bank that lacks a row is not."""
        rows, num = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.6, -0.9], [0.2, 1.5], [1.0, 0.0]]), 200_000
        index = torch.randint(5, (num,), generator=generator)
        x0, x1 = torch.randn(num, 2, generator=generator), rows[index]
        t = torch.full((num,), 0.6 if isinstance(path, VPPath) else 0.45)
        x_t, u_cond = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
        functions = [torch.ones(num), x_t[:, 0], x_t[:, 1], (x_t[:, 0] > 0.3).float(), torch.cos(3 * x_t).prod(1)]

        def scores(bank: DataBank) -> Tensor:
            away = u_cond - Oracle(bank, path).velocity(x_t, t)
            products = torch.stack([(f[:, None] * away).double() for f in functions])  # (F, num, 2)
            return products.mean(1) / products.std(1) * math.sqrt(num)

        assert scores(DataBank(rows)).abs().max() < 4
        assert scores(DataBank(rows[:4])).abs().max() > 10  # (1, 0) once instead of twice
        assert scores(DataBank(rows[1:4])).abs().max() > 100

    def test_of_a_class_is_the_mean_over_its_rows(self, generator):
        rows, labels, num = torch.tensor([[1.0], [-1.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 1]), 100_000
        path, oracle = LinearPath(), Oracle(DataBank(rows, labels), LinearPath())
        index = torch.randint(4, (num,), generator=generator)
        x0, t = torch.randn(num, 1, generator=generator), torch.rand(num, generator=generator) * 0.9
        x_t = path.interpolate(x0, rows[index], t)
        asked = torch.where(torch.arange(num) % 2 == 0, labels[index], -1)
        away = (path.velocity(x0, rows[index], t) - oracle.velocity(x_t, t, asked))[:, 0].double()
        for label in (-1, 0, 1):
            for function in (torch.ones(num), x_t[:, 0]):
                product = (function * away)[asked == label]
                assert abs(product.mean() / product.std()) * math.sqrt(len(product)) < 4


class TestRefusals:
    @pytest.fixture
    def oracle(self, small) -> Oracle:
        return Oracle(DataBank(*small), LinearPath())

    @pytest.mark.parametrize("shape", [(4, 2, 2, 3), (4, 8), (4, 1, 2, 2, 2), (2, 2, 2), (0, 2, 2, 2)], ids=str)
    def test_other_shapes(self, oracle, shape):
        with pytest.raises(ValueError, match=r"\(B, \*\(2, 2, 2\)\)"):
            oracle.posterior(torch.zeros(shape), torch.full(shape[:1], 0.5))

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1), (4, 1, 1, 1)], ids=str)
    def test_times_that_are_not_one_per_query(self, oracle, shape):
        for call in (oracle.posterior, oracle.velocity):
            with pytest.raises(ValueError, match="one time per sample"):
                call(torch.zeros(4, 2, 2, 2), torch.full(shape, 0.5))

    @pytest.mark.parametrize("wrong", [-1e-6, 1.000001, math.nan, math.inf])
    def test_times_outside(self, oracle, wrong):
        t, x = torch.tensor([0.2, wrong]), torch.zeros(2, 2, 2, 2)
        for call in (lambda: oracle.posterior(x, t), lambda: oracle.velocity(x, t), lambda: oracle.target(x, x, t)):
            with pytest.raises(ValueError, match=r"times must lie in \[0, 1\]"):
                call()

    def test_another_device(self, oracle):
        with pytest.raises(ValueError, match="bank is on cpu, the queries on meta: .*bank.to"):
            oracle.posterior(torch.zeros(2, 2, 2, 2, device="meta"), torch.zeros(2, device="meta"))

    @pytest.mark.parametrize(
        "labels",
        [torch.zeros(4), torch.zeros(3).long(), torch.zeros(4, 1).long(), torch.zeros(()).long()],
        ids=["float", "few", "columns", "scalar"],
    )
    def test_labels_that_are_not_one_per_query(self, oracle, labels):
        with pytest.raises(ValueError, match="one integer label per query"):
            oracle.posterior(torch.zeros(4, 2, 2, 2), torch.zeros(4), labels)

    def test_a_class_without_rows(self, oracle, small):
        x, t = torch.zeros(2, 2, 2, 2), torch.zeros(2)
        for missing in (3, -2):
            with pytest.raises(ValueError, match=f"label {missing} .*-1"):
                oracle.posterior(x, t, torch.tensor([0, missing]))
        with pytest.raises(ValueError, match="label 1 .*no labels"):
            Oracle(DataBank(small[0]), LinearPath()).posterior(x, t, torch.tensor([-1, 1]))

    def test_rows_instead_of_a_bank(self, small):
        with pytest.raises(TypeError, match=r"DataBank.*Tensor"):
            Oracle(small[0], LinearPath())


def test_copies_are_itself(small):
    oracle = Oracle(DataBank(*small), LinearPath())
    module = nn.Linear(1, 1)
    module.oracle = oracle
    assert copy.deepcopy(oracle) is copy.deepcopy(module).oracle is oracle
    assert not isinstance(oracle, nn.Module)
