"""Residencies of latents: the same losses, bit for bit, on one rank and two, with copies and shards, and resumed."""

from pathlib import Path

import pytest

from fm_stages.data import Latents
from fm_stages.data.latent_index import read_index
from tests.data import latent_folders as folders
from tests.data.latents_on_ranks import NUM_STEPS, fit

MOMENTS = ("mean", "std", "mean_flip", "std_flip")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("latents")
    folders.write_indexed(place / "latents")
    folders.write_indexed(place / "moments", MOMENTS)
    return place


def options(residency: str, place: Path) -> Latents:
    return Latents(str(place), residency=residency, batch_size=8, val_batch_size=4, val_fraction=0.1)


@pytest.fixture(scope="module", params=["latents", "moments"])
def alone(place, request) -> tuple[str, list[float], str]:
    """Which rows, and losses and curves of one rank that reads them from disk."""
    losses, table = fit(options("disk", place / request.param), 1)
    assert len(losses) == NUM_STEPS > 43 * 0.9 / 8  # into a second epoch
    return request.param, losses, table


@pytest.mark.parametrize("residency", ["ram", "device"])
def test_residencies_train_alike_and_go_on_in_one_another(alone, place, tmp_path, residency):
    kind, losses, table = alone
    before, _ = fit(options("disk", place / kind), 1, steps=3, save=tmp_path / "a.ckpt")
    after, its_table = fit(options(residency, place / kind), 1, ckpt=tmp_path / "a.ckpt")
    assert (before + after, its_table) == (losses, table)


@pytest.fixture(scope="module")
def found(place, launch) -> list[dict]:
    for file in place.glob("*/latents_stats.pt"):
        file.unlink()
    return launch(Path(__file__).with_name("latents_on_ranks.py"), place, 2, "cpu")


class TestTwoRanks:
    def test_statistics_are_made_by_one(self, found):
        assert sum(len(rank["made"]) for rank in found) == 2  # of two folders

    def test_shards_are_verified_once(self, found, place):
        shards = [len(rank["verified"]) for rank in found]
        assert min(shards) > 0
        assert sum(shards) == read_index(place / "latents").num_shards

    @pytest.mark.parametrize("case", ["ram", "device, shards"])
    def test_residencies_train_alike(self, found, case):
        assert [rank[case] for rank in found] == [rank["disk"] for rank in found]

    def test_copies_train_as_shards(self, found):
        for rank in found:
            assert rank["device, copies"][0] == pytest.approx(rank["disk"][0], rel=1e-5)

    def test_moments_are_drawn_alike(self, found):
        for rank in found:
            assert rank["moments, device"] == rank["moments, disk"]

    def test_two_ranks_train_as_one(self, found, alone):
        kind, losses, _ = alone
        both = [rank["disk" if kind == "latents" else "moments, disk"][0] for rank in found]
        assert [sum(pair) / 2 for pair in zip(*both, strict=True)] == pytest.approx(losses, rel=1e-4)

    def test_memory_is_shared_and_leaves_nothing(self, found):
        assert [rank["shared"] for rank in found] == [[123.0]] * 2
        assert [rank["left"] for rank in found] == [[]] * 2

    def test_errors_on_every_rank(self, found):
        assert found[0]["no room"].startswith("MemoryError: the rows take")
        assert "choose residency 'disk'" in found[1]["no room"]
        for rank in found:
            assert "do not share" in rank["apart"]
            assert "choose residency 'disk'" in rank["apart"]
            assert "batch_size=7" in rank["batch"]
            assert "nowhere" in rank["one rank"]
