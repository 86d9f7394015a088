"""What each policy makes of measured stages, by arithmetic."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from fm_stages.flow import LearnedWeighting, LinearPath, LogitNormalTimesteps, ShiftedTimesteps, UniformTimesteps
from fm_stages.oracle import Curves, DataBank, Oracle, timestep_bins
from fm_stages.training import GapDensity, OracleTarget, ShiftToBoundary, StageWeights, TargetByStage
from fm_stages.training.steering.gap_density import NODES
from fm_stages.training.steering.policies import NoProposalError

ORACLE = Oracle(DataBank(torch.eye(4).reshape(4, 1, 2, 2)), LinearPath())


def stages(boundary: float) -> SimpleNamespace:
    """All that a policy reads of a profile."""
    return SimpleNamespace(boundary=boundary)


def gap_curves(gap, count: int = 10) -> Curves:
    """The gap as a function of t, in the monitor's bins."""
    edges = timestep_bins()
    centre = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    return Curves(edges, [count] * len(centre), {"gap": [gap(t) for t in centre]})


def started(policy, make_module, **kwargs):
    module = make_module(**kwargs)
    return module, policy.start(module)


class TestShiftToBoundary:
    @pytest.mark.parametrize("fraction", [0.2, 0.5, 0.7])
    @pytest.mark.parametrize("base", [UniformTimesteps(), LogitNormalTimesteps(0.5, 1.2), ShiftedTimesteps(2.0)])
    def test_that_fraction_of_the_draws_falls_before_the_boundary(self, make_module, fraction, base):
        policy = ShiftToBoundary(fraction, smallest=1e-3, largest=1e3)
        module, begin = started(policy, make_module, timesteps=base)
        numbers, reason = policy.propose(stages(0.3), None)
        policy.apply(module, ORACLE, numbers)
        t = module.timesteps.sample(20_000, torch.Generator().manual_seed(0))
        assert (t < 0.3).float().mean().item() == pytest.approx(fraction, abs=0.015)
        assert policy.scalars(numbers) == {"stages/shift": module.timesteps.shift}  # as the monitor logs it
        assert "t = 0.300" in reason
        policy.apply(module, ORACLE, begin)  # the numbers that it begins with change nothing
        u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
        assert torch.allclose(module.timesteps.icdf(u), base.icdf(u))

    def test_two_shifts_are_one(self, make_module):
        policy = ShiftToBoundary(0.5)
        module, _ = started(policy, make_module, timesteps=ShiftedTimesteps(2.0))
        policy.apply(module, ORACLE, [3.0])
        assert module.timesteps.shift == 6.0
        assert isinstance(module.timesteps.base, UniformTimesteps)

    def test_the_formula_for_uniform_t(self):
        (shift,), _ = ShiftToBoundary(0.6).propose(stages(0.25), None)
        assert shift == pytest.approx(0.6 * 0.75 / (0.4 * 0.25))

    def test_bounds(self):
        numbers, reason = ShiftToBoundary(0.9, largest=4.0).propose(stages(0.02), None)
        assert numbers == [4.0]
        assert "bounded from 441" in reason
        assert ShiftToBoundary(0.1, smallest=0.5).propose(stages(0.9), None)[0] == [0.5]


class TestGapDensity:
    @pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
    def test_is_in_proportion_to_the_gap(self, make_module, power):
        policy = GapDensity(power, floor=1e-6, largest=1e6)
        module, _ = started(policy, make_module)
        policy.apply(module, ORACLE, policy.propose(stages(0.3), gap_curves(lambda t: math.exp(-2 * t)))[0])
        t = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
        density = module.timesteps.log_prob(t).exp().numpy()
        expected = np.exp(-2 * power * t.numpy())
        np.testing.assert_allclose(density / density[0], expected / expected[0], rtol=0.08)

    def test_no_t_starves(self, make_module):
        policy = GapDensity(2.0, floor=0.3)
        module, _ = started(policy, make_module)
        policy.apply(module, ORACLE, policy.propose(stages(0.3), gap_curves(lambda t: 1.0 if t < 0.1 else 1e-9))[0])
        density = module.timesteps.log_prob(torch.linspace(0.001, 0.999, 500, dtype=torch.float64)).exp()
        assert density.min().item() > 0.2
        assert density.max().item() < 5 / 0.9

    def test_power_0_is_uniform(self):
        numbers, _ = GapDensity(0.0).propose(stages(0.3), gap_curves(lambda t: 1 - t))
        assert numbers == pytest.approx([1.0] * len(NODES))

    def test_begins_with_the_configured_density(self, make_module):
        base = LogitNormalTimesteps(-0.3, 0.9)
        policy = GapDensity()
        module, begin = started(policy, make_module, timesteps=base)
        policy.apply(module, ORACLE, begin)
        t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        z = (torch.logit(t) + 0.3) / 0.9
        expected = scipy.stats.norm.pdf(z.numpy()) / 0.9 / (t * (1 - t)).numpy()
        np.testing.assert_allclose(module.timesteps.log_prob(t).exp().numpy(), expected, rtol=0.15)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_gap_that_is_not_finite_proposes_nothing(self, bad):
        with pytest.raises(NoProposalError, match="not finite"):
            GapDensity().propose(stages(0.3), gap_curves(lambda t: bad if 0.4 < t < 0.6 else 1.0))

    def test_empty_bins_are_bridged_until_they_are_too_many(self):
        curves = gap_curves(lambda t: 2.0)
        for i in range(0, len(curves.count), 3):
            curves.count[i], curves.mean["gap"][i] = 0, math.nan
        assert GapDensity().propose(stages(0.3), curves)[0] == pytest.approx([1.0] * len(NODES))
        curves.count = [0] * len(curves.count)
        with pytest.raises(NoProposalError, match="0 of 18 timestep bins"):
            GapDensity().propose(stages(0.3), curves)

    def test_needs_a_gap(self):
        with pytest.raises(NoProposalError, match="no gap was measured"):
            GapDensity().propose(stages(0.3), None)


class TestStageWeights:
    @pytest.mark.parametrize("importance", [False, True])
    @pytest.mark.parametrize("base", [UniformTimesteps(), LogitNormalTimesteps(0.2, 1.3)])
    @pytest.mark.parametrize(("share", "boundary"), [(0.6, 0.3), (0.2, 0.3), (0.7, 0.578), (0.3, 0.1)])
    def test_navigation_has_its_share_of_the_weight(self, make_module, base, share, boundary, importance):
        policy = StageWeights(share)
        module, begin = started(policy, make_module, timesteps=base, importance_weights=importance)
        policy.apply(module, ORACLE, policy.propose(stages(boundary), None)[0])
        t = base.icdf((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
        weights = module.weighting(t)
        assert weights.mean().item() == pytest.approx(1, abs=0.01)
        assert (weights[t < boundary].sum() / weights.sum()).item() == pytest.approx(share, abs=0.01)
        policy.apply(module, ORACLE, begin)
        some = t[10_000::20_000][:9]
        plain = base.log_prob(some).neg().exp().tolist() if importance else [1.0] * 9
        assert module.weighting(some).tolist() == pytest.approx(plain, rel=1e-3)

    def test_refuses_to_replace_weights_that_are_learned(self, make_module):
        with pytest.raises(ValueError, match="LearnedWeighting, which learns"):
            StageWeights().start(make_module(weighting=LearnedWeighting()))

    @pytest.mark.parametrize("policy", [StageWeights(0.99), StageWeights(0.5)])
    def test_proposes_nothing_where_no_weights_give_the_share(self, make_module, policy):
        started(policy, make_module, timesteps=LogitNormalTimesteps(4.0, 0.3))
        with pytest.raises(NoProposalError, match="of the weight, not"):
            policy.propose(stages(0.1), None)


class TestTargetByStage:
    @pytest.mark.parametrize("share", [1.0, 0.4])
    def test_a_share_of_the_oracle_before_the_boundary(self, make_module, share):
        policy = TargetByStage(share)
        module, _ = started(policy, make_module)
        policy.apply(module, ORACLE, policy.propose(stages(0.4), None)[0])
        x1, t = torch.eye(4).reshape(4, 1, 2, 2), torch.tensor([0.1, 0.39, 0.43, 0.8])
        x0 = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        found = module.target(LinearPath(), x0, x1, t)
        usual, best = x1 - x0, ORACLE.target(x0, x1, t)
        expected = [*(share * best + (1 - share) * usual)[:2], *usual[2:]]
        assert torch.allclose(found, torch.stack(expected), atol=1e-5)

    def test_refuses_to_replace_another_target(self, make_module):
        with pytest.raises(ValueError, match="would take the place of OracleTarget"):
            TargetByStage().start(make_module(target=OracleTarget()))


@pytest.mark.parametrize("policy", [ShiftToBoundary(), StageWeights(), TargetByStage()])
@pytest.mark.parametrize(("boundary", "said"), [(0.0, "has always collapsed"), (1.0, "never collapses")])
def test_data_with_one_stage_proposes_nothing(policy, boundary, said):
    with pytest.raises(NoProposalError, match=said):
        policy.propose(stages(boundary), None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShiftToBoundary(0.0),
        lambda: ShiftToBoundary(math.nan),
        lambda: ShiftToBoundary(smallest=2.0, largest=1.0),
        lambda: GapDensity(-1.0),
        lambda: GapDensity(floor=0.0),
        lambda: GapDensity(largest=1.0),
        lambda: StageWeights(1.0),
        lambda: StageWeights(width=0.0),
        lambda: TargetByStage(0.0),
        lambda: TargetByStage(1.1),
        lambda: ShiftToBoundary(warmup_steps=-1),
        lambda: ShiftToBoundary(every_n_steps=0),
        lambda: ShiftToBoundary(smoothing=1.0),
    ],
)
def test_bad_numbers_are_refused(make):
    with pytest.raises(ValueError, match="="):
        make()
