"""Loss weightings."""

import math

import pytest
import scipy.integrate
import torch

from fm_stages.flow import LogitNormalTimesteps, ShiftedTimesteps, StageWeighting, UniformWeighting


def test_uniform_counts_every_time_alike():
    weights = UniformWeighting()(torch.tensor([0.0, 0.3, 1.0]))
    assert weights.tolist() == [1, 1, 1]


class TestStageWeighting:
    @pytest.mark.parametrize(
        "density",
        [None, ShiftedTimesteps(3.0), LogitNormalTimesteps(-1.0, 0.7), ShiftedTimesteps(2.0, LogitNormalTimesteps())],
        ids=["uniform", "shifted", "logit-normal", "shifted logit-normal"],
    )
    @pytest.mark.parametrize(("boundary", "early", "late", "width"), [(0.3, 2.0, 0.5, 0.25), (0.05, 0.0, 1.0, 0.1)])
    def test_has_mean_one_under_the_density(self, boundary, early, late, width, density):
        weighting = StageWeighting(boundary, early, late, width, density)

        def weighted(t: float) -> float:
            at = torch.tensor([t], dtype=torch.float64)
            probability = 1.0 if density is None else density.log_prob(at).exp().item()
            return weighting(at).item() * probability

        mean = scipy.integrate.quad(weighted, 0, 1, points=[boundary], limit=500)[0]
        assert mean == pytest.approx(1, abs=1e-3)

    def test_hands_over_at_the_boundary(self):
        weights = StageWeighting(0.3, 3.0, 1.0, width=0.1)(
            torch.tensor([1e-6, 0.3, 0.9, 0.0, 1.0], dtype=torch.float64)
        )
        early, middle, late, at_noise, at_data = weights.tolist()
        assert early / late == pytest.approx(3, rel=1e-6)
        assert middle / late == pytest.approx(2, rel=1e-6)
        assert (at_noise, at_data) == pytest.approx((early, late), rel=1e-6)

    def test_keeps_the_dtype_of_t(self):
        assert StageWeighting(0.3, 2, 1)(torch.rand(5)).dtype == torch.float32

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
    def test_refuses(self, given, said):
        with pytest.raises(ValueError, match=said):
            StageWeighting(**{"boundary": 0.3, "navigation": 2.0, "refinement": 1.0, **given})
