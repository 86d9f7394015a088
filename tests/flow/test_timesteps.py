"""Timestep samplers against scipy's distributions, and the shift against diffusers."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_stages.flow import (
    LogitNormalTimesteps,
    ShiftedTimesteps,
    UniformTimesteps,
    keyed_generator,
    shift_for_share,
    shift_time,
    time_grid,
)

LAST = 1 - 2**-24  # the float32 below 1


def logit_normal_cdf(t, mean: float, std: float):
    return scipy.stats.norm.cdf((np.log(t) - np.log1p(-t)) / std, loc=mean / std)


def unshift(t, s: float):
    """From t' = t / (t + s (1 - t)), solved for t."""
    return s * t / (1 + (s - 1) * t)


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

    @pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
    def test_a_shift_that_is_not_positive_raises(self, shift):
        with pytest.raises(ValueError, match="shift must be positive"):
            ShiftedTimesteps(shift)
        with pytest.raises(ValueError, match="shift must be positive"):
            shift_time(torch.tensor([0.5]), shift)

    @pytest.mark.parametrize("std", [0.0, -1.0, math.nan])
    def test_a_spread_that_is_not_positive_raises(self, std):
        with pytest.raises(ValueError, match="standard deviation"):
            LogitNormalTimesteps(0.0, std)


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
