"""Runs of two ranks go on to the last bit; on another number of ranks with the same data, noise and numbers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.training.checkpoints import resumed_ranks
from tests.training.checkpoints.test_continuity import rows_of

SCRIPT = Path(resumed_ranks.__file__)


@pytest.fixture(scope="module")
def runs(launch, tmp_path_factory):
    """One process: whole, and stopped for two ranks to go on; two ranks: see the script; then one goes on from two."""
    folder = tmp_path_factory.mktemp("resumed_ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fm_stages.plots.save", lambda figure, path: path)
        whole = resumed_ranks.run(folder / "one whole", "auto", 1, micro=None)
        resumed_ranks.run(folder / "one", "auto", 1, stop=resumed_ranks.STOP, micro=None)
        ranks = launch(SCRIPT, folder, 2, "cpu")
        last = folder / "stopped/checkpoints/last.ckpt"
        from_two = resumed_ranks.run(folder / "stopped", "auto", 1, last, micro=None)
    return SimpleNamespace(folder=folder, whole=whole, ranks=ranks, from_two=from_two)


def by_all(ranks: list[dict], name: str, what: str) -> dict:
    """What was drawn by step and place in the global batch, of all ranks; each place once."""
    parts = [rank[name][what] for rank in ranks]
    joined = {step: {} for step in parts[0]}
    for part in parts:
        for step, rows in part.items():
            assert not joined[step].keys() & rows.keys()
            joined[step].update(rows)
    return joined


def same_draws(a: dict, b: dict) -> bool:
    return all(torch.equal(a[step][place], row) for step, rows in b.items() for place, row in rows.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
class TestAsManyRanks:
    def test_to_the_last_bit(self, runs, strategy):
        for rank in runs.ranks:
            whole, parts = rank[strategy, "whole"], rank[strategy, "parts"]
            assert list(parts["drawn"]) == list(range(6, 13))
            assert same_draws(whole["drawn"], parts["drawn"])
            assert {step: whole["times"][step] for step in parts["times"]} == parts["times"]
        whole, parts = (runs.ranks[0][strategy, name]["weights"] for name in ("whole", "parts"))
        assert whole
        assert all(torch.equal(x, parts[name]) for name, x in whole.items())

    def test_every_logged_number_once(self, runs, strategy):
        whole, parts = (rows_of(runs.folder / strategy / name) for name in ("whole", "parts"))
        assert len({key for row in whole for key in row}) > 40
        assert parts == whole

    def test_verified(self, runs, strategy):
        assert [rank[strategy, "rehearsal"] for rank in runs.ranks] == ["verified"] * 2


class TestOtherRanks:
    @pytest.fixture(params=["from one", "from two"])
    def gone_on(self, request, runs):
        if request.param == "from one":
            found = {what: by_all(runs.ranks, "from one", what) for what in ("drawn", "times")}
            return {**runs.ranks[0]["from one"], **found, "rows": rows_of(runs.folder / "one")}
        return {**runs.from_two, "rows": rows_of(runs.folder / "stopped")}

    def test_the_same_data_and_noise(self, runs, gone_on):
        drawn = gone_on["drawn"]
        assert list(drawn) == list(range(6, 13))
        assert all(len(rows) == resumed_ranks.BATCH for rows in drawn.values())
        assert same_draws(runs.whole["drawn"], drawn)
        for step, times in gone_on["times"].items():  # which follow the gap that was measured, in another order of sums
            assert times == pytest.approx(runs.whole["times"][step], abs=1e-4)

    def test_the_same_weights_but_for_the_order_of_sums(self, runs, gone_on):
        weights = gone_on["weights"]
        worst = max(float((x - runs.whole["weights"][name]).abs().max()) for name, x in weights.items())
        print(f"largest difference of a weight: {worst:.2g}")
        assert worst < 5e-5

    def test_the_same_table(self, runs, gone_on):
        rows = gone_on["rows"]
        expected = rows_of(runs.folder / "one whole")
        assert [row.keys() for row in rows] == [row.keys() for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert {k: float(x) for k, x in row.items()} == pytest.approx(
                {k: float(x) for k, x in other.items()}, rel=1e-2, abs=2e-3, nan_ok=True
            )


def test_what_one_rank_loses_is_told_on_all(runs):
    first, second = (rank["forgetful"] for rank in runs.ranks)
    assert second.endswith("First of what differs: callback/Forgetful/count")
    assert first == f"rank 1 cannot go on: {second}"


def test_what_fails_on_rank_0_alone_ends_the_rehearsal_on_all(runs):
    folder, table = ([rank[name] for rank in runs.ranks] for name in ("no folder", "no table"))
    assert "File exists" in folder[0]
    assert folder[1] == f"rank 0 cannot go on: {folder[0]}"
    assert table == ["the table is gone", "rank 0 cannot go on: the table is gone"]
    assert not list(runs.folder.rglob(".verify_resume*"))
    assert not (runs.folder / "no table").exists()


def test_all_ranks_end_where_the_disk_is_full(runs):
    assert [rank["full"] for rank in runs.ranks] == [74, 74]
    assert not list(runs.folder.glob("full/checkpoints/*"))
