"""What more training would bring: the law that made the points comes back, and intervals hold what they promise."""

import math

import numpy as np
import pytest

from fm_stages.training.steering.forecast import Forecast, forecast_power_law, in_words

LAST = 1000


def curve(steps, exponent, offset=0.0):
    """1 at the last step."""
    return offset + (1 - offset) * (np.asarray(steps) / LAST) ** -exponent


def history(rng, exponent, offset=0.0, num=20, noise=0.03, stated=None):
    """Steps, measured values, and the errors that are stated for them."""
    steps = np.linspace(LAST / num, LAST, num)
    true = curve(steps, exponent, offset)
    values = true * (1 + noise * rng.standard_normal(num))
    return steps.tolist(), values.tolist(), (values * (stated or noise)).tolist()


class TestLaw:
    def test_is_that_of_points_without_noise(self):
        steps = [250, 400, 500, 700, 900, 1000]
        values = [3 * s**-0.5 for s in steps]
        forecast = forecast_power_law(steps, values, [0.1 * v for v in values], ahead=(2, 10))
        assert forecast.exponent == pytest.approx(0.5)
        assert forecast.exponent_sem == pytest.approx(0, abs=1e-9)
        assert list(forecast.at) == [2000, 10_000]
        assert not forecast.flattens
        for step, (value, low, high) in forecast.at.items():
            assert value == pytest.approx(3 * step**-0.5)
            assert low <= value * (1 + 1e-9)
            assert high == pytest.approx(value, rel=0.05)

    def test_an_offset_without_noise_is_found(self):
        steps = np.linspace(250, 1000, 30)
        values = curve(steps, 1.0, 0.5)
        forecast = forecast_power_law(steps, values, 0.01 * values)
        assert forecast.flattens
        assert forecast.at[10_000][0] == pytest.approx(0.55, rel=0.01)

    def test_exponent_and_error_are_those_of_polyfit(self):
        rng = np.random.default_rng(0)
        steps, values, errors = (np.array(x) for x in history(rng, 0.4))
        errors *= rng.uniform(0.5, 2, len(errors))
        late = steps >= LAST / 4
        weight = (values / errors)[late]
        (slope, _), covariance = np.polyfit(np.log(steps[late]), np.log(values[late]), 1, w=weight, cov=True)
        forecast = forecast_power_law(steps, values, errors)
        assert forecast.num_points == late.sum()
        assert forecast.exponent == pytest.approx(-slope)
        assert forecast.exponent_sem == pytest.approx(math.sqrt(covariance[0, 0]))

    def test_the_start_does_not_count(self):
        steps, values, errors = history(np.random.default_rng(0), 0.4)
        early = [s < LAST / 4 for s in steps]
        other = [100.0 if e else v for e, v in zip(early, values, strict=True)]
        assert forecast_power_law(steps, other, errors) == forecast_power_law(steps, values, errors)

    def test_a_common_factor_of_the_errors_does_not_count(self):
        steps, values, errors = history(np.random.default_rng(0), 0.4)
        one = forecast_power_law(steps, values, errors)
        ten = forecast_power_law(steps, values, [10 * e for e in errors])
        assert ten.exponent_sem == pytest.approx(one.exponent_sem)
        assert ten.at[2000] == pytest.approx(one.at[2000], rel=1e-6)


class TestRefusals:
    def test_too_few_points(self):
        steps, values, errors = [100, 900, 950, 980, 1000], [1.0] * 5, [0.1] * 5
        assert forecast_power_law(steps, values, errors) is None
        assert forecast_power_law([], [], []) is None
        assert forecast_power_law([1000] * 9, [1.0] * 9, [0.1] * 9) is None

    @pytest.mark.parametrize("bad", [0.0, -0.1, math.nan, math.inf])
    def test_values_without_a_logarithm_are_left_out(self, bad):
        steps, values, errors = history(np.random.default_rng(0), 0.4)
        assert forecast_power_law([*steps, 1001], [*values, bad], [*errors, 0.1]) == forecast_power_law(
            steps, values, errors
        )
        assert forecast_power_law(steps, [bad] * len(steps), errors) is None
        assert forecast_power_law(steps, values, [bad if bad <= 0 else math.nan] * len(steps)) is None

    def test_a_curve_that_falls_ever_faster(self):
        steps = np.linspace(250, 1000, 30)
        values = 1.2 - steps / LAST
        assert forecast_power_law(steps, values, 0.01 * values) is None


class TestCoverage:
    @pytest.mark.parametrize(
        ("exponent", "offset", "num", "stated"),
        [(0.3, 0, 20, None), (1.0, 0, 8, 0.01), (0.5, 0.5, 20, None), (1.0, 0.5, 20, 0.1), (1.0, 0.2, 50, None)],
    )
    def test_intervals_hold_95_percent_of_curves_with_and_without_an_offset(self, exponent, offset, num, stated):
        rng = np.random.default_rng(0)
        inside = {2000: [], 10_000: []}
        for _ in range(300):
            forecast = forecast_power_law(*history(rng, exponent, offset, num, stated=stated))
            for step, found in inside.items():
                if forecast is not None:
                    value, low, high = forecast.at[step]
                    assert low <= value <= high
                    found.append(low <= curve(step, exponent, offset) <= high)
        for found in inside.values():
            assert len(found) > 290  # almost never refused
            assert 0.92 < np.mean(found) < 0.99  # the standard error of this mean is 0.013

    def test_the_exponent_is_told_with_its_error(self):
        rng = np.random.default_rng(0)
        forecasts = [forecast_power_law(*history(rng, 0.4)) for _ in range(300)]
        z = [(f.exponent - 0.4) / f.exponent_sem for f in forecasts if f]
        assert np.mean(z) == pytest.approx(0, abs=0.2)
        assert np.std(z) == pytest.approx(1.07, abs=0.12)  # Student's t with 14 degrees of freedom


class TestWords:
    def test_progress(self):
        forecast = Forecast(0.42, 0.05, {2000: (0.04, 0.035, 0.05), 10_000: (0.02, 0.015, 0.048)}, False, 15)
        text = in_words(forecast, "navigation", 1000)
        assert text.startswith("navigation: over the last 15 points the gap goes as step^-0.42 (± 0.05). ")
        assert "Extrapolated, if the curve keeps to that law: 0.04" in text
        assert "0.04 (0.035 to 0.05) with 2 times the steps (2000)" in text
        assert "0.02 (0.015 to 0.048) with 10 times the steps (10000)" in text
        forecast.flattens = True
        assert "if the curve keeps to that law and levels off, as it has begun to: 0.04" in in_words(
            forecast, "navigation", 1000
        )

    def test_flat_curves_are_told_so(self):
        rng = np.random.default_rng(0)
        forecasts = [forecast_power_law(*history(rng, 0.0)) for _ in range(200)]
        told = ["no progress can be told from noise" in in_words(f, "navigation", LAST) for f in forecasts if f]
        assert np.mean(told) == pytest.approx(0.95, abs=0.05)

    def test_a_curve_that_grows(self):
        text = in_words(Forecast(-0.2, 0.01, {2000: (1.1, 1.0, 1.2)}, False, 15), "navigation", 1000)
        assert "goes as step^0.20 (± 0.01): it grows" in text
