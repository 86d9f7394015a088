"""The pass over the bank: pieces of any size, and what may be left out of it, against float64."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath, Path
from fm_stages.oracle import DataBank, Oracle, Posterior, exact, stream
from fm_stages.oracle.kernels import PlainProducts

TOLERANCES = [1e-3, 1e-6, 0.0]
PATH = LinearPath()


def noisy(x1: Tensor, t: Tensor, generator: torch.Generator, path: Path = PATH) -> Tensor:
    return path.interpolate(torch.randn(x1.shape, generator=generator), x1, t)


def assert_same(one: Posterior, other: Posterior) -> None:
    for name in ("mean", "top1", "ess", "entropy", "variance"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=2e-5, atol=1e-5)


def small_pieces(monkeypatch, block: int, blocks_per_piece: int, num: int, part: int) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(stream, "CPU_VALUES", num * block * blocks_per_piece)
    monkeypatch.setattr(stream, "CPU_PART", part)


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """Sizes of the pieces that went by."""
    sizes: list[int] = []
    logits = PlainProducts.logits

    def watch(self, rows: slice | Tensor, out: Tensor) -> None:
        sizes.append(out.shape[1])
        logits(self, rows, out)

    monkeypatch.setattr(PlainProducts, "logits", watch)
    return sizes


class TestPieces:
    @pytest.mark.parametrize("tolerance", [1e-6, 0.0])
    @pytest.mark.parametrize(("block", "part"), [(1, 1), (7, 3), (7, 7), (19, 1000), (64, 10)])
    def test_of_any_size(self, block, part, tolerance, small, queries_of, pieces, monkeypatch):
        x, labels = small
        oracle, queries = Oracle(DataBank(x, labels), PATH, tolerance), queries_of(PATH, x, labels)
        whole = oracle.posterior(*queries)
        pieces.clear()
        small_pieces(monkeypatch, block, 1, 1, part)
        assert_same(oracle.posterior(*queries), whole)
        assert max(pieces) == min(block, oracle.bank.num_stored)

    def test_that_are_skipped_do_not_count(self, generator, brute_force, errors_of, monkeypatch):
        """The best row in the first, the middle or the last piece; most pieces far below it."""
        x = torch.randn(90, 30, generator=generator)
        small_pieces(monkeypatch, 10, 1, 1, 5)
        t = torch.linspace(0.05, 0.95, 90)[torch.randperm(90, generator=generator)]
        x_t = noisy(x, t, generator)
        posterior = Oracle(DataBank(x), PATH).posterior(x_t, t)
        assert max(errors_of(posterior, brute_force(x, None, x_t, t, PATH), x).values()) < 1e-5

    @pytest.mark.parametrize("few", [-1, 0, 1, 3, 1000])
    @pytest.mark.parametrize("candidates", [0, 1000])
    def test_rows_that_are_summed_one_by_one_or_in_products(
        self, few, candidates, digits, path, queries_of, brute_force, errors_of, monkeypatch
    ):
        x, labels = digits[0][::3], digits[1][::3]
        x_t, t, asked = queries_of(path, x, labels, times=[0.0, 0.05, 0.2, 0.4, 0.6, 0.9, 0.99], per_time=4)
        monkeypatch.setattr(stream, "FEW", few)
        monkeypatch.setattr(stream, "MAX_CANDIDATES", candidates)
        small_pieces(monkeypatch, 16, 2, 1, 32)
        errors = errors_of(
            Oracle(DataBank(x, labels), path).posterior(x_t, t, asked), brute_force(x, labels, x_t, t, path, asked), x
        )
        assert errors["mean"] < 1e-5
        assert max(errors.values()) < 2e-5

    def test_peaks_that_rise_by_more_than_float32_holds(self, brute_force, errors_of, monkeypatch):
        """Each piece's best row is e^200 times as likely as the one before, and all pieces hold many equal rows."""
        step = torch.linspace(60, 0, 4).repeat_interleave(20)
        x = torch.zeros(80, 21)
        x[:, 20] = step
        x[torch.arange(80), torch.arange(20).repeat(4)] = 0.3
        small_pieces(monkeypatch, 20, 1, 1, 20)
        x_t, t = torch.zeros(2, 21), torch.full((2,), 0.5)
        for tolerance in TOLERANCES:
            for order in (torch.arange(80), torch.arange(79, -1, -1), torch.arange(80).roll(40)):
                posterior = Oracle(DataBank(x[order]), PATH, tolerance).posterior(x_t, t)
                errors = errors_of(posterior, brute_force(x, None, x_t, t, PATH), x)
                assert posterior.ess[0].item() == pytest.approx(20, rel=1e-5)
                assert max(errors.values()) < 1e-5


class TestTolerance:
    """Of rows below l_max - log(N / tolerance) all N together hold less than the tolerance."""

    def shell(self, tolerance: float, num: int, ahead: int, t: float, spare: float) -> tuple[Tensor, Tensor]:
        """A bank with ``ahead`` rows at the peak, and the others in one place, just below the threshold.

        They lie in one direction from the query, so that what they add to the mean does not cancel: copies would count
        as one row, so they differ by 1e-6 in values of their own.
        """
        dims, a, s = 8, t, 1 - t
        centre = torch.full((dims,), 0.5, dtype=torch.float64)
        below = math.log(num / (tolerance or 1e-6)) + spare
        radius = s / a * math.sqrt(2 * below)
        others = torch.zeros(num - ahead, dims, dtype=torch.float64)
        others[:, 0] = radius
        others[:, 1] = torch.arange(num - ahead) * 1e-6
        best = torch.zeros(ahead, dims, dtype=torch.float64)
        best[:, 2] = torch.arange(ahead) * 1e-5
        x = torch.cat([best, others]) + centre
        return x.float(), (a * centre).float()[None]

    @pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
    @pytest.mark.parametrize("tolerance", TOLERANCES)
    @pytest.mark.parametrize("ahead", [1, 5, 40])
    @pytest.mark.parametrize("order", ["first", "last"])
    def test_bounds_what_is_left_out(self, t, tolerance, ahead, order, brute_force, monkeypatch):
        num = 1000
        # the threshold lies below its formula by the rounding error of logits, of up to 2e-3 here
        x, x_t = self.shell(tolerance, num, ahead, t, spare=0.02)
        x = x if order == "first" else x.flip(0)
        times = torch.full((1,), t)
        small_pieces(monkeypatch, 8, 5, 1, 40)
        truth = brute_force(x, None, x_t, times, PATH)
        posterior = Oracle(DataBank(x), PATH, tolerance).posterior(x_t, times)

        reach = math.sqrt(2 * math.log(num / (tolerance or 1e-6)) + 1)  # distance of what is left out, in s / a
        error = (posterior.mean.double() - truth.mean).norm().item() * t / (1 - t)
        assert error <= tolerance * reach + 3e-6
        if tolerance == 1e-3 and ahead == 1 and order == "first":
            assert error >= 0.9 * tolerance * reach  # the bank is the worst there is
        assert abs(posterior.top1 - truth.top1).item() <= tolerance + 1e-6
        assert abs(posterior.ess / truth.ess - 1).item() <= 2 * tolerance + 1e-5
        entropy = tolerance * (1 + math.log(num / (tolerance or 1e-6)))
        assert abs(posterior.entropy - truth.entropy).item() <= entropy + 3e-5
        spread = (posterior.variance - truth.variance).abs().item() * (t / (1 - t)) ** 2
        assert spread <= (tolerance + 2e-6) * reach**2
        # u* = A m + B x_t, A = 1 / s on this path
        velocity = Oracle(DataBank(x), PATH, tolerance).velocity(x_t, times)
        assert (velocity.double() - truth.velocity).norm().item() <= tolerance * reach / t + 5e-6 / (1 - t)

    @pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
    @pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
    def test_rows_just_above_the_threshold_are_summed(self, t, tolerance, brute_force):
        """Few of them in float64, where what is missing would show."""
        x, x_t = self.shell(tolerance, 6, 1, t, spare=-0.02)
        truth = brute_force(x, None, x_t, torch.full((1,), t), PATH)
        posterior = Oracle(DataBank(x), PATH, tolerance).posterior(x_t, torch.full((1,), t))
        torch.testing.assert_close(posterior.mean.double(), truth.mean, rtol=0, atol=1e-7)
        assert 0.5 * tolerance < 1 - truth.top1 < tolerance
        assert abs(posterior.top1 - truth.top1).item() < 1e-7
        assert abs(posterior.entropy - truth.entropy).item() < 1e-7

    @pytest.mark.parametrize("kind", ["near duplicates", "tight clusters", "copies with other labels", "one per class"])
    @pytest.mark.parametrize("tolerance", TOLERANCES)
    def test_in_banks_that_are_hard(self, kind, tolerance, brute_force, errors_of, generator, monkeypatch):
        centres = torch.randn(60, 12, generator=generator)
        if kind == "near duplicates":
            x = torch.cat([centres, centres + 1e-4 * torch.randn(60, 12, generator=generator)])
        elif kind == "tight clusters":
            x = (centres[:6, None] + 0.02 * torch.randn(6, 50, 12, generator=generator)).flatten(0, 1)
        elif kind == "copies with other labels":
            x = torch.cat([centres, centres, centres[:30], centres[:3]])
        else:
            x = centres
        labels = torch.arange(len(x)) if kind == "one per class" else torch.arange(len(x)) % 7
        small_pieces(monkeypatch, 16, 1, 1, 16)
        t = torch.cat([torch.linspace(0, 0.95, 60), 1 - torch.logspace(-1.5, -5, 20)])
        index = torch.randint(len(x), t.shape, generator=generator)
        x_t, asked = noisy(x[index], t, generator), torch.where(torch.arange(80) % 2 == 0, labels[index], -1)
        truth = brute_force(x, labels, x_t, t, PATH, asked)
        posterior = Oracle(DataBank(x, labels), PATH, tolerance).posterior(x_t, t, asked)
        errors = errors_of(posterior, truth, x)
        assert errors["mean"] < 4 * tolerance + 1e-5
        assert errors["top1"] < tolerance + 1e-4
        assert errors["ess"] < 2 * tolerance + 3e-4
        assert errors["entropy"] < 15 * tolerance + 3e-4
        assert errors["variance"] < 15 * tolerance + 1e-5
        if kind == "one per class":
            own = asked >= 0
            assert posterior.top1[own].tolist() == posterior.ess[own].tolist() == [1] * int(own.sum())
            assert torch.equal(posterior.mean[own], x[index[own]])

    @pytest.mark.parametrize("tolerance", TOLERANCES)
    def test_one_row(self, tolerance, generator):
        x, t = torch.randn(1, 5, generator=generator), torch.linspace(0, 1, 11)
        posterior = Oracle(DataBank(x), PATH, tolerance).posterior(torch.randn(11, 5, generator=generator), t)
        assert torch.equal(posterior.mean, x.expand(11, 5))
        assert posterior.top1.tolist() == [1] * 11
        assert posterior.variance.tolist() == [0] * 11
        assert posterior.entropy.max() < (1e-12 if tolerance else 1e-6)

    def test_a_larger_one_is_less_work_and_zero_leaves_nothing_out(self, generator, monkeypatch):
        """Rows times queries that enter the second product."""
        x, t = torch.randn(3000, 64, generator=generator), torch.linspace(0.05, 0.6, 20)
        x_t, work = noisy(x[:20], t, generator), []
        add_weighted = PlainProducts.add_weighted

        def watch(self, total, queries, weights, rows):
            work.append(weights.shape[0] * weights.shape[1])
            assert weights.shape[1] == (len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start)
            add_weighted(self, total, queries, weights, rows)

        monkeypatch.setattr(PlainProducts, "add_weighted", watch)
        small_pieces(monkeypatch, 10, 1, 20, 10)
        done = []
        for tolerance in (0.0, 1e-12, 1e-6, 1e-3):
            work.clear()
            Oracle(DataBank(x), PATH, tolerance).posterior(x_t, t)
            done.append(sum(work))
        assert done[0] == 20 * 3000
        assert done[0] > done[1] > done[2] > done[3] > 0

    def test_what_is_left_out_is_there_with_zero(self, brute_force, monkeypatch):
        small_pieces(monkeypatch, 8, 5, 1, 40)
        x, x_t = self.shell(1e-3, 1000, 1, 0.5, spare=0.02)
        t = torch.full((1,), 0.5)
        truth = brute_force(x, None, x_t, t, PATH)
        errors = [
            (Oracle(DataBank(x), PATH, tolerance).posterior(x_t, t).mean - truth.mean).norm().item()
            for tolerance in (1e-3, 0.0)
        ]
        assert errors[0] > 1e-3
        assert errors[1] < 3e-6

    @pytest.mark.parametrize("wrong", [-1e-9, 1.1e-3, 0.5, 1.0, math.nan, math.inf])
    def test_that_makes_no_sense(self, wrong):
        with pytest.raises(ValueError, match=r"share of the posterior mass in \[0, 1e-3\]"):
            Oracle(DataBank(torch.zeros(2, 2)), PATH, tolerance=wrong)


class TestGroups:
    def test_are_whole_classes_until_there_are_enough(self):
        labels = torch.tensor([-1] * 3 + [0] * 5 + [1] * 4 + [2] * 20 + [5])
        assert exact.groups(labels, 8) == [3, 9, 20, 1]
        assert exact.groups(labels, 1) == [3, 5, 4, 20, 1]
        assert exact.groups(labels, 1000) == [3, 30]
        assert exact.groups(labels[:0], 8) == []

    @pytest.mark.parametrize("tolerance", [1e-6, 0.0])
    def test_of_classes_change_nothing(self, tolerance, small, queries_of, brute_force, errors_of, monkeypatch):
        x, labels = small
        oracle, (x_t, t, asked) = Oracle(DataBank(x, labels), PATH, tolerance), queries_of(PATH, x, labels)
        truth = brute_force(x, labels, x_t, t, PATH, asked)
        small_pieces(monkeypatch, 4, 2, len(t), 4)  # some pieces hold no row of some queries
        for least in (1, 7, 1000):
            monkeypatch.setattr(exact, "CPU_GROUP", least)
            assert max(errors_of(oracle.posterior(x_t, t, asked), truth, x).values()) < 1e-4
