"""Timestep samplers against scipy's distributions, and the shift against diffusers."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_stages.flow import (
    BetaTimesteps,
    LogitNormalTimesteps,
    ModeTimesteps,
    ResolutionShiftedTimesteps,
    ShiftedTimesteps,
    TabulatedTimesteps,
    TruncatedTimesteps,
    UniformTimesteps,
    keyed_generator,
    shift_for_share,
    shift_time,
    time_grid,
)

LAST = 1 - 2**-24  # the float32 below 1


def logit_normal_cdf(t, mean: float, std: float):
    with np.errstate(divide="ignore"):  # logit(0) and logit(1) are what they should be
        return scipy.stats.norm.cdf((np.log(t) - np.log1p(-t)) / std, loc=mean / std)


def unshift(t, s: float):
    """From t' = t / (t + s (1 - t)), solved for t."""
    return s * t / (1 + (s - 1) * t)


def mode_cdf(t, s: float):
    """SD3's t = 1 - u - s (cos^2(pi u / 2) - 1 + u) with time reversed, solved for u one by one."""

    def reversed_time(u: float) -> float:
        return 1 - u - s * (math.cos(math.pi * u / 2) ** 2 - 1 + u)

    return np.array([scipy.optimize.brentq(lambda u, x=x: 1 - reversed_time(u) - x, 0, 1, xtol=1e-15) for x in t])


def truncated_cdf(t, low: float, high: float, mean: float, std: float):
    below, above = (logit_normal_cdf(np.array(x), mean, std) for x in (low, high))
    return np.clip((logit_normal_cdf(t, mean, std) - below) / (above - below), 0, 1)


NODES, HEIGHTS = [0.0, 0.1037, 0.3521, 0.6013, 1.0], [0.2, 3.0, 1.0, 0.7, 0.0]


def tabulated_cdf(t):
    """By adding up the trapezoids."""
    t = np.atleast_1d(t)
    whole = np.trapezoid(HEIGHTS, NODES)
    inner = [np.concatenate([[n for n in NODES if n < x], [x]]) for x in t]
    return np.array([np.trapezoid(np.interp(nodes, NODES, HEIGHTS), nodes) for nodes in inner]) / whole


# Each sampler with its distribution function, written independently of it
SAMPLERS = {
    "uniform": (UniformTimesteps(), lambda t: t),
    "normal": (LogitNormalTimesteps(), lambda t: logit_normal_cdf(t, 0, 1)),
    "noisy": (LogitNormalTimesteps(-0.8, 0.6), lambda t: logit_normal_cdf(t, -0.8, 0.6)),
    "wide": (LogitNormalTimesteps(0.5, 2.0), lambda t: logit_normal_cdf(t, 0.5, 2.0)),
    "shifted": (ShiftedTimesteps(3.0), lambda t: unshift(t, 3.0)),
    "to data": (ShiftedTimesteps(0.3), lambda t: unshift(t, 0.3)),
    "both": (
        ShiftedTimesteps(2.0, LogitNormalTimesteps(-0.4, 1.2)),
        lambda t: logit_normal_cdf(unshift(t, 2.0), -0.4, 1.2),
    ),
    "twice": (ShiftedTimesteps(2.0, ShiftedTimesteps(1.5)), lambda t: unshift(t, 3.0)),
    "resolution": (ResolutionShiftedTimesteps(36_864), lambda t: unshift(t, 3.0)),
    "middle": (ModeTimesteps(1.29), lambda t: mode_cdf(t, 1.29)),
    "ends": (ModeTimesteps(-0.7), lambda t: mode_cdf(t, -0.7)),
    "beta": (BetaTimesteps(1.5, 2.5), lambda t: scipy.stats.beta.cdf(t, 1.5, 2.5)),
    "beta to the ends": (BetaTimesteps(0.8, 0.9), lambda t: scipy.stats.beta.cdf(t, 0.8, 0.9)),
    "tabulated": (TabulatedTimesteps(NODES, HEIGHTS), tabulated_cdf),
    "flat table": (TabulatedTimesteps([0.0, 0.3, 1.0]), lambda t: t),
}
every_sampler = pytest.mark.parametrize(("sampler", "cdf"), SAMPLERS.values(), ids=SAMPLERS.keys())


def wide(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


class TestDensities:
    @every_sampler
    def test_cdf_is_the_distributions(self, sampler, cdf):
        t = np.linspace(1e-4, 1 - 1e-4, 401)
        np.testing.assert_allclose(sampler.cdf(wide(t)).numpy(), cdf(t), rtol=0, atol=1e-12)
        np.testing.assert_allclose(sampler.cdf(wide(t).float()).double().numpy(), cdf(t), rtol=0, atol=3e-7)
        assert sampler.cdf(torch.tensor([0.0, 1.0])).tolist() == [0, 1]

    @every_sampler
    def test_icdf_is_the_inverse(self, sampler, cdf):
        u = np.linspace(1e-6, 1 - 1e-6, 401)
        t = sampler.icdf(wide(u)).numpy()
        assert (np.diff(t) > 0).all()
        np.testing.assert_allclose(cdf(t), u, rtol=0, atol=1e-12)
        u32 = wide(u).float()  # rounded: near 1 a long way in t
        np.testing.assert_allclose(sampler.icdf(u32).double(), sampler.icdf(u32.double()), rtol=0, atol=1e-7)

    @every_sampler
    def test_density_integrates_to_one(self, sampler, cdf):
        def mass(logit: float) -> float:  # over logit(t), where no density has a cliff
            t = scipy.special.expit(logit)
            return math.exp(sampler.log_prob(wide([t])).item()) * t * (1 - t)

        assert scipy.integrate.quad(mass, -36, 36, limit=200, points=[0])[0] == pytest.approx(1, abs=1e-7)

    @every_sampler
    def test_density_is_the_slope_of_the_cdf(self, sampler, cdf):
        t, h = np.linspace(0.01, 0.99, 197), 1e-5
        slope = (cdf(t + h) - cdf(t - h)) / (2 * h)
        np.testing.assert_allclose(sampler.log_prob(wide(t)).exp().numpy(), slope, rtol=1e-5, atol=1e-8)
        t32 = wide(t).float()
        np.testing.assert_allclose(sampler.log_prob(t32).double(), sampler.log_prob(t32.double()), rtol=0, atol=3e-5)

    def test_no_density_outside(self):
        assert UniformTimesteps().log_prob(torch.tensor([-0.1, 0.0, 1.0, 1.1])).exp().tolist() == [0, 1, 1, 0]
        assert LogitNormalTimesteps().log_prob(torch.tensor([-0.1, 0.0, 1.0, 1.1])).exp().tolist() == [0] * 4

    @every_sampler
    def test_draws_follow_it(self, sampler, cdf):
        draws = sampler.sample(20_000, keyed_generator("test", 0))
        assert draws.dtype == torch.float32
        assert torch.equal(draws, sampler.sample(20_000, keyed_generator("test", 0)))
        distance = scipy.stats.kstest(draws.double().numpy(), cdf).statistic
        assert distance * math.sqrt(20_000) < 1.95  # exceeded once in a thousand seeds


class TestRange:
    @every_sampler
    def test_float32_draws_reach_neither_one_nor_below_zero(self, sampler, cdf):
        u = torch.tensor([0.0, 2.0**-149, 2.0**-24, 0.5, 1 - 2**-23, LAST])
        t = sampler.icdf(u)
        assert t.dtype == torch.float32
        assert (t >= 0).all()
        assert (t <= LAST).all()
        assert (t.diff() >= 0).all()

    @settings(deadline=None, max_examples=150)
    @given(
        u=st.floats(0, LAST, width=32),
        mean=st.floats(-30, 30),
        std=st.floats(1e-3, 20),
        log_shift=st.floats(-20, 20),
    )
    def test_extreme_densities(self, u, mean, std, log_shift):
        base = LogitNormalTimesteps(mean, std)
        for sampler in (base, ShiftedTimesteps(math.exp(log_shift)), ShiftedTimesteps(math.exp(log_shift), base)):
            t = sampler.icdf(torch.tensor([u]))
            assert 0 <= t.item() <= LAST

    @pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
    def test_a_shift_that_is_not_positive_and_finite_raises(self, shift):
        with pytest.raises(ValueError, match="shift must be positive"):
            ShiftedTimesteps(shift)
        with pytest.raises(ValueError, match="shift must be positive"):
            shift_time(torch.tensor([0.5]), shift)

    @pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
    def test_a_spread_that_is_not_positive_and_finite_raises(self, std):
        with pytest.raises(ValueError, match="standard deviation"):
            LogitNormalTimesteps(0.0, std)

    def test_a_mean_that_is_no_number_raises(self):
        with pytest.raises(ValueError, match="mean of logit"):
            LogitNormalTimesteps(math.nan)


shifts = st.floats(1e-3, 1e3)


class TestShift:
    def test_is_that_of_diffusers(self):
        """Their sigma is our 1 - t, and their shift is the same number as ours."""
        from diffusers import FlowMatchEulerDiscreteScheduler  # takes seconds to import

        for shift in (0.5, 1.0, 3.0, 6.5):
            sigma = FlowMatchEulerDiscreteScheduler(shift=1.0).sigmas
            theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
            np.testing.assert_allclose(theirs, shift * sigma / (1 + (shift - 1) * sigma), atol=1e-6)
            np.testing.assert_allclose(1 - shift_time(1 - sigma, shift), theirs, rtol=0, atol=5e-7)

    @settings(deadline=None)
    @given(t=st.floats(0, 1), s=shifts, r=shifts)
    def test_inverse_and_composition(self, t, s, r):
        time = wide([t])
        shifted = shift_time(time, s)
        assert 0 <= shifted.item() <= 1
        assert shift_time(shifted, 1 / s).item() == pytest.approx(t, abs=1e-12)
        # shifts multiply; where t is as near 1 as float64 can tell, nothing is left to compare
        assert shift_time(shifted, r).item() == pytest.approx(shift_time(time, s * r).item(), abs=1e-9)
        sigma = s * (1 - t) / (1 + (s - 1) * (1 - t))  # the same, written with time reversed
        assert shifted.item() == pytest.approx(1 - sigma, abs=1e-9)

    def test_ends_and_direction(self):
        t = torch.linspace(0, 1, 11)
        for s in (0.2, 1.0, 5.0):
            shifted = shift_time(t, s)
            assert (shifted[0].item(), shifted[-1].item()) == (0, 1)
            assert (shifted.diff() > 0).all()
        assert (shift_time(t, 3.0)[1:-1] < t[1:-1]).all()  # above 1: towards noise
        assert torch.equal(shift_time(t, 1.0), t)

    def test_shifted_draws_are_shifted_draws(self):
        u = torch.linspace(0, 0.999, 50)
        torch.testing.assert_close(ShiftedTimesteps(3.0).icdf(u), shift_time(u, 3.0), rtol=1e-6, atol=0)


class TestShiftForShare:
    @pytest.mark.parametrize("share", [0.02, 0.34, 0.5, 0.9])
    @pytest.mark.parametrize("time", [0.001, 0.1, 0.308, 0.95])
    @pytest.mark.parametrize(
        "base", [None, LogitNormalTimesteps(0.4, 1.3), ShiftedTimesteps(2.5)], ids=["uniform", "normal", "shifted"]
    )
    def test_that_share_of_the_draws_falls_before_the_time(self, share, time, base):
        sampler = ShiftedTimesteps(shift_for_share(share, time, base), base)
        assert sampler.cdf(wide([time])).item() == pytest.approx(share, abs=1e-9)

    def test_the_best_row_of_the_published_sweep(self):
        """34 % of 50 steps before t = 0.2 (arXiv 2512.02826, Table 2), where its s = 0.5 is 1 / our shift."""
        shift = shift_for_share(1 / 3, 0.2)
        assert shift == pytest.approx(2)
        nodes = time_grid(50, shift)[:-1]
        assert (nodes < 0.2).float().mean().item() == pytest.approx(0.34)

    @pytest.mark.parametrize(
        ("share", "time"), [(0, 0.3), (1, 0.3), (math.nan, 0.3), (0.5, 0), (0.5, 1), (0.5, math.nan)]
    )
    def test_refuses_what_no_shift_can_do(self, share, time):
        with pytest.raises(ValueError, match="no shift"):
            shift_for_share(share, time)


class TestTruncated:
    @pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.3, 1.0), (0.2, 0.25)])
    def test_is_the_base_within_the_interval(self, low, high):
        sampler = TruncatedTimesteps(low, high, LogitNormalTimesteps(-0.5, 1.1))
        t = np.linspace(1e-4, 1 - 1e-4, 301)
        np.testing.assert_allclose(sampler.cdf(wide(t)).numpy(), truncated_cdf(t, low, high, -0.5, 1.1), atol=1e-10)
        u = np.linspace(1e-6, 1 - 1e-6, 301)
        np.testing.assert_allclose(truncated_cdf(sampler.icdf(wide(u)).numpy(), low, high, -0.5, 1.1), u, atol=1e-9)
        inside = scipy.integrate.quad(lambda x: sampler.log_prob(wide([x])).exp().item(), low, high)[0]
        assert inside == pytest.approx(1, abs=1e-6)
        outside = wide([x for x in (low - 0.05, high + 0.05) if 0 < x < 1])
        assert torch.isinf(sampler.log_prob(outside)).all()

    def test_draws_stay_inside(self):
        draws = TruncatedTimesteps(0.3, 0.31, ShiftedTimesteps(5.0)).sample(10_000, keyed_generator("draws"))
        assert 0.3 <= draws.min().item() <= draws.max().item() <= np.float32(0.31)

    @pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
    def test_refuses_what_is_no_interval(self, low, high):
        with pytest.raises(ValueError, match="no interval"):
            TruncatedTimesteps(low, high)

    def test_refuses_an_interval_without_draws(self):
        with pytest.raises(ValueError, match="no draws to speak of"):
            TruncatedTimesteps(0.99, 1.0, LogitNormalTimesteps(-4.0, 0.5))


class TestTabulated:
    def test_a_new_density_is_drawn_from_at_once(self):
        sampler = TabulatedTimesteps([0.0, 0.5, 1.0])
        sampler.write([0.0, 0.0, 5.0])  # a triangle over [0.5, 1]
        t = np.linspace(0.5, 1, 51)
        np.testing.assert_allclose(sampler.cdf(wide(t)).numpy(), (2 * t - 1) ** 2, atol=1e-12)
        np.testing.assert_allclose(sampler.icdf(wide([0.0, 0.25, 0.81])).numpy(), [0.5, 0.75, 0.95], atol=1e-12)
        assert sampler.density == pytest.approx([0, 0, 4])

    def test_nothing_is_drawn_from_an_empty_bin(self):
        sampler = TabulatedTimesteps([0.0, 0.2, 0.4, 0.7, 1.0], [1.0, 0.0, 0.0, 1.0, 0.0])
        draws = sampler.sample(20_000, keyed_generator("draws"))
        assert not ((draws > 0.2001) & (draws < 0.3999)).any()

    @pytest.mark.parametrize("nodes", [[0.0], [0.1, 1.0], [0.0, 0.9], [0.0, 0.5, 0.5, 1.0], [0.0, math.nan, 1.0]])
    def test_refuses_nodes_that_do_not_rise_from_0_to_1(self, nodes):
        with pytest.raises(ValueError, match="nodes"):
            TabulatedTimesteps(nodes)

    @pytest.mark.parametrize(
        "density", [[1.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [math.inf, 1, 1]]
    )
    def test_refuses_what_is_no_density(self, density):
        sampler = TabulatedTimesteps([0.0, 0.5, 1.0])
        with pytest.raises(ValueError, match="one number of 0 or more"):
            sampler.write(density)
        assert sampler.density == [1, 1, 1]


@pytest.mark.parametrize("scale", [-1.01, 1.76, math.nan])
def test_mode_refuses_a_scale_for_which_t_does_not_rise(scale):
    with pytest.raises(ValueError, match="scale"):
        ModeTimesteps(scale)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_beta_refuses(alpha, beta):
    with pytest.raises(ValueError, match="must be positive"):
        BetaTimesteps(alpha, beta)


def test_the_published_resolution_shift():
    """RAE's latents of 768 x 16 x 16 values: 6.93."""
    assert ResolutionShiftedTimesteps(768 * 16 * 16).shift == pytest.approx(6.93, abs=0.005)


inner = st.floats(0.02, 0.98)
tables = st.lists(
    st.tuples(inner, st.floats(0.05, 5)), min_size=1, max_size=6, unique_by=lambda node: round(node[0], 2)
)
plain_samplers = st.one_of(
    st.just(UniformTimesteps()),
    st.builds(LogitNormalTimesteps, st.floats(-2, 2), st.floats(0.2, 3)),
    st.builds(ModeTimesteps, st.floats(-0.95, 1.7)),
    st.builds(BetaTimesteps, st.floats(0.4, 4), st.floats(0.4, 4)),
    tables.map(
        lambda nodes: TabulatedTimesteps([0.0, *sorted(t for t, _ in nodes), 1.0], [1.0, *(p for _, p in nodes), 0.3])
    ),
)
any_sampler = st.one_of(
    plain_samplers,
    st.builds(ShiftedTimesteps, st.floats(0.1, 10), plain_samplers),
    st.builds(TruncatedTimesteps, st.floats(0.02, 0.4), st.floats(0.6, 0.98), plain_samplers),
    st.builds(lambda s, low: ShiftedTimesteps(s, TruncatedTimesteps(low, 1.0)), st.floats(0.2, 5), st.floats(0, 0.9)),
)


def test_beta_quantiles_of_tiny_numbers():
    """Where scipy's own are NaN."""
    sampler, u = BetaTimesteps(3.1, 2.7), wide([0.0, 1e-300, 1e-200, 1e-130, 1e-106])
    t = sampler.icdf(u)
    assert t[0] == 0
    torch.testing.assert_close(sampler.cdf(t), u, rtol=1e-9, atol=0)


class TestAnySampler:
    """Whatever its numbers, also one inside another."""

    @given(sampler=any_sampler, u=st.lists(st.floats(0, LAST, width=32), min_size=2, max_size=20))
    def test_draws_lie_inside_and_rise_with_u(self, sampler, u):
        t = sampler.icdf(torch.tensor(sorted(u), dtype=torch.float32))
        assert t.dtype == torch.float32
        assert ((t >= 0) & (t <= LAST)).all()
        assert (t.diff() >= 0).all()

    @given(sampler=any_sampler, u=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=10))
    def test_quantiles_distribution_and_density_agree(self, sampler, u):
        """The slope of the quantiles times the density is 1, so that the density's integral is 1."""
        u, h = wide(u), 1e-5
        t = sampler.icdf(u)
        torch.testing.assert_close(sampler.cdf(t), u, rtol=0, atol=1e-9)
        slope = (sampler.icdf(u + h) - sampler.icdf(u - h)) / (2 * h)
        torch.testing.assert_close(slope * sampler.log_prob(t).exp(), torch.ones_like(u), rtol=0, atol=2e-3)

    @settings(max_examples=25)
    @given(sampler=any_sampler)
    def test_draws_are_distributed_so(self, sampler):
        """The uniform numbers behind them are the same ones each time: it cannot fail by chance."""
        draws = sampler.sample(4000, torch.Generator().manual_seed(0)).double()
        statistic = scipy.stats.kstest(draws.numpy(), lambda t: sampler.cdf(wide(t)).numpy()).statistic
        assert statistic * math.sqrt(4000) < 1.95  # one draw in a thousand is further off, and this one is not

    @given(sampler=plain_samplers, shift=st.floats(0.1, 10), u=st.floats(0, 0.99))
    def test_shifting_back_undoes_a_shift(self, sampler, shift, u):
        there_and_back = ShiftedTimesteps(1 / shift, ShiftedTimesteps(shift, sampler))
        torch.testing.assert_close(there_and_back.icdf(wide([u])), sampler.icdf(wide([u])), rtol=1e-10, atol=1e-12)
        t = sampler.icdf(wide([max(u, 0.01)]))
        torch.testing.assert_close(there_and_back.log_prob(t), sampler.log_prob(t), rtol=1e-8, atol=1e-8)
