"""What a bank costs: by counting bytes and products again."""

import pytest
import torch

from fm_stages.oracle import DataBank, describe, nearest_pays, plan_bank, rows_per_query
from fm_stages.oracle.plan import COPY_SHARE, INDEX_BYTES, MAX_SHARE

GIB = 2**30


def bytes_of(num_rows, num_dims, value_bytes):
    """Values, four float32 columns beside them, and what each rank knows of all rows."""
    return num_rows * (num_dims * value_bytes + 16)


class TestPlanBank:
    def test_a_small_bank_is_copied(self):
        plan = plan_bank(60_000, 784, 1, memory_bytes=8 * GIB, num_ranks=4)
        assert not plan.sharded
        assert plan.bytes_per_rank == bytes_of(60_000, 784, 1) + INDEX_BYTES * 60_000
        assert all(plan.rows_of(rank) == range(60_000) for rank in range(4))

    def test_a_large_bank_is_sharded(self):
        plan = plan_bank(1_281_167, 4096, 2, memory_bytes=80 * GIB, num_ranks=8)
        assert plan.sharded
        exact = 1_281_167 * 4096 * 2 / 8
        assert exact < plan.bytes_per_rank < 1.05 * exact

    def test_the_choice_turns_where_a_copy_exceeds_its_share(self):
        needed = bytes_of(1000, 100, 4) + INDEX_BYTES * 1000
        enough = int(needed / COPY_SHARE) + 10
        assert not plan_bank(1000, 100, 4, memory_bytes=enough, num_ranks=2).sharded
        assert plan_bank(1000, 100, 4, memory_bytes=enough - 20, num_ranks=2).sharded

    def test_what_is_asked_for_wins(self):
        assert plan_bank(1000, 100, 4, GIB, num_ranks=2, sharded=True).sharded
        assert not plan_bank(1000, 100, 4, int(1e6), num_ranks=2, sharded=False).sharded

    def test_one_rank_has_nobody_to_share_with(self):
        assert not plan_bank(1000, 100, 4, int(1e6), num_ranks=1, sharded=True).sharded

    @pytest.mark.parametrize(("num_rows", "num_ranks"), [(10, 3), (7, 7), (1000, 4), (5, 2)])
    def test_shards_are_all_rows_in_order_and_even(self, num_rows, num_ranks):
        plan = plan_bank(num_rows, 4, 4, GIB, num_ranks, sharded=True)
        parts = [plan.rows_of(rank) for rank in range(num_ranks)]
        assert [row for part in parts for row in part] == list(range(num_rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert max(map(len, parts)) * 32 + INDEX_BYTES * num_rows == plan.bytes_per_rank

    def test_a_bank_that_does_not_fit_says_what_would(self):
        with pytest.raises(MemoryError, match=r"4\.78 GiB on each of 1 ranks, which have 6\.00 GiB") as refused:
            plan_bank(1_250_000, 1020, 4, 6 * GIB, num_ranks=1)
        message = str(refused.value)
        assert "rows in 8 or 16 bits" in message
        ranks = int(message.split("at least ")[1].split(" ranks")[0])
        assert plan_bank(1_250_000, 1020, 4, 6 * GIB, ranks).bytes_per_rank <= MAX_SHARE * 6 * GIB
        with pytest.raises(MemoryError):
            plan_bank(1_250_000, 1020, 4, 6 * GIB, ranks - 1)

    def test_more_ranks_than_rows(self):
        with pytest.raises(ValueError, match="3 rows .* 4 ranks"):
            plan_bank(3, 10, 4, GIB, num_ranks=4)


def bank(num_classes: int | None) -> DataBank:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(120, 3, 5, generator=generator)
    return DataBank(rows, None if num_classes is None else torch.arange(120) % num_classes)


class TestDescribe:
    def test_products_with_all_rows(self):
        # two products of 64 x 120 x 15, a multiplication and an addition each
        assert f"{2 * 2 * 64 * 120 * 15 / 1e6:.1f} MFLOP" in describe(bank(None), 64, label_dropout=1.0)

    def test_a_class_has_its_own_rows_only(self):
        rows = 0.25 * 120 + 0.75 * 30
        text = describe(bank(4), 64, label_dropout=0.25, step_flops=10**7)
        assert f"{4 * 64 * rows * 15 / 1e6:.1f} MFLOP" in text
        assert f"{4 * 64 * rows * 15 / 1e7:.1%} of a training step's 10.0 MFLOP" in text

    def test_one_line_with_rows_dtype_memory_and_device(self):
        text = describe(bank(4), 64, 0.0, num_ranks=2)
        for part in ("120 rows", "float32", "4 labels", "MiB on each of 2 ranks, a copy", "on cpu"):
            assert part in text
        assert "\n" not in text
        assert "training step" not in text  # nobody knows


def test_nearest_neighbours_pay_in_long_runs():
    assert nearest_pays(60_000, 128, 4000)
    assert not nearest_pays(60_000, 128, 400)
    assert not nearest_pays(60_000, 0, -1)  # a run of unknown length
    assert not nearest_pays(60_000, 128, 4000, share=0.1)


@pytest.mark.parametrize(("label_dropout", "rows"), [(1.0, 6.0), (0.0, (4 + 16) / 6), (0.25, 1.5 + 2.5)])
def test_rows_per_query(label_dropout, rows):
    labelled = DataBank(torch.arange(6.0)[:, None], torch.tensor([0, 1, 1, 1, 1, 0]))
    assert rows_per_query(labelled, label_dropout) == pytest.approx(rows)
    assert rows_per_query(DataBank(torch.arange(6.0)[:, None]), label_dropout) == 6
