"""Loss weightings."""

import torch

from fm_stages.flow import UniformWeighting


def test_uniform_counts_every_time_alike():
    weights = UniformWeighting()(torch.tensor([0.0, 0.3, 1.0]))
    assert weights.tolist() == [1, 1, 1]
