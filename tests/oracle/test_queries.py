"""What an oracle refuses to be asked, and settings of torch that must not change its answers."""

import pytest
import torch

from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, GaussianMixtureBank, MixtureOracle, Oracle, measure_nearest

ROWS = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
X, T = ROWS[:3] / 2, torch.full((3,), 0.5)


@pytest.fixture(params=["points", "mixture"])
def oracle(request) -> Oracle:
    if request.param == "points":
        return Oracle(DataBank(ROWS), LinearPath())
    return MixtureOracle(GaussianMixtureBank(ROWS, ROWS.abs()), LinearPath())


@pytest.mark.parametrize("path", [None, LinearPath, "LinearPath"], ids=repr)
def test_what_is_no_path(path):
    with pytest.raises(TypeError, match=r"^Oracle needs the path of x_t, as LinearPath\(\), got "):
        Oracle(DataBank(ROWS), path)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_not_finite(oracle, wrong):
    x = X.clone()
    x[1, 0, 1] = wrong
    for call in (oracle.posterior, oracle.velocity):
        with pytest.raises(ValueError, match="row 1 of the queries holds NaN or infinity"):
            call(x, T)
    with pytest.raises(ValueError, match="row 1 of the queries"):
        oracle.target(x, X, T)
    with pytest.raises(ValueError, match="row 1 of the data"):
        oracle.target(X, x, T)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
def test_values_that_are_not_floating_point(oracle, dtype):
    for call in (oracle.posterior, oracle.velocity):
        with pytest.raises(ValueError, match=f"queries are floating point.*{dtype}"):
            call(X.to(dtype), T)
    with pytest.raises(ValueError, match=f"data are floating point.*{dtype}"):
        oracle.target(X, X.to(dtype), T)


def test_what_is_no_tensor(oracle):
    for call in (oracle.posterior, oracle.velocity):
        with pytest.raises(TypeError, match="queries must be given as a tensor.*ndarray"):
            call(X.numpy(), T)
        with pytest.raises(TypeError, match="times must be given as a tensor.*float"):
            call(X, 0.5)
        with pytest.raises(TypeError, match="labels must be given as a tensor.*list"):
            call(X, T, [-1, -1, -1])
    with pytest.raises(TypeError, match="times must be given as a tensor.*float"):
        oracle.target(X, X, 0.5)
    with pytest.raises(TypeError, match="data must be given as a tensor.*NoneType"):
        oracle.target(X, None, T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_plays_no_part(dtype):
    index = torch.arange(3)

    def answer() -> torch.Tensor:
        bank = DataBank(ROWS)
        measure_nearest(bank)
        return Oracle(bank, LinearPath()).target(X, ROWS[:3], T, None, index)

    expected = answer()
    torch.set_default_dtype(dtype)
    try:
        found = answer()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
