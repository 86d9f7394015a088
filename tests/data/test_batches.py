"""A step's images shared out: the fewest equal parts that fit, by trying them all; a refusal names what would do."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fm_stages.data.batches import accumulate, accumulation_for, check_shares, describe_shares, recount


@given(per_rank=st.integers(1, 60), num_ranks=st.integers(1, 9), micro=st.integers(1, 70))
def test_fewest_equal_parts_that_fit(per_rank, num_ranks, micro):
    found = accumulation_for(per_rank * num_ranks, num_ranks, micro)
    fits = [a for a in range(1, per_rank + 1) if (per_rank / a).is_integer() and per_rank / a <= micro]
    assert found == min(fits)


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "accumulation", "says"),
    [
        (100, 8, 1, "100 images per optimizer step do not divide into 8 ranks: 96 and 104 do"),
        (5, 8, 1, "8 ranks: 8 is the smallest that does"),
        (100, 8, 3, "8 ranks times 3 accumulated micro-batches: 96 and 120 do"),
    ],
)
def test_names_the_nearest_sizes(batch_size, num_ranks, accumulation, says):
    with pytest.raises(ValueError, match=says):
        check_shares(batch_size, num_ranks, accumulation)


def test_in_one_line():
    assert describe_shares(256, 8, 2) == "256 images per step = 8 ranks x 16 x 2 accumulated"
    assert describe_shares(128, 1, 1) == "128 images per step = 1 rank x 128"


def test_a_trainers_intervals_stay_in_steps():
    trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1, val_check_interval=500, limit_train_batches=1.0)
    accumulate(trainer, 64, 12)
    assert (trainer.accumulate_grad_batches, trainer.val_check_interval) == (4, 2000)
    assert trainer.limit_train_batches == 1.0  # a share of the epoch


def test_counts_of_another_accumulation():
    """Seven steps, two of them in this epoch; the last micro-batch is not completed while callbacks run."""
    total = {"ready": 14, "started": 14, "processed": 14, "completed": 13}
    current = {"ready": 4, "started": 4, "processed": 4, "completed": 3}
    progress = {"total": total, "current": current, "is_last_batch": False}
    assert recount(progress, 2, 3) == 7
    assert total == {"ready": 21, "started": 21, "processed": 21, "completed": 20}
    assert current == {"ready": 6, "started": 6, "processed": 6, "completed": 5}


def test_no_counting_inside_a_step():
    progress = {"total": {"processed": 15}, "current": {"processed": 5}}
    assert recount(progress, 2, 1) is None
    assert progress == {"total": {"processed": 15}, "current": {"processed": 5}}
