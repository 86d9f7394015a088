"""Banks of rows that are read a piece at a time: those of a tensor, without a second copy in memory."""

import pytest
import torch

from fm_stages.oracle import DataBank, GaussianMixtureBank, RowReader, moments_affine, stored_rows

NUM = 40
LABELS = torch.tensor([3, 0, 1, 1]).repeat(10)


def some_rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x1 = torch.randn(NUM, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x1[20:24] = x1[:4]
    return x1.to(dtype)


class Reader:
    """Reads rows of a tensor, and keeps what was asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows, self.asked = rows, []

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        self.asked.append(index)
        return self.rows[index]

    def reader(self) -> RowReader:
        return RowReader(tuple(self.rows.shape), self.rows.dtype, self)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(stored_rows, "MAX_VALUES", 7 * 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_bank_is_that_of_the_tensor(dtype):
    source, every = Reader(some_rows(dtype)), torch.arange(NUM)
    one = DataBank(source.reader(), LABELS, 0.5, 1.0)
    other = DataBank(some_rows(dtype), LABELS, 0.5, 1.0)
    assert torch.equal(one.rows(every), other.rows(every))
    assert torch.equal(one.labels_of(every), LABELS)
    assert torch.equal(one.mean, other.mean)
    assert (one.num_distinct, one.rms_norm, one.label_counts) == (36, other.rms_norm, other.label_counts)
    assert torch.equal(one.covariance(), other.covariance())


def test_rows_are_read_twice_by_pieces_in_their_order():
    source = Reader(some_rows())
    DataBank(source.reader(), LABELS)
    assert max(len(index) for index in source.asked) <= 7
    assert all((index.diff() > 0).all() for index in source.asked)
    read = torch.cat(source.asked)
    assert torch.equal(read[:NUM], torch.arange(NUM))
    assert read[NUM:].tolist() == [i for i in range(NUM) if not 20 <= i < 24]  # equal rows are stored once


def test_a_value_that_is_not_finite_is_named_by_its_row():
    rows = some_rows()
    rows[33, 1, 2, 2] = torch.inf
    with pytest.raises(ValueError, match="row 33 of x1 holds NaN or infinity"):
        DataBank(Reader(rows).reader())


def test_large_values_are_not_taken_for_infinite_ones():
    with pytest.raises(ValueError, match="rows are too large"):
        DataBank(some_rows() * 1e30)


class TestMoments:
    def test_the_bank_is_that_of_means_and_stds(self):
        mean, std, every = some_rows(), some_rows().abs(), torch.arange(NUM)
        moments = Reader(torch.stack([mean, std], 1)).reader()
        scale, shift = torch.tensor([[[0.5]], [[-2.0]]]), torch.tensor([[[1.0]], [[0.0]]])
        one = GaussianMixtureBank.of_moments(moments, LABELS, *moments_affine(scale, shift, (2, 3, 3)))
        other = GaussianMixtureBank(mean, std, LABELS, scale, shift)
        assert torch.equal(one.moments_of(every), other.moments_of(every))
        assert torch.equal(one.moments_of(every)[:, 1], std * scale.abs())
        assert torch.equal(one.covariance(), other.covariance())
        assert (one.shape, one.num_dims, one.rms_norm) == ((2, 3, 3), 18, other.rms_norm)

    def test_a_negative_std_is_named_by_its_row(self):
        moments = torch.stack([some_rows(), some_rows().abs()], 1)
        moments[35, 1, 0, 0, 0] = -1
        with pytest.raises(ValueError, match="row 35 of x1 has a negative std"):
            GaussianMixtureBank.of_moments(Reader(moments).reader())
