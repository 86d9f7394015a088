"""Targets from a few rows in place of the training set."""

import pytest
import torch

from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, GaussianMixtureBank, MixtureOracle, Oracle
from fm_stages.training import ClassSubsetTarget, SharedBatchTarget

PATH = LinearPath()
NUM, SHAPE = 60, (1, 2, 2)


@pytest.fixture
def oracle() -> Oracle:
    rows = torch.randn(NUM, *SHAPE, generator=torch.Generator().manual_seed(0))
    return Oracle(DataBank(rows, torch.arange(NUM) % 3), PATH)


def attached(target, oracle):
    target.attach(oracle)
    return target


def best(rows, x0, x1, t):
    """The oracle velocity of some rows, in float64, one query at a time."""
    velocities = []
    for noise, data, time in zip(x0.double(), x1.double(), t.double(), strict=True):
        x_t = time * data + (1 - time) * noise
        logits = -(x_t - time * rows.double()).square().flatten(1).sum(1) / (2 * (1 - time) ** 2)
        mean = (torch.softmax(logits, 0)[:, None, None, None] * rows.double()).sum(0)
        velocities.append((mean - x_t) / (1 - time))
    return torch.stack(velocities)


class TestClassSubset:
    def draw(self, target, labels, step=0):
        target.step = step
        x1, index = target.draw_data(torch.zeros(len(labels), *SHAPE), labels, None, torch.arange(len(labels)))
        return x1, index

    def test_data_are_rows_of_the_labels_pool(self, oracle):
        target = attached(ClassSubsetTarget(size=5), oracle)
        labels = torch.arange(400) % 4 - 1
        x1, index = self.draw(target, labels)
        assert torch.equal(x1, oracle.bank.rows(index))
        for label in (0, 1, 2):
            found = index[labels == label].unique()
            assert (found % 3 == label).all()
            assert len(found) == 5  # of the 20 rows of the class, each of the pool about 20 times
        assert len(index[labels == -1].unique()) == 5
        assert (index[labels == -1] % 3).unique().numel() > 1

    def test_the_target_is_the_oracle_of_the_pool(self, oracle):
        target = attached(ClassSubsetTarget(size=4), oracle)
        labels = torch.tensor([0, 1, 2, -1] * 60)
        x1, index = self.draw(target, labels)
        x0, t = torch.randn(240, *SHAPE), torch.rand(240) * 0.9
        found = target(PATH, x0, x1, t, labels, index)
        for label in (-1, 0, 1, 2):
            own = labels == label
            pool = oracle.bank.rows(index[own].unique())
            assert len(pool) == 4
            assert torch.allclose(found[own].double(), best(pool, x0[own], x1[own], t[own]), atol=1e-4)

    def test_a_pool_of_everything_is_the_oracle(self, oracle):
        target = attached(ClassSubsetTarget(size=NUM), oracle)
        labels = torch.arange(64) % 4 - 1
        x1, index = self.draw(target, labels)
        x0, t = torch.randn(64, *SHAPE), torch.rand(64)
        assert torch.allclose(target(PATH, x0, x1, t, labels), oracle.target(x0, x1, t, labels), atol=1e-4)

    def test_pools_change_with_the_round_and_depend_on_seed_and_step_alone(self, oracle):
        target = attached(ClassSubsetTarget(size=5, refresh_steps=10), oracle)
        labels = torch.zeros(200, dtype=torch.int64)
        pools = [set(self.draw(target, labels, step)[1].tolist()) for step in (0, 9, 10)]
        assert pools[0] == pools[1] != pools[2]
        resumed = attached(ClassSubsetTarget(size=5, refresh_steps=10), oracle)
        assert torch.equal(self.draw(resumed, labels, 10)[1], self.draw(target, labels, 10)[1])
        other = attached(ClassSubsetTarget(size=5, refresh_steps=10, seed=1), oracle)
        assert set(self.draw(other, labels)[1].tolist()) != pools[0]

    def test_a_rank_draws_its_part_of_the_batch(self, oracle):
        target = attached(ClassSubsetTarget(size=5), oracle)
        labels = torch.arange(40) % 4 - 1
        whole = self.draw(target, labels)[1]
        part = target.draw_data(torch.zeros(20, *SHAPE), labels[20:], None, torch.arange(20, 40))[1]
        assert torch.equal(whole[20:], part)

    def test_is_unbiased_given_x_t(self, oracle):
        """Averaged over pools, the target minus the conditional one has mean zero, also near x_t's own row."""
        target = attached(ClassSubsetTarget(size=6, refresh_steps=1), oracle)
        labels, differences = torch.full((256,), -1), []
        for step in range(200):
            x1, index = self.draw(target, labels, step)
            x0 = torch.randn(256, *SHAPE, generator=torch.Generator().manual_seed(step))
            t = torch.full((256,), 0.5)
            exact = oracle.target(x0, x1, t)
            error = target(PATH, x0, x1, t, labels) - exact
            differences.append((error * exact).flatten(1).sum(1).mean())
        differences = torch.stack(differences)
        assert abs(differences.mean()) < 4 * differences.std() / 200**0.5

    @pytest.mark.parametrize("given", [{"size": 0}, {"refresh_steps": 0}])
    def test_refuses(self, given):
        with pytest.raises(ValueError, match="must be 1 or more"):
            ClassSubsetTarget(**given)


class TestSharedBatch:
    def test_is_the_oracle_of_the_batch_where_nothing_is_added(self, oracle):
        target = attached(SharedBatchTarget(num_reference=16), oracle)
        x0, x1, t = torch.randn(16, *SHAPE), oracle.bank.rows(torch.arange(16)), torch.rand(16) * 0.9
        found = target(PATH, x0, x1, t, torch.arange(16) % 3)
        assert torch.allclose(found.double(), best(x1, x0, x1, t), atol=1e-4)

    def test_further_rows_depend_on_the_step(self, oracle):
        target = attached(SharedBatchTarget(num_reference=32), oracle)
        x0, x1, t = torch.randn(16, *SHAPE), oracle.bank.rows(torch.arange(16)), torch.full((16,), 0.3)
        first = target(PATH, x0, x1, t)
        assert torch.equal(first, target(PATH, x0, x1, t))
        target.step = 1
        assert not torch.equal(first, target(PATH, x0, x1, t))

    def test_refuses_a_batch_that_does_not_fit(self, oracle):
        target = attached(SharedBatchTarget(num_reference=8), oracle)
        with pytest.raises(ValueError, match="does not fit into a reference of num_reference=8"):
            target(PATH, torch.randn(16, *SHAPE), oracle.bank.rows(torch.arange(16)), torch.rand(16))

    def test_refuses_no_rows(self):
        with pytest.raises(ValueError, match="num_reference=0"):
            SharedBatchTarget(0)


@pytest.mark.parametrize("target", [ClassSubsetTarget(), SharedBatchTarget()])
def test_rows_that_are_drawn_anew_are_refused(target):
    bank = GaussianMixtureBank(torch.zeros(4, *SHAPE), torch.ones(4, *SHAPE))
    with pytest.raises(ValueError, match="drawn anew at every step"):
        target.attach(MixtureOracle(bank, PATH))
