"""The pixel MMD against its definition, written as loops."""

import numpy as np
import pytest
import torch

from fm_stages.studies.compare.measure import NUM_SUBSETS, ProbeSettings, pixel_mmd


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) over different rows."""
    n, d = x.shape

    def kernel(a, b):
        return (a @ b / d + 1) ** 3

    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j)
    across = sum(kernel(x[i], y[j]) for i in range(n) for j in range(n))
    return within / (n * (n - 1)) - 2 * across / n**2


def images(num: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 1, 2, 3, generator=torch.Generator().manual_seed(seed)) + shift


def test_is_the_mean_of_the_definition_over_disjoint_parts():
    real, drawn = images(60), images(60, 0.5, seed=1)
    parts = [
        by_definition(x.flatten(1).double().numpy(), y.flatten(1).double().numpy())
        for x, y in zip(real.split(6), drawn.split(6), strict=True)
    ]
    assert len(parts) == NUM_SUBSETS
    value, error = pixel_mmd(real, drawn)
    assert value == pytest.approx(np.mean(parts))
    assert error == pytest.approx(np.std(parts, ddof=1) / np.sqrt(len(parts)))


def test_is_unbiased_and_grows_with_the_distance():
    value, error = pixel_mmd(images(4000), images(4000, seed=1))
    assert abs(value) < 4 * error
    values = [pixel_mmd(images(400), images(400, shift, seed=1))[0] for shift in (0.2, 0.5, 1.0)]
    assert values == sorted(values)
    assert values[0] > 0


@pytest.mark.parametrize("setting", [{"num_probe": 1}, {"num_samples": 19}, {"solver_steps": 0}])
def test_too_little_is_refused(setting):
    (name, value), = setting.items()  # fmt: skip
    with pytest.raises(ValueError, match=f"--{name} {value} must be"):
        ProbeSettings(**setting)
