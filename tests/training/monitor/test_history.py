"""Curves over steps: what a table says of them, what is forgotten, and their way through a checkpoint."""

import json
import math

import pytest
import torch

from fm_stages.oracle import Curves
from fm_stages.training.monitor import history
from fm_stages.training.monitor.history import History

EDGES = [0.0, 0.25, 1.0]


def curves(*mean: float, edges=EDGES) -> Curves:
    return Curves(edges, [3, 5], {"regular": list(mean), "gap": [9.0, 9.0]}, {"regular": [0.1, 0.2], "gap": [1.0, 1.0]})


@pytest.fixture
def two() -> History:
    found = History("regular")
    found.add(10, {"train": curves(1.0, 2.0)})
    found.add(20, {"train": curves(0.5, 1.0), "held_out": curves(0.75, math.nan)})
    return found


def test_averages_are_over_uniform_t(two):
    mean, sem = two.average("train", 0.0, 1.0)
    assert mean == pytest.approx([0.25 * 1 + 0.75 * 2, 0.25 * 0.5 + 0.75])
    assert sem == pytest.approx([math.hypot(0.25 * 0.1, 0.75 * 0.2)] * 2)
    assert two.average("train", 0.25, 1.0)[0] == [2.0, 1.0]


def test_a_series_that_began_later_has_no_number_before(two):
    assert two.series == ["train", "held_out"]
    assert two.by_t("train") == [[1.0, 2.0], [0.5, 1.0]]
    first, second = two.by_t("held_out")
    assert all(map(math.isnan, first))
    assert second[0] == 0.75
    assert math.isnan(two.average("held_out", 0, 1)[0][0])


def test_errors_of_a_difference_add_in_quadrature_where_there_are_enough_samples(two, monkeypatch):
    monkeypatch.setattr(history, "FEW", 4)
    first, second = two.error_between("train", "held_out")
    assert all(map(math.isnan, first))
    assert math.isnan(second[0])  # of 3 samples
    assert second[1] == pytest.approx(0.2 * math.sqrt(2))


def test_table_has_a_row_for_each_step_and_bin(two):
    columns, rows = two.table()
    assert columns[:6] == ["step", "t_lo", "t_hi", "train_count", "train_regular", "train_regular_sem"]
    assert columns[6:] == ["held_out_count", "held_out_regular", "held_out_regular_sem"]
    assert [row[:6] for row in rows] == [
        [10, 0.0, 0.25, 3, 1.0, 0.1],
        [10, 0.25, 1.0, 5, 2.0, 0.2],
        [20, 0.0, 0.25, 3, 0.5, 0.1],
        [20, 0.25, 1.0, 5, 1.0, 0.2],
    ]
    assert rows[0][6] == 0
    assert rows[2][6:] == [3, 0.75, 0.1]


def test_a_step_that_is_not_later_is_none(two):
    two.add(20, {"train": curves(7.0, 7.0)})
    two.add(30, {})
    assert two.steps == [10, 20]


def test_other_bins_begin_anew(two):
    two.add(30, {"train": curves(1.0, 1.0, edges=[0.0, 0.5, 1.0])})
    assert two.steps == [30]
    assert two.edges == [0.0, 0.5, 1.0]


def test_many_steps_are_thinned_out_and_the_ends_stay(monkeypatch):
    monkeypatch.setattr(history, "MOST", 8)
    found = History("regular")
    for step in range(1, 1001):
        found.add(step, {"train": curves(step, step)})
        assert len(found.steps) <= 8
        assert found.steps[0] == 1
        assert found.steps[-1] == step
    assert found.steps == sorted(set(found.steps))
    assert [row[0] for row in found.by_t("train")] == found.steps


def test_steps_to_keep_are_not_forgotten(monkeypatch):
    monkeypatch.setattr(history, "MOST", 8)
    found = History("regular")
    for step in range(1, 1001):
        found.add(step, {"train": curves(step, step)}, keep=[6.0, 77.0])
    assert {6, 77} <= set(found.steps)
    assert found.steps == sorted(set(found.steps))
    assert [row[0] for row in found.by_t("train")] == found.steps
    assert len(found.steps) <= 9  # one may be added before others are forgotten again


def test_goes_through_a_checkpoint_to_the_last_bit(two, tmp_path):
    torch.save(two.state_dict(), tmp_path / "a.pt")
    other = History("regular")
    other.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    assert repr(other.table()) == repr(two.table())  # as text, for NaN is not equal to itself
    json.dumps(two.state_dict())  # plain numbers
    empty = History("regular")
    empty.load_state_dict(History("regular").state_dict())
    assert empty.steps == []
