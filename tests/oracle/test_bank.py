"""The bank against numpy: which rows it holds, how often, under which labels."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fm_stages.oracle import DataBank


def bits(x: Tensor) -> list[int]:
    return x.flatten().view(torch.int32).tolist()


@pytest.fixture
def rows(generator) -> Tensor:
    """10 distinct images; 0 occurs three times, 1 twice."""
    x = torch.randn(10, 2, 3, 2, generator=generator)
    return torch.cat([x, x[[0, 1, 0]]])


class TestRows:
    def test_come_back_bit_for_bit(self, rows):
        rows[2, 0, 0, 0], rows[3, 0, 0, 1], rows[4, 1, 2, 0] = -0.0, 1e-40, 3e18
        bank = DataBank(rows)
        index = torch.tensor([12, 3, 3, 0, 2, 7, 4])
        assert bits(bank.rows(index)) == bits(rows[index])
        assert bank.rows(index).shape == (7, 2, 3, 2)

    def test_of_labelled_banks_follow_the_data_set_not_the_table(self, rows):
        labels = torch.tensor([5, 0, 9, 5, 5, 0, 0, 9, 9, 9, 5, 0, 5])  # neither sorted nor without holes
        bank = DataBank(rows, labels)
        index = torch.randperm(13, generator=torch.Generator().manual_seed(1))
        assert bits(bank.rows(index)) == bits(rows[index])
        assert bank.labels_of(index).tolist() == labels[index].tolist()
        assert bank.labels_of(index).dtype == torch.int64

    def test_without_labels_are_unconditional(self, rows):
        assert DataBank(rows).labels_of(torch.arange(4)).tolist() == [-1] * 4
        assert not DataBank(rows).has_labels
        assert DataBank(rows).label_counts == {}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_precisions_become_float32_once(self, rows, dtype):
        bank = DataBank(rows.to(dtype))
        assert bank.rows(torch.arange(13)).dtype == torch.float32
        assert bits(bank.rows(torch.arange(13))) == bits(rows.to(dtype).float())

    def test_are_a_copy(self, rows):
        before = rows.clone()
        bank = DataBank(rows.requires_grad_())
        assert not bank.rows(torch.arange(3)).requires_grad
        rows.detach().zero_()
        assert torch.equal(bank.rows(torch.arange(13)), before)

    @pytest.mark.parametrize("memory", ["channels_last", "strided", "expanded"])
    def test_may_lie_anyhow_in_memory(self, memory, generator):
        x = torch.randn(6, 4, 2, 2, generator=generator)
        if memory == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif memory == "strided":
            x = torch.randn(12, 8, 2, 4, generator=generator)[::2, ::2, :, ::2]
        else:
            x = x[:1].expand(6, 4, 2, 2)
        bank = DataBank(x)
        assert torch.equal(bank.rows(torch.arange(6)), x)
        assert bank.num_distinct == (1 if memory == "expanded" else 6)

    def test_vectors(self):
        bank = DataBank(torch.tensor([[1.0], [2.0]]))
        assert bank.shape == (1,)
        assert bank.rows(torch.tensor([1])).tolist() == [[2.0]]

    def test_transposed_vectors(self, generator):
        x = torch.randn(3, 7, generator=generator).T
        assert torch.equal(DataBank(x).rows(torch.arange(7)), x)


class TestDuplicates:
    def test_are_stored_once(self, rows):
        bank = DataBank(rows)
        assert (len(bank), bank.num_rows, bank.num_distinct) == (13, 13, 10)
        assert bank.num_bytes < 4 * 10 * (12 + 8)
        assert bank.num_bytes >= 4 * 10 * 12

    def test_minus_zero_is_zero(self):
        assert DataBank(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])).num_distinct == 2

    def test_nearly_equal_rows_are_different(self):
        one = torch.ones(1, 3)
        assert DataBank(torch.cat([one, torch.nextafter(one, 2 * one)])).num_distinct == 2

    def test_under_two_labels_are_rows_of_both(self, rows):
        labels = torch.tensor([1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 0])  # image 0: 1 1 0, image 1: 0 2
        bank = DataBank(rows, labels)
        assert bank.num_distinct == 12
        assert bank.label_counts == {0: 2, 1: 2, 2: 9}
        assert bank.classes == [0, 1, 2]
        assert bank.labels_of(torch.arange(13)).tolist() == labels.tolist()
        assert bits(bank.rows(torch.arange(13))) == bits(rows)

    def test_far_apart_in_a_large_set(self, generator):
        values = torch.randint(500, (20_000, 1), generator=generator).float()
        labels = torch.randint(3, (20_000,), generator=generator)
        bank = DataBank(values, labels)
        assert bank.num_distinct == len({(v, y) for v, y in zip(values[:, 0].tolist(), labels.tolist(), strict=True)})
        assert list(bank.label_counts.values()) == labels.bincount().tolist()
        index = torch.randint(20_000, (100,), generator=generator)
        assert torch.equal(bank.rows(index), values[index])
        assert torch.equal(bank.labels_of(index), labels[index])

    def test_all_rows_equal(self):
        bank = DataBank(torch.full((1000, 3), 0.1), torch.arange(1000) % 2)
        assert bank.num_distinct == 2
        assert bank.label_counts == {0: 500, 1: 500}
        assert bank.rms_norm == pytest.approx(np.sqrt(3) * np.float64(np.float32(0.1)), rel=1e-7)
        assert bank.covariance().abs().max() < 1e-12


class TestMoments:
    """Copies count, whatever the labels."""

    @pytest.mark.parametrize("labelled", [False, True])
    def test_mean_norm_and_covariance_are_numpys(self, rows, labelled):
        labels = torch.tensor([1, 0, 2, 2, 2, 2, 2, 2, 2, 2, 1, 2, 0]) if labelled else None
        bank = DataBank(rows + 3, labels)
        flat = (rows + 3).flatten(1).double().numpy()
        np.testing.assert_allclose(bank.mean.numpy(), flat.mean(0), rtol=1e-14)
        assert bank.mean.dtype == torch.float64
        np.testing.assert_allclose(bank.covariance().numpy(), np.cov(flat.T, bias=True), rtol=0, atol=1e-6)
        assert bank.rms_norm == pytest.approx(np.sqrt((flat**2).sum(1).mean()), rel=1e-7)

    def test_of_digits(self, digits):
        x, labels = digits
        bank, flat = DataBank(x, labels), x.flatten(1).double().numpy()
        np.testing.assert_allclose(bank.covariance().numpy(), np.cov(flat.T, bias=True), rtol=0, atol=1e-12)
        assert bank.rms_norm == pytest.approx(np.sqrt((flat**2).sum(1).mean()), rel=1e-8)
        assert bank.label_counts == dict(enumerate(labels.bincount().tolist()))


class TestIdentity:
    def test_copies_are_itself(self, rows):
        """So that neither a copied module (EMA) nor a checkpoint carries the training set."""
        bank = DataBank(rows)
        assert copy.deepcopy(bank) is bank
        module = nn.Linear(1, 1)
        module.bank = bank
        assert copy.deepcopy(module).bank is bank
        assert list(module.state_dict()) == ["weight", "bias"]

    def test_moves_in_place(self, rows):
        bank = DataBank(rows, torch.arange(13))
        assert bank.to("cpu") is bank
        assert bank.device == torch.device("cpu")
        bank.to("meta")
        assert bank.device.type == bank.mean.device.type == "meta"
        assert bank.rows(torch.tensor([3], device="meta")).device.type == "meta"

    def test_says_what_it_holds(self, rows):
        assert repr(DataBank(rows)) == "DataBank(13 rows, 10 distinct, shape (2, 3, 2), no labels)"
        assert "2 labels" in repr(DataBank(rows, torch.arange(13) % 2))


class TestRefusals:
    @pytest.mark.parametrize("shape", [(0, 3), (5,), (), (4, 0), (0,)], ids=str)
    def test_no_rows(self, shape):
        with pytest.raises(ValueError, match="at least one row"):
            DataBank(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
    def test_other_integers(self, dtype):
        with pytest.raises(ValueError, match=f"{dtype}.*preprocess"):
            DataBank(torch.ones(3, 2, dtype=dtype))

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("row", [0, 3, 9000])
    def test_values_that_are_not_finite_are_named_by_row(self, wrong, row):
        x = torch.zeros(9500, 1, 2)
        x[row, 0, 1] = x[9400, 0, 0] = wrong
        with pytest.raises(ValueError, match=f"row {row} .*NaN or infinity"):
            DataBank(x)

    @pytest.mark.parametrize(
        "labels",
        [
            torch.zeros(2).long(),
            torch.zeros(4).long(),
            torch.zeros(3, 1).long(),
            torch.zeros(()).long(),
            torch.zeros(3),
        ],
        ids=["few", "many", "columns", "scalar", "float"],
    )
    def test_labels_that_do_not_match(self, labels):
        with pytest.raises(ValueError, match="one integer label per row"):
            DataBank(torch.zeros(3, 2), labels)

    @pytest.mark.parametrize("label", [-1, -7])
    def test_negative_labels(self, label):
        with pytest.raises(ValueError, match=f"got {label}; -1 marks queries"):
            DataBank(torch.zeros(3, 2), torch.tensor([0, label, 2]))

    @pytest.mark.parametrize("label", [1, 10, -2])
    def test_a_missing_class_is_named(self, label):
        bank = DataBank(torch.zeros(3, 2), torch.tensor([0, 2, 9]))
        with pytest.raises(ValueError, match=f"label {label} .*from 0 to 9.*-1"):
            bank.slice_of(label)

    def test_a_class_of_an_unlabelled_bank(self):
        with pytest.raises(ValueError, match="label 3 .*no labels"):
            DataBank(torch.zeros(3, 2)).slice_of(3)

    def test_values_beyond_float32(self):
        with pytest.raises(ValueError, match="row 1"):
            DataBank(torch.tensor([[0.0], [1e300]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_of_any_integer_type(rows, dtype):
    labels = torch.arange(13).to(dtype) % 3
    bank = DataBank(rows, labels)
    assert bank.label_counts == {0: 5, 1: 4, 2: 4}
    assert bank.labels_of(torch.arange(13)).tolist() == labels.tolist()
