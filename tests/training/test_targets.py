"""What the network is asked to predict: the conditional target, the oracle, and one before the other."""

import copy

import pytest
import torch

from fm_stages.flow import CosinePath, LinearPath
from fm_stages.oracle import DataBank, GaussianMixtureBank, MixtureOracle, Oracle
from fm_stages.training import BlendTarget, ConditionalTarget, HybridTarget, OracleTarget, TemperedTarget


@pytest.fixture(params=[LinearPath(), CosinePath()], ids=["linear", "cosine"])
def draws(request):
    """A path, the oracle of 12 labelled rows along it, and draws around them; the last label is null."""
    generator = torch.Generator().manual_seed(0)
    rows, row_labels = torch.randn(12, 1, 3, 3, generator=generator), torch.arange(12) % 3
    index = torch.tensor([0, 3, 7, 7, 11, 2])
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.3])
    labels = torch.where(torch.arange(6) < 5, row_labels[index], -1)
    x0 = torch.randn(6, 1, 3, 3, generator=generator)
    return request.param, Oracle(DataBank(rows, row_labels), request.param), x0, rows[index], t, labels, index


class TestConditional:
    def test_is_the_paths_velocity(self, draws):
        path, _, x0, x1, t, labels, index = draws
        assert torch.equal(ConditionalTarget()(path, x0, x1, t, labels, index), path.velocity(x0, x1, t))
        assert not ConditionalTarget().needs_oracle


class TestOracle:
    def test_is_the_oracles_target_for_the_label_that_the_network_sees(self, draws):
        path, oracle, x0, x1, t, labels, index = draws
        target = OracleTarget()
        target.attach(oracle)
        assert torch.equal(target(path, x0, x1, t, labels, index), oracle.target(x0, x1, t, labels, index))
        assert not torch.equal(target(path, x0, x1, t, labels), target(path, x0, x1, t))

    def test_is_the_velocity_by_definition(self, draws, by_definition):
        path, oracle, x0, x1, t, labels, index = draws
        target = OracleTarget()
        target.attach(oracle)
        rows, row_labels = oracle.bank.rows(torch.arange(12)), oracle.bank.labels_of(torch.arange(12))
        outputs = {"x0": x0, "x1": x1, "t": t, "labels": labels, "prediction": target(path, x0, x1, t, labels, index)}
        gap = by_definition(rows, row_labels, path, outputs)["gap"]
        assert gap.max() < 1e-10  # the prediction is the oracle

    def test_its_mean_over_draws_is_the_conditional_targets(self, draws):
        """The same expected gradient: the identity's cross term."""
        path, oracle, *_ = draws
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(12, (4096,), generator=generator)
        x0, x1 = torch.randn(4096, 1, 3, 3, generator=generator), oracle.bank.rows(index)
        t = torch.full((4096,), 0.3)
        target = OracleTarget()
        target.attach(oracle)
        difference = (target(path, x0, x1, t) - path.velocity(x0, x1, t)).flatten(1)
        error = difference.std(0) / 64
        assert ((difference.mean(0) / error).abs() < 4).all()
        assert difference.abs().mean() > 0.1

    @pytest.mark.parametrize("target", [OracleTarget(), HybridTarget(0.5)])
    def test_without_an_oracle_says_what_to_do(self, draws, target):
        path, _, x0, x1, t, *_ = draws
        with pytest.raises(RuntimeError, match=rf"{type(target).__name__} needs the bank .* attach\(Oracle"):
            target(path, x0, x1, t)

    @pytest.mark.parametrize("target", [OracleTarget(), HybridTarget(0.5)])
    def test_a_copy_holds_the_same_oracle(self, draws, target):
        oracle = draws[1]
        target.attach(oracle)
        assert copy.deepcopy(target).oracle is oracle
        assert copy.deepcopy({"target": target, "oracle": oracle})["oracle"].bank is oracle.bank


class TestHybrid:
    @pytest.mark.parametrize("boundary", [0.0, 0.2, 0.3, 0.5, 1.0])
    def test_switches_at_the_boundary_row_by_row(self, draws, boundary):
        path, oracle, x0, x1, t, labels, index = draws
        target = HybridTarget(boundary)
        target.attach(oracle)
        best, conditional = oracle.target(x0, x1, t, labels, index), path.velocity(x0, x1, t)
        rows = target(path, x0, x1, t, labels, index)
        for row, time, early, late in zip(rows, t, best, conditional, strict=True):
            # a row's posterior is summed with other rows' in another order: equal up to rounding
            torch.testing.assert_close(row, early if time < torch.tensor(boundary) else late, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(best[0], conditional[0], atol=1e-2)

    def test_works_without_labels_and_index(self, draws):
        path, oracle, x0, x1, t, *_ = draws
        target = HybridTarget(1.0)
        target.attach(oracle)
        torch.testing.assert_close(target(path, x0, x1, t), oracle.target(x0, x1, t))

    def test_needs_no_oracle_where_all_is_late(self, draws):
        path, _, x0, x1, t, *_ = draws
        assert torch.equal(HybridTarget(0.01)(path, x0, x1, t), path.velocity(x0, x1, t))

    def test_the_arguments_are_left_alone(self, draws):
        path, oracle, x0, x1, t, labels, index = draws
        before = [x.clone() for x in (x0, x1, t, labels, index)]
        target = HybridTarget(0.5)
        target.attach(oracle)
        target(path, x0, x1, t, labels, index)
        assert all(torch.equal(a, b) for a, b in zip(before, (x0, x1, t, labels, index), strict=True))

    @pytest.mark.parametrize("boundary", [-0.1, 2.0, float("nan")])
    def test_a_boundary_outside_the_interval_raises(self, boundary):
        with pytest.raises(ValueError, match=rf"a time in \[0, 1\], got {boundary}"):
            HybridTarget(boundary)

    def test_a_posterior_that_ends_on_no_point_is_refused(self, draws):
        """Rows that are distributions leave a floor past the boundary; the oracle's target is right for all t."""
        path, _, x0, x1, t, *_ = draws
        oracle = MixtureOracle(GaussianMixtureBank(x1, torch.full_like(x1, 0.3)), path)
        with pytest.raises(ValueError, match="floor is not 0 past the boundary.* use OracleTarget for all t"):
            HybridTarget(0.5).attach(oracle)
        target = OracleTarget()
        target.attach(oracle)
        assert torch.equal(target(path, x0, x1, t), oracle.target(x0, x1, t))


def attached(target, oracle):
    target.attach(oracle)
    return target


class TestBlend:
    def test_is_the_share_of_each(self, draws):
        path, oracle, x0, x1, t, labels, index = draws
        blend = attached(BlendTarget([0.2, 0.6], [1.0, 0.0]), oracle)(path, x0, x1, t, labels, index)
        best = attached(OracleTarget(), oracle)(path, x0, x1, t, labels, index)
        usual = path.velocity(x0, x1, t)
        for i, share in enumerate([1.0, 1.0, 0.5, 0.0, 0.0, 0.75]):  # t = 0.05, 0.2, 0.4, 0.6, 0.8, 0.3
            assert torch.allclose(blend[i], share * best[i] + (1 - share) * usual[i], atol=1e-5)

    def test_asks_nothing_where_its_share_is_0(self, draws, monkeypatch):
        path, oracle, x0, x1, t, labels, index = draws
        target = attached(BlendTarget([0.5, 0.55], [1.0, 0.0]), oracle)
        asked, usual = [], oracle.target
        monkeypatch.setattr(oracle, "target", lambda x0, *rest: asked.append(len(x0)) or usual(x0, *rest))
        target(path, x0, x1, t, labels, index)
        target(path, x0[3:5], x1[3:5], t[3:5], labels[3:5], index[3:5])
        assert asked == [4]  # t = 0.05, 0.2, 0.4, 0.3

    @pytest.mark.parametrize(
        ("t", "share"), [([], []), ([0.1], [0.5, 0.5]), ([0.2, 0.1], [1, 0]), ([0.1, 0.2], [1, 1.1]), ([0.1], [-0.1])]
    )
    def test_refuses(self, t, share):
        with pytest.raises(ValueError, match="share"):
            BlendTarget(t, share)


class TestTempered:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_divides_the_logits(self, draws, temperature):
        path, oracle, x0, x1, t, labels, index = draws
        found = attached(TemperedTarget(temperature), oracle)(path, x0, x1, t, labels, index).double()
        rows, row_labels = oracle.bank.rows(torch.arange(12)).double(), oracle.bank.labels_of(torch.arange(12))
        for i in range(6):
            a, s = (f(t[i : i + 1].double()) for f in (path.alpha, path.sigma))
            x_t = (a * x1[i] + s * x0[i]).double()
            logits = -(x_t - a * rows).square().flatten(1).sum(1) / (2 * s**2) / temperature
            if labels[i] != -1:
                logits[row_labels != labels[i]] = -torch.inf
            mean = (torch.softmax(logits, 0)[:, None, None, None] * rows).sum(0)
            expected = path.velocity_from_mean(mean[None], x_t[None], t[i : i + 1].double())[0]
            assert torch.allclose(found[i], expected, atol=1e-4)

    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
    def test_refuses(self, temperature):
        with pytest.raises(ValueError, match="temperature"):
            TemperedTarget(temperature)
