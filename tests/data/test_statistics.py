"""Statistics of channels against sums over everything in float64, in any blocks and on any number of threads."""

import hashlib

import numpy as np
import pytest
import torch

from fm_stages.data import channel_statistics, write_statistics
from fm_stages.data.statistics import channel_sums, combine_sums, statistics_of

SHAPE = (700, 3, 4, 5)  # more rows than are summed at once


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    scales, shifts = torch.tensor([1.0, 5.0, 0.1]), torch.tensor([0.0, -3.0, 5.0])
    return torch.randn(SHAPE, generator=generator) * scales.view(3, 1, 1) + shifts.view(3, 1, 1)


def plainly(rows):
    """Mean and std over all of it, (1, C, 1, 1)."""
    values = rows.double().numpy().transpose(1, 0, 2, 3).reshape(rows.shape[1], -1)
    return {"mean": values.mean(1), "std": values.std(1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_over_blocks_of_any_size(rows, dtype):
    rows = (rows[:, :2].abs() * 20).to(dtype) if dtype == torch.uint8 else rows.to(dtype)
    found = channel_statistics(rows.split([1, 300, 399]))
    for name, value in plainly(rows).items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == (1, rows.shape[1], 1, 1)
        np.testing.assert_allclose(found[name].flatten().numpy(), value, rtol=1e-7)


def test_a_large_mean_costs_no_digits():
    rows = torch.randn(600, 1, 8, 8, dtype=torch.float64) * 1e-3 + 1e6
    found = channel_statistics(rows.split(100))["std"].item()
    assert found == pytest.approx(rows.numpy().std(), rel=1e-6)


def test_moments_are_those_of_all_draws(rows):
    stds = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) + 0.5
    found = channel_statistics(zip(rows.split(256), stds.split(256), strict=True))
    mean, means = plainly(rows), found["mean"].flatten().numpy()
    np.testing.assert_allclose(means, mean["mean"], rtol=1e-7)
    variance = mean["std"] ** 2 + stds.double().square().mean((0, 2, 3)).numpy()
    np.testing.assert_allclose(found["std"].flatten().numpy() ** 2, variance, rtol=1e-6)
    draws = [rows + stds * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(2, 30)]
    drawn = channel_statistics(draws)["std"]
    assert (drawn / found["std"] - 1).abs().max() < 0.01


def test_threads_and_ranks_change_no_bit(rows):
    parts = [channel_sums(block) for block in rows.split(100)]
    expected = statistics_of(combine_sums(parts))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        found = channel_statistics(iter(rows.split(100)))
    finally:
        torch.set_num_threads(threads)
    assert all(found[name].equal(expected[name]) for name in expected)


def test_bad_values_and_the_callers_own(rows):
    before = rows.double()
    channel_statistics([before])
    assert before.equal(rows.double())  # which is summed in a copy
    rows[5, 1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        channel_statistics([rows])
    rows[:, 1] = 2.0
    with pytest.raises(ValueError, match="channel 1 .* same value everywhere"):
        channel_statistics([rows])


def test_the_file_is_the_peers_and_always_the_same(rows, tmp_path):
    files = [tmp_path / "latents_stats.pt", tmp_path / "b/latents_stats.pt"]
    for file in files:
        write_statistics(file, channel_statistics([rows]))
    loaded = torch.load(files[0], weights_only=True)
    assert loaded.keys() == {"mean", "std"}
    assert len({hashlib.sha256(file.read_bytes()).digest() for file in files}) == 1
    assert not list(tmp_path.rglob("*.part"))
