"""Samplers and batches against what they promise: every image once, the same global batches on any number of ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fm_stages.data import EpochSampler, HeldOutSampler, LabelledImages, to_model_range, to_pixels

N = 50


def make_images(num: int = N, **kwargs) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, 3, 5, 4), generator=generator, dtype=torch.uint8)
    return LabelledImages(images, torch.arange(num) % 7, num_classes=7, **kwargs)


def epoch_of(sampler: EpochSampler, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    sampler.set_epoch(epoch)
    return [(rows.tolist(), positions.tolist()) for rows, positions, _ in sampler]


def global_batches(
    num_replicas: int, accumulation: int = 1, epoch: int = 0, start: int = 0, **kwargs
) -> list[list[int]]:
    """The rows of each optimizer step by their position, gathered from all ranks and micro-batches."""
    table: list[dict[int, int]] = []
    for rank in range(num_replicas):
        sampler = EpochSampler(
            make_images(), 12, num_replicas=num_replicas, rank=rank, accumulation=accumulation, **kwargs
        )
        sampler.set_epoch(epoch)
        sampler.start = start
        for number, (rows, positions, _) in enumerate(sampler):
            if number // accumulation == len(table):
                table.append({})
            table[number // accumulation] |= dict(zip(positions.tolist(), rows.tolist(), strict=True))
    assert all(sorted(step) == list(range(12)) for step in table)
    return [[step[position] for position in range(12)] for step in table]


class TestPreprocessing:
    def test_all_levels_against_their_definition(self):
        levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        expected = levels.double() / 255 * 2 - 1
        assert (to_model_range(levels).double() - expected).abs().max() < 1e-6
        assert to_model_range(levels).amin() == -1
        assert torch.equal(to_pixels(to_model_range(levels)), levels)
        assert to_pixels(torch.tensor([-3.0, -0.9962, 0.01, 1.7])).tolist() == [0, 0, 129, 255]
        assert to_model_range(levels).amax() == 1

    def test_bits_do_not_depend_on_the_batch(self):
        images = make_images().images
        whole = to_model_range(images)
        assert all(torch.equal(to_model_range(images[i : i + 1])[0], whole[i]) for i in range(N))


class TestLabelledImages:
    def test_a_row_beyond_n_is_the_flip_bit_for_bit(self):
        data = make_images()
        x, labels = data.rows(torch.arange(2 * N))
        assert torch.equal(x[N:], x[:N].flip(-1))
        assert torch.equal(labels[N:], labels[:N])
        assert not torch.equal(x[N:], x[:N])

    def test_a_batch_keeps_the_samplers_order(self):
        data = make_images()
        rows, positions = torch.tensor([3, N + 3, 0]), torch.tensor([8, 9, 10])
        batch = data[rows, positions]
        assert torch.equal(batch["x1"], data.rows(torch.arange(2 * N))[0][rows])
        assert batch["labels"].tolist() == [3, 3, 0]
        assert torch.equal(batch["index"], rows)
        assert torch.equal(batch["position"], positions)

    def test_held_out_batches_have_no_index(self):
        batch = make_images(in_bank=False)[torch.tensor([1]), torch.tensor([1])]
        assert "index" not in batch

    @pytest.mark.parametrize("row", [-1, 2 * N])
    def test_rows_outside_the_bank_raise(self, row):
        with pytest.raises(IndexError, match=str(row)):
            make_images().rows(torch.tensor([0, row]))

    def test_bad_input_raises(self):
        images, labels = torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 1])
        with pytest.raises(ValueError, match="float32"):
            LabelledImages(images.float(), labels, 2)
        with pytest.raises(ValueError, match="at least one"):
            LabelledImages(images[:0], labels[:0], 2)
        with pytest.raises(ValueError, match=r"\[0, 1\), .* span \[0, 1\]"):
            LabelledImages(images, labels, 1)
        with pytest.raises(ValueError, match=r"span \[-1, 0\]"):
            LabelledImages(images, labels - 1, 2)
        with pytest.raises(ValueError, match="one int64 label"):
            LabelledImages(images, labels[:1], 2)


class TestEpochSampler:
    def test_an_epoch_holds_each_image_at_most_once(self):
        rows = [row for batch, _ in epoch_of(EpochSampler(make_images(), 12)) for row in batch]
        assert len(rows) == len(set(rows)) == 48  # 50 // 12 whole batches
        assert set(rows) <= set(range(N))

    def test_epochs_and_seeds_differ_and_repeat(self):
        sampler = EpochSampler(make_images(), 12, flip=True)
        first, second = epoch_of(sampler, 0), epoch_of(sampler, 1)
        assert first != second
        assert first == epoch_of(sampler, 0)
        assert first == epoch_of(EpochSampler(make_images(), 12, flip=True), 0)
        assert first != epoch_of(EpochSampler(make_images(), 12, flip=True, seed=1), 0)

    def test_left_over_images_come_in_other_epochs(self):
        sampler = EpochSampler(make_images(), 12)
        seen = {row for epoch in range(5) for batch, _ in epoch_of(sampler, epoch) for row in batch}
        assert seen == set(range(N))

    def test_flips_are_fair_and_leave_the_order_alone(self):
        flipped, plain = EpochSampler(make_images(), N, flip=True), EpochSampler(make_images(), N)
        coins = torch.zeros(N)
        for epoch in range(100):
            ((rows, _),), ((images, _),) = epoch_of(flipped, epoch), epoch_of(plain, epoch)
            assert [row % N for row in rows] == images
            coins[images] += torch.tensor(rows).ge(N).float()
        assert abs(coins.sum() / 5000 - 0.5) < 0.03  # four standard errors
        assert coins.min() > 25  # no image prefers a side: five standard deviations
        assert coins.max() < 75

    @pytest.mark.parametrize(("num_replicas", "accumulation"), [(1, 1), (3, 1), (1, 4), (2, 3), (12, 1), (1, 12)])
    def test_steps_do_not_depend_on_ranks_or_accumulation(self, num_replicas, accumulation):
        one = [rows for rows, _ in epoch_of(EpochSampler(make_images(), 12, flip=True, seed=3), 2)]
        assert global_batches(num_replicas, accumulation, epoch=2, flip=True, seed=3) == one
        assert global_batches(num_replicas, accumulation, epoch=2, start=24, flip=True, seed=3) == one[2:]

    @given(
        num=st.integers(1, 60),
        steps=st.integers(1, 5),
        ranks=st.integers(1, 4),
        accumulation=st.integers(1, 4),
        epoch=st.integers(0, 2**20),
        flip=st.booleans(),
        data=st.data(),
    )
    def test_any_shares_make_the_same_steps_and_go_on_anywhere(
        self, num, steps, ranks, accumulation, epoch, flip, data
    ):
        parts = ranks * accumulation
        size = max(num // steps // parts, 1) * parts
        images, shares = make_images(max(num, size)), {"num_replicas": ranks, "accumulation": accumulation}
        samplers = [EpochSampler(images, size, flip=flip, rank=rank, **shares) for rank in range(ranks)]
        whole = [epoch_of(EpochSampler(images, size, flip=flip), epoch)]
        of_ranks = [epoch_of(sampler, epoch) for sampler in samplers]
        step_rows = [[None] * size for _ in whole[0]]
        for batches in of_ranks:
            for number, (rows, positions) in enumerate(batches):
                for row, position in zip(rows, positions, strict=True):
                    assert step_rows[number // accumulation][position] is None  # nobody else's
                    step_rows[number // accumulation][position] = row
        assert step_rows == [rows for rows, _ in whole[0]]
        taken = [row % len(images) for rows in step_rows for row in rows]
        assert len(taken) == len(set(taken)) == len(images) // size * size
        done = data.draw(st.integers(0, len(of_ranks[0])))
        for sampler, batches in zip(samplers, of_ranks, strict=True):
            sampler.start = done * size // accumulation
            assert epoch_of(sampler, epoch) == batches[done:]

    def test_positions_of_a_micro_batch(self):
        sampler = EpochSampler(make_images(), 12, num_replicas=2, rank=1, accumulation=3)
        positions = [positions for _, positions in epoch_of(sampler)]
        assert positions[:4] == [[2, 3], [6, 7], [10, 11], [2, 3]]
        assert len(positions) == len(sampler) == 12

    def test_start_within_an_epoch_and_set_epoch(self):
        sampler = EpochSampler(make_images(), 12, accumulation=2)
        whole = epoch_of(sampler, 4)
        sampler.start = 18
        assert epoch_of(sampler, 4) == whole[3:]
        assert len(sampler) == len(whole)
        assert len(epoch_of(sampler, 5)) == len(whole)  # a new epoch starts at its beginning
        sampler.start = 20
        with pytest.raises(ValueError, match="after 20 images of an epoch: 6 make"):
            epoch_of(sampler, 5)

    def test_place_decides_over_set_epoch(self):
        plain = EpochSampler(make_images(), 12)
        placed = EpochSampler(make_images(), 12, place=lambda: (3, 24))
        assert epoch_of(placed, 7) == epoch_of(plain, 3)[2:]

    def test_batches_that_do_not_fit_raise(self):
        with pytest.raises(ValueError, match="batch_size=10 .* 2 ranks times 3 .* 6 and 12 do"):
            EpochSampler(make_images(), 10, num_replicas=2, accumulation=3)
        with pytest.raises(ValueError, match="batch_size=51 must lie between 1 and .* 50"):
            EpochSampler(make_images(), 51)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_the_loader_takes_whole_batches_and_no_global_random_number(self, num_workers):
        data, sampler = make_images(), EpochSampler(make_images(), 12, flip=True)
        before = torch.get_rng_state()
        loader = DataLoader(
            data, sampler=sampler, batch_size=None, num_workers=num_workers, generator=torch.Generator()
        )
        batches = list(loader)
        assert torch.equal(before, torch.get_rng_state())
        assert [batch["index"].tolist() for batch in batches] == [rows for rows, _ in epoch_of(sampler)]
        assert all(torch.equal(batch["x1"], data.rows(batch["index"])[0]) for batch in batches)


class TestHeldOutSampler:
    @pytest.mark.parametrize("num_replicas", [1, 2, 3, 5])
    def test_every_image_once_for_all_sizes(self, num_replicas):
        for num in range(num_replicas, 24):
            for batch_size in range(num_replicas, 26):
                samplers = [
                    HeldOutSampler(make_images(num), batch_size, num_replicas=num_replicas, rank=rank)
                    for rank in range(num_replicas)
                ]
                ranks = [[rows.tolist() for rows, *_ in sampler] for sampler in samplers]
                in_order = [row for batch in zip(*ranks, strict=True) for part in batch for row in part]
                assert in_order == list(range(num))
                sizes = [len(part) for parts in ranks for part in parts]
                assert min(sizes) >= 1
                assert max(sizes) - min(sizes) <= 1
                assert max(sizes) <= max(-(-batch_size // num_replicas), 2)
                assert {len(sampler) for sampler in samplers} == {len(ranks[0])}

    def test_positions_are_the_held_out_images(self):
        for rows, positions, _ in HeldOutSampler(make_images(10), 4, num_replicas=2, rank=1):
            assert torch.equal(rows, positions)

    @pytest.mark.parametrize(("num", "batch_size"), [(2, 8), (8, 2)])
    def test_too_few_for_the_ranks_raises(self, num, batch_size):
        with pytest.raises(ValueError, match="3 ranks without an image: hold out at least 3"):
            HeldOutSampler(make_images(num), batch_size, num_replicas=3)
