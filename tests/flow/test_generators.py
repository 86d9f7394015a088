"""Keyed draws: the same numbers however the positions are spread over ranks, and the right distribution."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fm_stages.flow import keyed_generator, keyed_normal, keyed_uniform, stratified_uniform

KEY = ("noise", 7, 3)


def draws(name: str, positions: torch.Tensor, key: tuple = KEY) -> torch.Tensor:
    if name == "normal":
        return keyed_normal(key, positions, (2, 3))
    if name == "uniform":
        return keyed_uniform(key, positions)
    return stratified_uniform(key, positions, 150)


every_draw = pytest.mark.parametrize("name", ["normal", "uniform", "stratified"])


class TestPositions:
    @every_draw
    @pytest.mark.parametrize("num_ranks", [2, 3, 5, 150])
    def test_ranks_together_draw_what_one_process_draws(self, name, num_ranks):
        whole = draws(name, torch.arange(150))
        assert whole.shape == ((150, 2, 3) if name == "normal" else (150,))
        assert whole.dtype == torch.float32
        parts = [draws(name, part) for part in torch.arange(150).chunk(num_ranks)]
        assert torch.equal(torch.cat(parts), whole)

    @every_draw
    @settings(max_examples=30)
    @given(data=st.data())
    def test_any_split_over_ranks_and_micro_batches(self, name, data):
        order = torch.tensor(data.draw(st.permutations(range(150))))
        cuts = data.draw(st.lists(st.integers(0, 150), max_size=6).map(sorted))
        parts = order.tensor_split(cuts)
        assert torch.equal(torch.cat([draws(name, part) for part in parts]), draws(name, torch.arange(150))[order])

    @every_draw
    def test_a_rank_without_samples_draws_nothing(self, name):
        none = draws(name, torch.arange(0))
        assert none.shape == ((0, 2, 3) if name == "normal" else (0,))
        assert none.dtype == torch.float32

    @every_draw
    def test_a_draw_knows_its_position_alone(self, name):
        whole = draws(name, torch.arange(150))
        positions = torch.tensor([149, 3, 64, 31, 32, 3, 0])  # out of order, twice the same, both sides of a block
        assert torch.equal(draws(name, positions), whole[positions])

    def test_far_positions(self):
        positions = torch.tensor([10**12, 5, 10**12 + 1])
        assert torch.equal(keyed_uniform(KEY, positions)[1], keyed_uniform(KEY, torch.tensor([5]))[0])
        assert keyed_uniform(KEY, positions).unique().numel() == 3

    @every_draw
    def test_the_global_generator_is_left_alone(self, name):
        state = torch.get_rng_state()
        first = draws(name, torch.arange(4))
        torch.rand(1)
        assert torch.equal(draws(name, torch.arange(4)), first)
        torch.set_rng_state(state)
        draws(name, torch.arange(4))
        assert torch.equal(torch.get_rng_state(), state)


class TestKeys:
    @every_draw
    def test_every_part_of_the_key_counts(self, name):
        keys = [KEY, ("noise", 7, 4), ("noise", 8, 3), ("dropout", 7, 3), ("noise", 73), ("noise", 3, 7), ("noise7", 3)]
        first = [draws(name, torch.arange(8), key).flatten() for key in keys]
        for i in range(len(keys)):
            for j in range(i):
                assert not torch.equal(first[i], first[j]), (keys[i], keys[j])

    def test_parts_do_not_run_together(self):
        keys = [("ab", "c"), ("a", "bc"), ("abc",), ("a", 1, 2), ("a", 12), ("a", "1", 2), ("a1", 2)]
        assert len({keyed_generator(*key).initial_seed() for key in keys}) == len(keys)

    def test_neighbouring_keys_are_unrelated(self):
        noise = torch.stack([keyed_normal(("noise", seed), torch.arange(32), (64,)).flatten() for seed in range(20)])
        correlation = torch.corrcoef(noise.double())
        correlation.fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(noise.shape[1])


class TestDistributions:
    def test_normal(self):
        noise = keyed_normal(KEY, torch.arange(5000), (8,)).double()
        assert scipy.stats.kstest(noise.flatten().numpy(), "norm").statistic * math.sqrt(noise.numel()) < 1.95
        neighbours = (noise[1:] * noise[:-1]).mean()  # across positions, block edges included
        assert abs(neighbours) < 4 / math.sqrt(noise.numel())
        assert noise.flatten(1).unique(dim=0).shape[0] == 5000

    def test_uniform(self):
        u = keyed_uniform(KEY, torch.arange(20_000)).double()
        assert u.min() >= 0
        assert u.max() < 1
        assert scipy.stats.kstest(u.numpy(), "uniform").statistic * math.sqrt(20_000) < 1.95

    @pytest.mark.parametrize("num_strata", [1, 2, 7, 64, 1000])
    def test_every_stratum_is_drawn_once(self, num_strata):
        for step in range(5):
            parts = torch.arange(num_strata).chunk(4)
            u = torch.cat([stratified_uniform(("t", 0, step), part, num_strata) for part in parts])
            assert (u.double() * num_strata).floor().long().sort().values.tolist() == list(range(num_strata))

    @settings(max_examples=40)
    @given(num_strata=st.integers(1, 300), seed=st.integers(0, 2**31), step=st.integers(0, 10**9))
    def test_every_stratum_is_drawn_once_whatever_the_key(self, num_strata, seed, step):
        u = stratified_uniform(("t", seed, step), torch.arange(num_strata), num_strata).double().sort().values
        edges = torch.arange(num_strata + 1, dtype=torch.float64) / num_strata
        assert (u >= edges[:-1] - 2**-24).all()  # rounded to float32
        assert (u <= edges[1:] + 2**-24).all()
        assert u.max() < 1

    def test_one_position_sees_the_whole_interval(self):
        u = torch.stack([stratified_uniform(("t", 0, step), torch.arange(16), 16) for step in range(1500)]).double()
        for position in (0, 9):
            assert scipy.stats.kstest(u[:, position].numpy(), "uniform").statistic * math.sqrt(1500) < 1.95
        stratum, place = (u * 16).floor(), u * 16 % 1
        assert scipy.stats.kstest(place.flatten().numpy(), "uniform").statistic * math.sqrt(place.numel()) < 1.95
        correlation = torch.corrcoef(torch.stack([stratum.flatten(), place.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(u.numel())

    def test_stratified_numbers_never_reach_one(self, monkeypatch):
        monkeypatch.setattr(torch, "rand", lambda num, **_: torch.full((num,), 1 - 2**-53, dtype=torch.float64))
        for num_strata in (1, 3, 1000):
            assert stratified_uniform(KEY, torch.arange(num_strata), num_strata).max().item() == 1 - 2**-24
