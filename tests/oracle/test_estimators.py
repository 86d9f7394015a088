"""Relatives of the oracle: each is what it says it is, and differs from the oracle in the way it is known to."""

import math

import pytest
import torch
from torch import Tensor

from fm_stages.flow import LinearPath
from fm_stages.oracle import ClassBanks, DataBank, Oracle, SharedBatchOracle, TemperedOracle, decompose
from fm_stages.oracle.skipping import measure_nearest

TIMES = [1e-4, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95]
STATISTICS = ["mean", "top1", "ess", "entropy", "variance"]


@pytest.fixture
def some(digits) -> tuple[Tensor, Tensor]:
    """400 digits, the first 50 of them twice."""
    x, labels = digits
    return torch.cat([x[:400], x[:50]]), torch.cat([labels[:400], labels[:50]])


def around(x: Tensor, times: list[float], each: int, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by index, noise, and times."""
    t = torch.tensor(times).repeat_interleave(each)
    index = torch.randint(len(x), t.shape, generator=generator)
    return index, torch.randn(len(t), *x.shape[1:], generator=generator), x[index], t


def assert_same(one, other, tol: float = 1e-5) -> None:
    for name in STATISTICS:
        torch.testing.assert_close(getattr(one, name).double(), getattr(other, name).double(), rtol=tol, atol=tol)


class TestTempered:
    @pytest.mark.parametrize("temperature", [0.25, 1.0, 2.0, 50.0])
    def test_is_the_softmax_of_divided_logits(self, some, path, temperature, path_coefficients, generator):
        """With counts beside the temperature: copies weigh as copies."""
        x, labels = some
        _, x0, x1, t = around(x, TIMES, 4, generator)
        x_t = path.interpolate(x0, x1, t)
        posterior = TemperedOracle(DataBank(x, labels), path, temperature).posterior(x_t, t)
        distinct, count = torch.unique(x.double().flatten(1), dim=0, return_counts=True)
        a, s, _, _ = (c[:, None] for c in path_coefficients(path, t))
        squares = (x_t.double().flatten(1)[:, None] - a[:, None] * distinct).square().sum(2)
        weight = torch.softmax(-squares / (2 * s**2 * temperature) + count.double().log(), 1)
        mean = weight @ distinct
        spread = torch.cdist(mean, distinct, compute_mode="donot_use_mm_for_euclid_dist").square()
        torch.testing.assert_close(posterior.mean.double().flatten(1), mean, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(posterior.top1.double(), weight.amax(1), rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(posterior.ess.double(), 1 / weight.square().sum(1), rtol=2e-5, atol=1e-6)
        entropy = -torch.special.xlogy(weight, weight).sum(1)
        torch.testing.assert_close(posterior.entropy.double(), entropy, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(posterior.variance.double(), (weight * spread).sum(1), rtol=2e-5, atol=2e-4)

    def test_the_velocity_keeps_the_paths_coefficients(self, some, path, path_coefficients, generator):
        x, _ = some
        _, x0, x1, t = around(x, TIMES, 4, generator)
        oracle = TemperedOracle(DataBank(x), path, 3.0)
        x_t = path.interpolate(x0, x1, t)
        _, _, scale, pull = (c.view(-1, 1, 1, 1) for c in path_coefficients(path, t))
        expected = scale * oracle.posterior(x_t, t).mean + pull * x_t
        torch.testing.assert_close(oracle.velocity(x_t, t).double(), expected, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(oracle.target(x0, x1, t).double(), expected, rtol=1e-4, atol=1e-3)

    def test_temperature_1_is_the_oracle(self, some, generator):
        x, labels = some
        bank, path = DataBank(x, labels), LinearPath()
        index, x0, x1, t = around(x, TIMES, 4, generator)
        tempered, oracle = TemperedOracle(bank, path, 1.0), Oracle(bank, path)
        x_t = path.interpolate(x0, x1, t)
        assert_same(tempered.posterior(x_t, t, labels[index]), oracle.posterior(x_t, t, labels[index]), tol=0)

    def test_says_what_it_is(self, some):
        bank, path = DataBank(some[0]), LinearPath()
        assert TemperedOracle(bank, path, 2).approximate == "tempered posterior, temperature 2"
        assert TemperedOracle(bank, path, 0.125).approximate == "tempered posterior, temperature 0.125"
        assert TemperedOracle(bank, path, 1.0).approximate is None
        assert Oracle(bank, path).approximate is None

    def test_no_query_is_skipped(self, some, generator):
        """The certificate is about the noise that made x_t: at a high temperature it would be wrong."""
        x, _ = some
        bank, path = DataBank(x), LinearPath()
        measure_nearest(bank)
        index, x0, x1, t = around(x, [0.9], 50, generator)
        x_t = path.interpolate(x0, x1, t)
        assert Oracle(bank, path).posterior(x_t, t, index=index).top1.min() > 0.999
        hot = TemperedOracle(bank, path, 1000.0)
        assert_same(hot.posterior(x_t, t, index=index), hot.posterior(x_t, t), tol=0)
        assert hot.posterior(x_t, t, index=index).top1.max() < 0.9

    @pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
    def test_other_temperatures_raise(self, some, temperature):
        with pytest.raises(ValueError, match=f"positive and finite, got {temperature}"):
            TemperedOracle(DataBank(some[0]), LinearPath(), temperature)


class TestClassBanks:
    def test_keeps_the_last_rows_of_each_class_in_order(self):
        pools = ClassBanks(num_classes=2, size=3)
        x = torch.arange(10.0)[:, None]
        pools.push(x[:4], torch.tensor([0, 1, 0, 0]))
        assert pools.rows_of(0).flatten().tolist() == [0, 2, 3]
        assert pools.rows_of(1).flatten().tolist() == [1]
        assert pools.rows_of(-1).flatten().tolist() == [1, 2, 3]  # of all classes, and the oldest is gone
        pools.push(x[4:6], torch.tensor([0, 1]))
        assert pools.rows_of(0).flatten().tolist() == [2, 3, 4]
        assert pools.rows_of(1).flatten().tolist() == [1, 5]
        pools.push(x[5:], torch.zeros(5, dtype=torch.int64))  # more than fit
        assert pools.rows_of(0).flatten().tolist() == [7, 8, 9]
        assert pools.rows_of(-1).flatten().tolist() == [7, 8, 9]
        assert pools.rows_of(1).flatten().tolist() == [1, 5]
        assert pools.rows_of(0).dtype == torch.float16

    def test_is_the_exact_oracle_of_the_same_rows(self, digits, path, brute_force, generator):
        """The last 150 rows of a class for its label, and the last 150 of all for the null label: no union."""
        x, labels = (each[digits[1] < 3] for each in digits)  # 537 of them
        x = x + 0.1 * torch.randn(x.shape, generator=generator)  # with digits that float16 rounds
        pools = ClassBanks(num_classes=3, size=150)
        for part in torch.arange(len(x)).split(100):
            pools.push(x[part], labels[part])
        t = torch.tensor(TIMES).repeat(8)
        asked = torch.randint(-1, 3, t.shape, generator=generator)
        x1 = pools.draw(asked, generator)
        x_t = path.interpolate(torch.randn(x1.shape, generator=generator), x1, t)
        posterior = pools.oracle(path).posterior(x_t, t, asked)
        for label in range(-1, 3):
            rows = (x if label == -1 else x[labels == label])[-150:]
            mine = asked == label
            truth = brute_force(rows.half().float(), None, x_t[mine], t[mine], path)
            for name in STATISTICS:
                expected = getattr(truth, name)
                found = getattr(posterior, name)[mine].double().reshape(expected.shape)
                torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)

    def test_an_unconditional_query_sees_the_null_pool_alone(self):
        """Also where no labels are given: the first rows are still in their class, but no longer in the null pool."""
        pools, path = ClassBanks(num_classes=1, size=2), LinearPath()
        x = torch.tensor([[-5.0], [-5.0], [1.0], [2.0]])
        pools.push(x[:2], torch.zeros(2, dtype=torch.int64))
        pools.push(x[2:])  # without labels: to the null pool only
        oracle, x_t, t = pools.oracle(path), torch.zeros(1, 1), torch.zeros(1)
        assert oracle.posterior(x_t, t).mean.item() == 1.5
        assert oracle.posterior(x_t, t, torch.tensor([-1])).mean.item() == 1.5
        assert oracle.posterior(x_t, t, torch.tensor([0])).mean.item() == -5

    def test_an_oracle_keeps_the_rows_of_its_making(self):
        pools, path = ClassBanks(num_classes=0, size=2), LinearPath()
        pools.push(torch.tensor([[1.0], [2.0]]))
        oracle = pools.oracle(path)
        pools.push(torch.tensor([[7.0], [7.0]]))
        assert oracle.posterior(torch.zeros(1, 1), torch.zeros(1)).mean.item() == 1.5

    def test_draws_come_from_the_pools_evenly(self, generator):
        pools = ClassBanks(num_classes=2, size=4)
        pools.push(torch.arange(12.0)[:, None], torch.tensor([0] * 6 + [1] * 6))
        labels = torch.tensor([0, 1, -1, 1]).repeat(2000)
        drawn = pools.draw(labels, generator)[:, 0]
        assert drawn.dtype == torch.float32
        for label in (0, 1, -1):
            values, counts = drawn[labels == label].unique(return_counts=True)
            assert values.tolist() == pools.rows_of(label).flatten().tolist()
            assert counts.min() > 0.8 * counts.float().mean()

    def test_draws_follow_the_generator_alone(self):
        pools = ClassBanks(num_classes=3)
        x = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
        pools.push(x, torch.arange(60) % 3)
        labels = torch.arange(30) % 4 - 1
        first = pools.draw(labels, torch.Generator().manual_seed(5))
        torch.manual_seed(99)
        assert torch.equal(first, pools.draw(labels, torch.Generator().manual_seed(5)))
        assert not torch.equal(first, pools.draw(labels, torch.Generator().manual_seed(6)))
        other = torch.where(torch.arange(30) == 0, 2, labels)  # one label more or less: the others' rows stay
        assert torch.equal(first[1:], pools.draw(other, torch.Generator().manual_seed(5))[1:])

    def test_says_what_it_is(self):
        pools = ClassBanks(num_classes=1)
        pools.push(torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
        assert pools.oracle(LinearPath()).approximate == "class banks of at most 256 rows, float16"

    def test_wrong_use_raises(self):
        pools, path, x = ClassBanks(num_classes=2), LinearPath(), torch.ones(3, 2)
        with pytest.raises(ValueError, match="pools are empty"):
            pools.oracle(path)
        with pytest.raises(ValueError, match="no row with label -1 was pushed"):
            pools.draw(torch.tensor([0]), torch.Generator())
        for labels in (torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.tensor([-2, 0, 0])):
            with pytest.raises(ValueError, match="a label from 0 to 1 for each of 3 rows"):
                pools.push(x, labels)
        with pytest.raises(ValueError, match="not finite in float16"):
            pools.push(1e6 * x)
        pools.push(x, torch.zeros(3, dtype=torch.int64))
        t, index = torch.full((3,), 0.5), torch.arange(3)
        with pytest.raises(ValueError, match="no row of the bank has label 1"):
            pools.oracle(path).posterior(x, t, torch.ones(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="counts rows of the training set.* no index"):
            pools.oracle(path).target(x, x, t, index=index)
        with pytest.raises(ValueError, match="counts rows of the training set.* no index"):
            decompose(pools.oracle(path), x, x, t, x, index=index)
        for wrong in ({"num_classes": -1}, {"num_classes": 1, "size": 0}):
            with pytest.raises(ValueError, match="at least one row of each"):
                ClassBanks(**wrong)


class TestSharedBatch:
    def shared(self, bank: DataBank, num: int, seed: int = 0) -> SharedBatchOracle:
        return SharedBatchOracle(bank, LinearPath(), num, torch.Generator().manual_seed(seed))

    def test_is_the_oracle_of_the_batch_and_further_rows(self, some, generator):
        x, labels = some
        bank, path = DataBank(x, labels), LinearPath()
        index, x0, x1, t = around(x, TIMES, 3, generator)
        target = self.shared(bank, 80, seed=3).target(x0, x1, t, labels[index])
        further = torch.randint(len(x), (50,), generator=torch.Generator().manual_seed(3))
        reference = Oracle(DataBank(torch.cat([x1, x[further]])), path)  # labels play no part
        torch.testing.assert_close(target, reference.target(x0, x1, t), rtol=1e-5, atol=1e-5)
        with_index = self.shared(bank, 80, seed=3).target(x0, torch.zeros_like(x1), t, labels[index], index)
        assert torch.equal(target, with_index)

    def test_the_generator_alone_decides(self, some, generator):
        bank = DataBank(some[0])
        _, x0, x1, t = around(some[0], TIMES, 3, generator)
        first = self.shared(bank, 64).target(x0, x1, t)
        torch.manual_seed(99)
        assert torch.equal(first, self.shared(bank, 64).target(x0, x1, t))
        assert not torch.equal(first, self.shared(bank, 64, seed=1).target(x0, x1, t))
        one = self.shared(bank, 64)
        assert torch.equal(first, one.target(x0, x1, t))
        assert not torch.equal(first, one.target(x0, x1, t))  # a new reference at every step
        whole = self.shared(bank, len(x1))  # the batch is the reference
        assert torch.equal(whole.target(x0, x1, t), whole.target(x0, x1, t))

    def test_diagnoses_take_any_label(self, some, generator):
        """Blind to labels: the same for every one, also for one that no row has."""
        bank = DataBank(*some)
        _, x0, x1, t = around(some[0], TIMES, 2, generator)
        oracle = self.shared(bank, 40).of_batch(x1)
        labels = torch.randint(-1, 20, t.shape, generator=generator)
        with_labels, without = (decompose(oracle, x0, x1, t, x0, each) for each in (labels, None))
        torch.testing.assert_close(with_labels.gap, without.gap, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(with_labels.floor, without.floor, rtol=1e-5, atol=1e-6)

    def test_says_what_it_is(self, some):
        shared = self.shared(DataBank(some[0]), 64)
        assert shared.approximate == "reference batches of 64 rows, blind to labels"
        assert shared.of_batch(some[0][:8]).approximate == shared.approximate

    def test_wrong_use_raises(self, some):
        bank = DataBank(some[0])
        with pytest.raises(ValueError, match="at least one row, got 0"):
            self.shared(bank, 0)
        with pytest.raises(ValueError, match="batch of 9 rows does not fit into a reference of num_reference=8"):
            self.shared(bank, 8).of_batch(some[0][:9])
        with pytest.raises(ValueError, match="counts rows of the training set"):
            self.shared(bank, 8).of_batch(some[0][:4]).bank.rows(torch.arange(2))


class TestAsEstimates:
    """Of the oracle's target on a small problem: 64 points in 2 dimensions, references of 16, at one time."""

    STEPS, BATCH, NUM = 600, 8, 16

    @pytest.fixture
    def problem(self, generator):
        bank, path = DataBank(torch.randn(64, 2, generator=generator)), LinearPath()
        index = torch.randint(64, (self.STEPS * self.BATCH,), generator=generator)
        x0 = torch.randn(len(index), 2, generator=generator)
        return Oracle(bank, path), x0, bank.rows(index), torch.full((len(index),), 0.6)

    def bias(self, target: Tensor, problem) -> tuple[float, float]:
        """Mean of <target - u*, direction> for a unit direction that depends on x_t alone, and its standard error."""
        oracle, x0, x1, t = problem
        x_t = oracle.path.interpolate(x0, x1, t)
        best = oracle.target(x0, x1, t)
        pull = torch.nn.functional.normalize(best, dim=1) * x_t.norm(dim=1, keepdim=True)
        product = ((target - best) * pull).sum(1) / (best * pull).sum(1).mean()
        return product.mean().item(), (product.std() / len(product) ** 0.5).item()

    def test_with_the_own_row_there_is_no_bias_and_without_it_there_is(self, problem):
        oracle, x0, x1, t = problem
        shared = SharedBatchOracle(oracle.bank, oracle.path, self.NUM, torch.Generator().manual_seed(1))
        others = torch.Generator().manual_seed(2)
        with_own, without = [], []
        for part in torch.arange(len(t)).split(self.BATCH):
            step = x0[part], x1[part], t[part]
            with_own.append(shared.target(*step))
            rows = oracle.bank.rows(torch.randint(64, (self.NUM,), generator=others))
            without.append(Oracle(DataBank(rows), oracle.path).target(*step))
        own, own_sem = self.bias(torch.cat(with_own), problem)
        none, none_sem = self.bias(torch.cat(without), problem)
        assert own_sem < 0.02
        assert abs(own) < 4 * own_sem
        assert abs(none) > 6 * none_sem
        assert abs(none) > 5 * abs(own)

    def test_the_floor_is_understated(self, problem):
        """By a subset with the own row, and by class banks for data drawn from them."""
        oracle, x0, x1, t = problem
        truth = decompose(oracle, x0, x1, t, x0).floor.mean()
        shared = SharedBatchOracle(oracle.bank, oracle.path, self.NUM, torch.Generator().manual_seed(1))
        parts = [
            decompose(shared.of_batch(x1[part]), x0[part], x1[part], t[part], x0[part]).floor
            for part in torch.arange(len(t)).split(self.BATCH)[:200]
        ]
        assert torch.cat(parts).mean() < 0.9 * truth
        pools = ClassBanks(num_classes=0, size=self.NUM)
        pools.push(oracle.bank.rows(torch.arange(64)))
        drawn = pools.draw(torch.full(t.shape, -1), torch.Generator().manual_seed(3))
        assert decompose(pools.oracle(oracle.path), x0, drawn, t, x0).floor.mean() < 0.9 * truth
