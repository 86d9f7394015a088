"""The paths against their formulas, written again in float64, and against autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from fm_stages.flow import CosinePath, LinearPath, Path, VPPath, check_time, expand_time

PATHS = [LinearPath(), CosinePath(), VPPath()]
WITHOUT_NOISE_AT_ONE = [LinearPath(), CosinePath()]  # their velocity stays finite at t = 1

every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
finite_at_one = pytest.mark.parametrize("path", WITHOUT_NOISE_AT_ONE, ids=lambda path: type(path).__name__)

# float32 numbers, so that both precisions speak of the same time; 1 - t is exact from t = 0.5 on
TIMES = torch.tensor([1e-7, 1e-5, 1e-3, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-5, 1 - 2**-24])


def vp_log_alpha(t: float, low: float = 0.1, high: float = 20.0) -> float:
    return -((1 - t) ** 2) * (high - low) / 4 - (1 - t) * low / 2


def formula(path: Path, t: float) -> tuple[float, float, float]:
    """alpha, sigma and A = alpha' - alpha sigma' / sigma, which simplifies to a closed form on each path."""
    if isinstance(path, LinearPath):
        return t, 1 - t, 1 / (1 - t)
    if isinstance(path, CosinePath):
        sigma = math.sin(math.pi / 2 * (1 - t))  # near t = 1 cos(pi t / 2) would lose its digits
        return math.sin(math.pi / 2 * t), sigma, math.pi / 2 / sigma
    log_alpha = vp_log_alpha(t)
    slope = (1 - t) * (20 - 0.1) / 2 + 0.1 / 2
    variance = -math.expm1(2 * log_alpha)
    return math.exp(log_alpha), math.sqrt(variance), math.exp(log_alpha) * slope / variance


def column(path: Path, which: int) -> Tensor:
    return torch.tensor([formula(path, t)[which] for t in TIMES.tolist()], dtype=torch.float64)


def derivative(function, t: Tensor) -> Tensor:
    t = t.clone().requires_grad_()
    return torch.autograd.grad(function(t).sum(), t)[0]


class TestCoefficients:
    @every_path
    def test_values_keep_their_digits_up_to_both_ends(self, path):
        for dtype, rtol in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            t = TIMES.to(dtype)
            torch.testing.assert_close(path.alpha(t).double(), column(path, 0), rtol=rtol, atol=0)
            torch.testing.assert_close(path.sigma(t).double(), column(path, 1), rtol=rtol, atol=0)
            torch.testing.assert_close(path.mean_coefficient(t).double(), column(path, 2), rtol=rtol, atol=0)

    @every_path
    def test_derivatives_are_those_of_autograd(self, path):
        t = torch.cat([TIMES.double(), torch.linspace(1e-9, 1 - 1e-9, 1001, dtype=torch.float64)])
        torch.testing.assert_close(path.d_alpha(t), derivative(path.alpha, t), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(path.d_sigma(t), derivative(path.sigma, t), rtol=1e-9, atol=1e-12)

    def test_derivatives_of_other_noise_rates(self):
        t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
        for path in (VPPath(0.5, 0.5), VPPath(1e-3, 40.0)):
            torch.testing.assert_close(path.d_alpha(t), derivative(path.alpha, t), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(path.d_sigma(t), derivative(path.sigma, t), rtol=1e-9, atol=1e-12)

    @every_path
    def test_float32_ends(self, path):
        noise, data = torch.tensor([0.0]), torch.tensor([1.0])
        assert path.sigma(data).item() == 0.0
        assert math.copysign(1, path.sigma(data).item()) == 1  # 1 / -0.0 would turn an infinity round
        assert path.alpha(data).item() == 1.0
        assert path.mean_coefficient(data).item() == math.inf
        if isinstance(path, VPPath):
            assert path.alpha(noise).item() == pytest.approx(math.exp(-(19.9 / 4 + 0.05)), rel=1e-6)
            assert path.sigma(noise).item() == pytest.approx(1, abs=3e-5)
        else:
            assert path.alpha(noise).item() == 0.0
            assert path.sigma(noise).item() == 1.0

    @every_path
    def test_sigma_falls_to_zero_and_never_below(self, path):
        t = 1 - torch.arange(2000).flip(0) * 2.0**-24
        sigma = path.sigma(t)
        assert sigma.min() == sigma[-1] == 0
        assert (sigma.diff() < 0).all()

    def test_vp_is_capped_where_its_derivative_is_still_finite(self):
        path = VPPath()
        t = torch.tensor([path.max_time])
        assert t.item() < 1
        log_alpha = vp_log_alpha(t.item())
        slope = (1 - t.item()) * 19.9 / 2 + 0.05
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        assert path.sigma(t).item() == pytest.approx(sigma, rel=1e-6)
        assert path.d_sigma(t).item() == pytest.approx(-math.exp(2 * log_alpha) * slope / sigma, rel=1e-5)
        assert path.d_sigma(torch.tensor([1.0])).item() == -math.inf
        assert all(other.max_time == 1 for other in WITHOUT_NOISE_AT_ONE)

    @pytest.mark.parametrize("betas", [(0.0, 20.0), (-0.1, 20.0), (3.0, 2.0), (math.nan, 1.0)])
    def test_noise_rates_that_make_no_path_raise(self, betas):
        with pytest.raises(ValueError, match="beta_min"):
            VPPath(*betas)


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


class TestInterpolate:
    @every_path
    @pytest.mark.parametrize("shape", [(3, 2, 5, 4), (4, 4, 4, 4), (4, 1, 4, 4), (4, 4), (3,)], ids=str)
    def test_each_sample_has_its_own_time(self, path, shape):
        """Also where the batch is as large as an image side, so that a wrong broadcast would not raise."""
        x0, x1 = batch(*shape)
        t = torch.linspace(0.1, 0.9, shape[0], dtype=torch.float64)
        x_t, velocity = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
        assert x_t.shape == velocity.shape == shape
        d_alpha, d_sigma = derivative(path.alpha, t), derivative(path.sigma, t)
        for i in range(shape[0]):
            alpha, sigma, _ = formula(path, t[i].item())
            torch.testing.assert_close(x_t[i], alpha * x1[i] + sigma * x0[i], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(velocity[i], d_alpha[i] * x1[i] + d_sigma[i] * x0[i], rtol=1e-9, atol=1e-9)

    @every_path
    def test_noise_at_zero_and_data_at_one(self, path):
        x0, x1 = batch(2, 1, 3, 3, dtype=torch.float32)
        assert torch.equal(path.interpolate(x0, x1, torch.ones(2)), x1)
        atol = 0.03 if isinstance(path, VPPath) else 0
        torch.testing.assert_close(path.interpolate(x0, x1, torch.zeros(2)), x0, rtol=0, atol=atol)

    @every_path
    def test_velocity_is_the_motion_of_x_t(self, path):
        x0, x1 = batch(3, 2)
        t, h = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), 1e-6
        moved = (path.interpolate(x0, x1, t + h) - path.interpolate(x0, x1, t - h)) / (2 * h)
        torch.testing.assert_close(path.velocity(x0, x1, t), moved, rtol=1e-7, atol=1e-7)


class TestConversions:
    @every_path
    @pytest.mark.parametrize("shape", [(14, 2, 5, 3), (14, 1, 14, 14)], ids=str)
    def test_predict_data_undoes_the_conditional_velocity(self, path, shape):
        x0, x1 = batch(*shape)
        t = TIMES.double()
        x_t, velocity = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
        # near t = 0 alpha' sigma - alpha sigma' is small on VPPath: x1 is 1 part in 150 of x_t
        torch.testing.assert_close(path.predict_data(velocity, x_t, t), x1, rtol=0, atol=1e-11)
        near_data = t > 0.5  # velocity_from_mean subtracts what grows like 1 / sigma
        loss_of_digits = 1e-14 / path.sigma(t).min().item() ** 2
        torch.testing.assert_close(
            path.velocity_from_mean(x1, x_t, t)[~near_data], velocity[~near_data], rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(path.velocity_from_mean(x1, x_t, t), velocity, rtol=0, atol=loss_of_digits)

    @finite_at_one
    def test_predict_data_in_float32_up_to_one(self, path):
        x0, x1 = batch(15, 1, 4, 4, dtype=torch.float32)
        t = torch.cat([TIMES, torch.ones(1)])
        predicted = path.predict_data(path.velocity(x0, x1, t), path.interpolate(x0, x1, t), t)
        torch.testing.assert_close(predicted, x1, rtol=0, atol=2e-6)

    def test_predict_data_in_float32_up_to_the_cap_of_vp(self):
        path = VPPath()
        x0, x1 = batch(3, 1, 4, 4, dtype=torch.float32)
        t = torch.tensor([0.9, 0.999, path.max_time])
        predicted = path.predict_data(path.velocity(x0, x1, t), path.interpolate(x0, x1, t), t)
        torch.testing.assert_close(predicted, x1, rtol=0, atol=1e-5)

    def test_predict_data_on_the_linear_path(self):
        velocity, x_t = batch(4, 4, 4, 4)
        t = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
        expected = torch.stack([x_t[i] + (1 - t[i]) * velocity[i] for i in range(4)])
        torch.testing.assert_close(LinearPath().predict_data(velocity, x_t, t), expected, rtol=0, atol=1e-14)

    @every_path
    @settings(deadline=None, max_examples=50)
    @given(t=st.floats(1e-3, 1 - 1e-3), v=st.floats(-10, 10), x=st.floats(-10, 10))
    def test_the_two_conversions_are_inverse(self, path, t, v, x):
        velocity, x_t, t = (torch.tensor([value], dtype=torch.float64) for value in (v, x, t))
        mean = path.predict_data(velocity, x_t, t)
        torch.testing.assert_close(path.velocity_from_mean(mean, x_t, t), velocity, rtol=1e-9, atol=1e-9)
        alpha, sigma, scale = (torch.tensor([c], dtype=torch.float64) for c in formula(path, t.item()))
        noise = (x_t - alpha * mean) / sigma  # the noise that leads from the predicted data to x_t
        torch.testing.assert_close(path.velocity(noise, mean, t), velocity, rtol=1e-9, atol=1e-9)
        further = path.velocity_from_mean(mean + 1, x_t, t) - velocity
        torch.testing.assert_close(further, scale, rtol=1e-7, atol=1e-7)


@every_path
@pytest.mark.parametrize("t_shape", [(), (1,), (3,), (4, 1), (1, 4), (4, 1, 1, 1), (4, 4, 4, 4)], ids=str)
def test_times_that_are_not_one_per_sample_raise(path, t_shape):
    x0, x1 = batch(4, 4, 4, 4)
    t = torch.full(t_shape, 0.5, dtype=torch.float64)
    for function in (path.interpolate, path.velocity, path.velocity_from_mean, path.predict_data):
        with pytest.raises(ValueError, match="one time per sample"):
            function(x0, x1, t)


def test_expand_time():
    x = torch.zeros(3, 5, 3, 3)
    assert expand_time(torch.arange(3.0), x).shape == (3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(5,\).*\(3, 5, 3, 3\)"):
        expand_time(torch.zeros(5), x)


@pytest.mark.parametrize("wrong", [-1e-7, 1 + 2**-23, math.nan, math.inf, -math.inf])
def test_times_outside_raise_and_are_named(wrong):
    with pytest.raises(ValueError, match=str(torch.tensor(wrong).item()).replace("+", r"\+")):
        check_time(torch.tensor([0.5, wrong, 0.7]))


def test_both_ends_are_times():
    check_time(torch.tensor([0.0, -0.0, 0.5, 1.0]))


any_path = st.one_of(
    st.sampled_from(PATHS),
    st.tuples(st.floats(1e-3, 5), st.floats(0, 40)).map(lambda b: VPPath(b[0], b[0] + b[1])),
)
inside = st.floats(1e-4, 1 - 1e-4)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


class TestAnyPath:
    """Whatever its noise rates, for any times and shapes of a sample."""

    @given(path=any_path, times=st.lists(inside, min_size=1, max_size=6), shape=shapes)
    def test_velocity_is_the_derivative_of_the_path(self, path, times, shape):
        x0, x1 = batch(len(times), *shape)
        t = torch.tensor(times, dtype=torch.float64)
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(
                path.interpolate(x0, x1, forward_ad.make_dual(t, torch.ones_like(t)))
            ).tangent
        torch.testing.assert_close(path.velocity(x0, x1, t), moved, rtol=1e-9, atol=1e-9)

    @given(path=any_path, times=st.lists(inside, min_size=1, max_size=6), shape=shapes)
    def test_velocity_data_noise_and_score_are_one_another(self, path, times, shape):
        x0, x1 = batch(len(times), *shape)
        t = torch.tensor(times, dtype=torch.float64)
        x_t, velocity = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
        alpha, sigma, d_alpha, d_sigma = (
            expand_time(c(t), x1) for c in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
        )
        wronskian = d_alpha * sigma - alpha * d_sigma
        # rounding of the terms that are subtracted
        of_data = 1e-14 * ((sigma * velocity).abs() + (d_sigma * x_t).abs()) / wronskian
        of_noise = 1e-14 * ((alpha * velocity).abs() + (d_alpha * x_t).abs()) / wronskian
        assert ((path.predict_data(velocity, x_t, t) - x1).abs() <= of_data + 1e-14).all()
        assert ((path.score(velocity, x_t, t) * sigma + x0).abs() <= of_noise + 1e-14).all()
        back = path.velocity_from_mean(path.predict_data(velocity, x_t, t), x_t, t)
        assert (
            (back - velocity).abs() <= 4 * (of_data * wronskian + 1e-14 * (d_sigma * x_t).abs()) / sigma + 1e-13
        ).all()

    @given(path=any_path, times=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), shape=shapes)
    def test_float32_is_finite_up_to_the_last_draw_and_near_float64(self, path, times, shape):
        x0, x1 = batch(len(times), *shape, dtype=torch.float32)
        t = torch.tensor(times, dtype=torch.float32).clamp(max=min(path.max_time, 1 - 2**-24))
        wide = path.interpolate(x0.double(), x1.double(), t.double())
        for found in (path.interpolate(x0, x1, t), path.velocity(x0, x1, t), path.mean_coefficient(t)):
            assert found.dtype == torch.float32
            assert found.isfinite().all()
        torch.testing.assert_close(path.interpolate(x0, x1, t).double(), wide, rtol=1e-5, atol=1e-5)

    @given(path=any_path, low=st.floats(0, 1), high=st.floats(0, 1))
    def test_data_comes_and_noise_goes(self, path, low, high):
        t = torch.tensor(sorted((low, high)), dtype=torch.float64)
        (before, after), (noise_before, noise_after) = path.alpha(t).tolist(), path.sigma(t).tolist()
        assert 0 <= before <= after <= 1
        assert 1 >= noise_before >= noise_after >= 0
