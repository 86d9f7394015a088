"""Loss weightings, against their formulas written again, and their means by numeric integration."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_stages.flow import (
    BetaTimesteps,
    CosinePath,
    CosMapWeighting,
    InverseErrorWeighting,
    LearnedWeighting,
    LinearPath,
    LogitNormalTimesteps,
    MinSNRWeighting,
    ShiftedTimesteps,
    SigmaSqrtWeighting,
    StageWeighting,
    TabulatedTimesteps,
    TruncatedTimesteps,
    UniformTimesteps,
    UniformWeighting,
    VPPath,
)

MEASURED = [0.1, 0.3, 0.6], [0.5, 0.2, 0.1]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Each weighting with its formula on the linear path, up to a factor
WEIGHTINGS = {
    "uniform": (UniformWeighting, lambda t: 1.0),
    "min-SNR": (MinSNRWeighting, lambda t: min(t**2 / (1 - t) ** 2, 5.0) * (1 - t) ** 2),
    "min-SNR 1": (lambda: MinSNRWeighting(1.0), lambda t: min(t**2, (1 - t) ** 2)),
    "sigma-sqrt": (SigmaSqrtWeighting, lambda t: min((1 - t) ** -2.0, 100.0)),
    "cosmap": (CosMapWeighting, lambda t: 1 / (t**2 + (1 - t) ** 2)),
    "inverse error": (lambda: InverseErrorWeighting(*MEASURED), lambda t: 1 / np.interp(t, *MEASURED)),
    "stages": (
        lambda: StageWeighting(0.3, 3.0, 1.0, 0.1),
        lambda t: 1 + 2 * sigmoid((math.log(0.3 / 0.7) - math.log(t / (1 - t))) / 0.1),
    ),
    "late only": (
        lambda: StageWeighting(0.05, 0.0, 1.0),
        lambda t: 1 - sigmoid((math.log(0.05 / 0.95) - math.log(t / (1 - t))) / 0.25),
    ),
}
every_weighting = pytest.mark.parametrize(("make", "formula"), WEIGHTINGS.values(), ids=WEIGHTINGS.keys())
DENSITIES = {
    "uniform": UniformTimesteps(),
    "shifted": ShiftedTimesteps(3.0),
    "logit-normal": LogitNormalTimesteps(-1.0, 0.7),
    "beta": BetaTimesteps(2.0, 3.0),
}
every_density = pytest.mark.parametrize("density", DENSITIES.values(), ids=DENSITIES.keys())


def at(*t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=torch.float64)


def probability(density, t: float) -> float:
    return density.log_prob(at(t)).exp().item()


def integral(function) -> float:
    return scipy.integrate.quad(function, 0, 1, points=[0.05, 0.1, 0.3, 0.5, 0.6, 0.9], limit=500)[0]


class TestFormulas:
    @every_weighting
    def test_ratios_are_the_formulas(self, make, formula):
        t = np.linspace(0.003, 0.997, 101)
        weights = make()(torch.from_numpy(t)).numpy()
        expected = np.array([formula(x) for x in t])
        np.testing.assert_allclose(weights / weights.max(), expected / expected.max(), rtol=1e-9, atol=1e-12)

    @every_weighting
    @every_density
    def test_mean_is_one_under_the_density(self, make, formula, density):
        weighting = make()
        weighting.prepare(LinearPath(), density)
        assert integral(lambda t: weighting(at(t)).item() * probability(density, t)) == pytest.approx(1, abs=2e-3)

    @every_weighting
    @every_density
    def test_importance_weights_give_the_objective_of_uniform_t(self, make, formula, density):
        """E over the density of w(t) f(t) is the integral of the formula times f, over that of the formula."""
        weighting = make()
        weighting.prepare(LinearPath(), density, importance=True)
        mean = integral(lambda t: weighting(at(t)).item() * probability(density, t) * math.sin(3 * t))
        assert mean == pytest.approx(integral(lambda t: formula(t) * math.sin(3 * t)) / integral(formula), abs=2e-3)

    @pytest.mark.parametrize("make", [UniformWeighting, SigmaSqrtWeighting, LearnedWeighting])
    @pytest.mark.parametrize(
        "density",
        [TruncatedTimesteps(0.2, 0.7), TabulatedTimesteps([0, 0.1, 0.4, 0.5, 0.6, 1], [0, 3, 0, 0, 2, 0])],
        ids=["truncated", "with holes"],
    )
    def test_importance_weights_have_mean_one_where_a_density_is_zero_elsewhere(self, make, density):
        weighting = make()
        weighting.prepare(LinearPath(), density, importance=True)
        t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        mean = torch.trapezoid(density.log_prob(t).exp() * weighting(t), t).item()
        assert mean == pytest.approx(1, abs=2e-3)

    def test_a_draw_that_rounding_moves_to_where_the_density_is_zero_counts_nothing(self):
        density = TruncatedTimesteps(0.7, 0.9)
        weighting = UniformWeighting()
        weighting.prepare(LinearPath(), density, importance=True)
        t = density.icdf(torch.tensor([0.0, 0.5]))
        assert t[0].double() < 0.7
        assert weighting(t).tolist() == pytest.approx([0.0, 1.0])

    @every_weighting
    @pytest.mark.parametrize("path", [LinearPath(), CosinePath(), VPPath()], ids=["linear", "cosine", "VP"])
    def test_weights_are_finite_and_keep_their_dtype(self, make, formula, path):
        weighting = make()
        weighting.prepare(path, UniformTimesteps())
        weights = weighting(torch.tensor([0.0, 1e-6, 0.5, 1 - 2**-24]).clamp(max=path.max_time))
        assert weights.dtype == torch.float32
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()

    @pytest.mark.parametrize("path", [CosinePath(), VPPath()], ids=["cosine", "VP"])
    def test_min_snr_weighs_the_error_of_the_data_prediction(self, path):
        """A velocity that is off by e means data that is off by e / A_t."""
        weighting = MinSNRWeighting(5.0)
        t = at(0.1, 0.4, 0.7, 0.9)
        snr = (path.alpha(t) / path.sigma(t)).square()
        expected = snr.clamp(max=5.0) / path.mean_coefficient(t).square()
        assert weighting.relative(t, path).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


class TestRefusals:
    def test_an_infinite_mean(self):
        with pytest.raises(ValueError, match="mean of SigmaSqrtWeighting is infinite under UniformTimesteps"):
            SigmaSqrtWeighting(math.inf).prepare(LinearPath(), UniformTimesteps())

    def test_it_is_finite_where_few_draws_are_late(self):
        weighting, density = SigmaSqrtWeighting(math.inf), BetaTimesteps(1.0, 4.0)
        weighting.prepare(LinearPath(), density)
        # the integral of (1 - t)^-2 4 (1 - t)^3 is 2
        assert weighting(at(0.5)).item() == pytest.approx(4 / 2, rel=5e-3)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"boundary": 0.0}, "boundary=0.0"),
            ({"boundary": 1.0}, "boundary=1.0"),
            ({"boundary": math.nan}, "boundary=nan"),
            ({"navigation": -1.0}, "navigation=-1.0"),
            ({"navigation": 0.0, "refinement": 0.0}, "not both 0"),
            ({"refinement": math.inf}, "refinement=inf"),
            ({"refinement": math.nan}, "refinement=nan"),
            ({"width": 0.0}, "width=0.0"),
        ],
    )
    def test_stages(self, given, said):
        with pytest.raises(ValueError, match=said):
            StageWeighting(**{"boundary": 0.3, "navigation": 2.0, "refinement": 1.0, **given})

    @pytest.mark.parametrize(
        ("t", "error"),
        [([], []), ([0.1], [1.0, 2.0]), ([0.2, 0.1], [1.0, 1.0]), ([0.1, 0.2], [1.0, 0.0]), ([0.1], [math.nan])],
    )
    def test_inverse_error(self, t, error):
        with pytest.raises(ValueError, match="error"):
            InverseErrorWeighting(t, error)

    @pytest.mark.parametrize(
        "make", [lambda: MinSNRWeighting(0), lambda: MinSNRWeighting(math.nan), lambda: SigmaSqrtWeighting(1)]
    )
    def test_numbers(self, make):
        with pytest.raises(ValueError, match="must be"):
            make()


class TestLearned:
    def test_begins_uniform(self):
        assert LearnedWeighting()(torch.rand(5)).tolist() == [1] * 5

    @every_density
    def test_learns_the_inverse_of_the_error_and_keeps_its_mean(self, density):
        torch.manual_seed(0)
        weighting = LearnedWeighting()
        weighting.prepare(LinearPath(), density)
        optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=1000)
        error = lambda t: 0.05 + (1 - t) ** 2  # noqa: E731
        for _ in range(1000):
            t = density.icdf(torch.rand(512))
            optimizer.zero_grad()
            weighting.own_loss(t, error(t) * torch.rand(512) * 2).backward()
            optimizer.step()
            decay.step()
        t = density.icdf(torch.linspace(0.1, 0.9, 9))
        product = weighting(t) * error(t)  # constant where the weight is the inverse
        assert (product / product.mean()).tolist() == pytest.approx([1.0] * 9, abs=0.15)
        assert weighting(density.icdf((torch.arange(4096) + 0.5) / 4096)).mean().item() == pytest.approx(1, abs=0.01)

    def test_weights_carry_no_gradient(self):
        weighting = LearnedWeighting()
        assert not weighting(torch.rand(3)).requires_grad
        error = torch.ones(3, requires_grad=True)
        assert torch.autograd.grad(weighting.own_loss(torch.rand(3), error), error, allow_unused=True) == (None,)


errors = st.lists(
    st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 10)), min_size=1, max_size=5, unique_by=lambda p: p[0]
)
any_weighting = st.one_of(
    st.just(UniformWeighting()),
    st.builds(MinSNRWeighting, st.floats(0.1, 100)),
    st.builds(SigmaSqrtWeighting, st.floats(1.5, 1000)),
    st.just(CosMapWeighting()),
    errors.map(lambda points: InverseErrorWeighting(*map(list, zip(*sorted(points), strict=True)))),
    st.builds(StageWeighting, st.floats(0.02, 0.95), st.floats(0, 10), st.floats(0.1, 10), st.floats(0.02, 1)),
)
any_density = st.one_of(
    st.just(UniformTimesteps()),
    st.builds(ShiftedTimesteps, st.floats(0.2, 5)),
    st.builds(LogitNormalTimesteps, st.floats(-1.5, 1.5), st.floats(0.3, 2)),
    st.builds(BetaTimesteps, st.floats(0.7, 3), st.floats(0.7, 3)),
    st.builds(TruncatedTimesteps, st.floats(0, 0.4), st.floats(0.6, 1)),
)
any_path = st.sampled_from([LinearPath(), CosinePath(), VPPath()])


class TestAnyWeighting:
    """Whatever its numbers, the density and the path."""

    @settings(max_examples=60)
    @given(weighting=any_weighting, density=any_density, path=any_path)
    def test_mean_is_one_and_every_draw_has_a_finite_weight(self, weighting, density, path):
        weighting.prepare(path, density)
        generator = np.random.default_rng(0)
        u = torch.from_numpy((np.arange(20_000) + generator.random(20_000)) / 20_000)  # one in each stratum
        weights = weighting(density.icdf(u).clamp(max=path.max_time))
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert weights.mean().item() == pytest.approx(1, rel=0.01)

    @given(
        weighting=any_weighting,
        density=any_density,
        path=any_path,
        u=st.lists(st.sampled_from([0.0, 2.0**-149, 2.0**-24, 1 - 2**-23, 1 - 2**-24]), min_size=1),
        importance=st.booleans(),
    )
    @settings(max_examples=60)
    def test_at_the_ends_no_weight_is_nan_or_negative(self, weighting, density, path, u, importance):
        weighting.prepare(path, density, importance)
        t = density.icdf(torch.tensor(u, dtype=torch.float32)).clamp(max=path.max_time)
        weights = weighting(t)
        assert weights.dtype == torch.float32
        assert not weights.isnan().any()
        assert (weights >= 0).all()
