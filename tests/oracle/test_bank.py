"""The bank against numpy: which rows it holds, how often, under which labels."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fm_stages.flow import LinearPath
from fm_stages.oracle import DataBank, Oracle
from fm_stages.oracle.skipping import measure_nearest


def bits(x: Tensor) -> list[int]:
    return x.flatten().view(torch.int32).tolist()


@pytest.fixture
def rows(generator) -> Tensor:
    """10 distinct images; 0 occurs three times, 1 twice."""
    x = torch.randn(10, 2, 3, 2, generator=generator)
    return torch.cat([x, x[[0, 1, 0]]])


class TestRows:
    def test_come_back_bit_for_bit(self, rows):
        rows[2, 0, 0, 0], rows[3, 0, 0, 1], rows[4, 1, 2, 0] = -0.0, 1e-40, 3e17
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


SHAPE = (3, 4, 4)
AFFINE = {
    "numbers": (1 / 127.5, -1.0),
    "negative": (-0.02, 1.5),
    "per channel": (torch.tensor([0.01, 0.02, 0.005])[:, None, None], torch.tensor([-1.0, -2.0, 0.5])[:, None, None]),
    "shift per value": (0.01, torch.linspace(-1, 1, 48).reshape(SHAPE)),
}


def stored(dtype: str, num: int, generator: torch.Generator) -> Tensor:
    """Images as they come, in a few tight groups, some of them twice or thrice."""
    group = torch.rand(num // 20 + 1, *SHAPE, generator=generator).repeat_interleave(20, 0)[:num]
    x = (group * 200 + 55 * torch.rand(num, *SHAPE, generator=generator)).round()
    x = x.to(torch.uint8) if dtype == "uint8" else (x * 0.997).to(getattr(torch, dtype))
    return torch.cat([x, x[:10], x[5:8]])


class TestStorage:
    """Rows are stored as they come; what the network sees of them is what counts."""

    @pytest.fixture(params=["uint8", "float16", "bfloat16", "float32"])
    def x(self, request, generator) -> Tensor:
        return stored(request.param, 150, generator)

    @pytest.fixture(params=list(AFFINE))
    def affine(self, request) -> tuple[float | Tensor, float | Tensor]:
        return AFFINE[request.param]

    def test_rows_are_the_decoded_ones_bit_for_bit(self, x, affine):
        scale, shift = affine
        bank = DataBank(x, scale=scale, shift=shift)
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
        assert bank.dtype == x.dtype
        assert bits(bank.rows(index)) == bits(x[index].float() * scale + shift)
        assert bank.num_distinct == 150

    def test_posterior_and_target_are_those_of_the_decoded_rows(
        self, x, affine, path, queries_of, brute_force, brute_force_target, errors_of, generator
    ):
        scale, shift = affine
        decoded, labels = x.float() * scale + shift, torch.arange(len(x)) % 3
        oracle = Oracle(DataBank(x, labels, scale, shift), path)
        x_t, t, asked = queries_of(path, decoded, labels, times=[0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95], per_time=5)
        truth = brute_force(decoded, labels, x_t, t, path, asked)
        errors = errors_of(oracle.posterior(x_t, t, asked), truth, decoded)
        assert ((truth.top1 > 0.1) & (truth.top1 < 0.9)).sum() > 5
        assert errors["mean"] < 1e-5
        assert max(errors.values()) < 1e-4
        plain = Oracle(DataBank(decoded, labels), path)
        assert max(errors_of(plain.posterior(x_t, t, asked), truth, decoded).values()) < 1e-4

        index = torch.randint(len(x), (20,), generator=generator)
        x0, t = torch.randn(20, *SHAPE, generator=generator), torch.linspace(0.1, 0.999, 20)
        truth, conditional = brute_force_target(decoded, x0, decoded[index], t, path)
        error = (oracle.target(x0, decoded[index], t, index=index).double().flatten(1) - truth).norm(dim=1)
        assert (error / conditional.norm(dim=1)).max() < 2e-5

    def test_moments_are_those_of_the_decoded_rows(self, x, affine):
        scale, shift = affine
        bank = DataBank(x, torch.arange(len(x)) % 4, scale, shift)
        seen = (x.double() * scale + shift).flatten(1).numpy()  # scale and shift as float32 have them: to 1e-7
        np.testing.assert_allclose(bank.mean.numpy(), seen.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(bank.covariance().numpy(), np.cov(seen.T, bias=True), rtol=0, atol=1e-6)
        assert bank.rms_norm == pytest.approx(np.sqrt((seen**2).sum(1).mean()), rel=1e-6)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
    def test_takes_little_more_than_the_values(self, dtype, generator):
        """Whatever the bank keeps, the table of indices and the nearest distances included."""
        x = torch.randint(256, (2000, 1, 28, 28), generator=generator, dtype=torch.uint8).to(dtype)
        bank = DataBank(x, torch.arange(2000) % 10, 2 / 255, -1.0)
        measure_nearest(bank)
        least = 2000 * 784 * dtype.itemsize
        assert least < bank.num_bytes < 1.05 * least
        kept = {}
        for value in vars(bank).values():
            if isinstance(value, Tensor):
                kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        assert least < sum(kept.values()) < 1.05 * least

    def test_moves_with_its_scale(self, x):
        bank = DataBank(x, scale=torch.full(SHAPE, 0.5)).to("meta")
        assert bank.rows(torch.tensor([3], device="meta")).device.type == "meta"

    def test_is_not_changed_by_the_caller(self, generator):
        x, scale = stored("uint8", 30, generator), torch.full((3, 1, 1), 0.5)
        bank = DataBank(x, scale=scale)
        before = bank.rows(torch.arange(30))
        x.zero_()
        scale.zero_()
        assert torch.equal(bank.rows(torch.arange(30)), before)

    def test_numbers_become_tensors_of_one_value(self, generator):
        x = stored("uint8", 30, generator)
        one, other = DataBank(x, scale=0.5, shift=2), DataBank(x, scale=torch.tensor(0.5), shift=torch.tensor([2.0]))
        assert torch.equal(one.rows(torch.arange(30)), other.rows(torch.arange(30)))

    def test_queries_may_be_of_any_precision(self, generator, brute_force):
        x = stored("uint8", 100, generator)
        decoded = x.float() / 100 - 1
        t = torch.linspace(0.1, 0.8, 12)
        x_t = LinearPath().interpolate(torch.randn(12, *SHAPE, generator=generator), decoded[:12], t).bfloat16()
        posterior = Oracle(DataBank(x, scale=0.01, shift=-1), LinearPath()).posterior(x_t, t)
        truth = brute_force(x.float() * 0.01 - 1, None, x_t, t, LinearPath())
        assert (posterior.top1 - truth.top1).abs().max() < 1e-5


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

    def test_pixels_without_a_scale(self):
        with pytest.raises(ValueError, match="uint8 rows need the scale and shift"):
            DataBank(torch.ones(3, 2, dtype=torch.uint8))
        with pytest.raises(ValueError, match="uint8 rows need the scale and shift"):
            DataBank(torch.ones(3, 2, dtype=torch.uint8), shift=-1.0)

    @pytest.mark.parametrize(
        ("scale", "shift", "name"),
        [
            (0.0, 0.0, "scale"),
            (float("nan"), 0.0, "scale"),
            (float("inf"), 0.0, "scale"),
            (torch.tensor([1.0, 0.0]), 0.0, "scale"),
            (0.5, float("nan"), "shift"),
            (0.5, -float("inf"), "shift"),
            (0.5, torch.tensor([0.0, float("nan")]), "shift"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_scales_and_shifts_that_make_no_sense(self, scale, shift, name, dtype):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            DataBank(torch.ones(3, 2, dtype=dtype), scale=scale, shift=shift)

    @pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 3, 1)], ids=str)
    def test_scales_and_shifts_of_other_shapes(self, shape):
        x = torch.ones(3, 2, dtype=torch.uint8)
        for given in ({"scale": torch.ones(shape)}, {"scale": 0.5, "shift": torch.ones(shape)}):
            with pytest.raises(ValueError, match="does not fit rows of shape"):
                DataBank(x, **given)

    @pytest.mark.parametrize("name", ["x1", "labels"])
    def test_no_tensor(self, name):
        given = {"x1": torch.zeros(2, 1), "labels": torch.zeros(2).long()}
        with pytest.raises(TypeError, match=f"{name} is a tensor, got ndarray"):
            DataBank(**given | {name: given[name].numpy()})

    def test_rows_whose_norms_overflow(self):
        DataBank(1e15 * torch.eye(4))
        with pytest.raises(ValueError, match="rows are too large.*scale"):
            DataBank(1e25 * torch.eye(4))
        with pytest.raises(ValueError, match="rows are too large.*scale"):
            DataBank(1e19 * torch.eye(4))  # where sums of them do
        with pytest.raises(ValueError, match="rows are too large.*scale"):
            DataBank(1e25 * torch.eye(4), scale=1e-25)  # products are of rows as they are stored

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


class TestSubset:
    @pytest.mark.parametrize("scale", [2 / 255, torch.full((2, 1, 1), 0.01)], ids=["number", "per channel"])
    def test_is_the_bank_of_those_rows(self, scale):
        generator = torch.Generator().manual_seed(0)
        x1 = torch.randint(256, (40, 2, 3, 3), generator=generator, dtype=torch.uint8)
        x1[7] = x1[3]  # of another class: another row
        bank = DataBank(x1, torch.arange(40) % 3, scale, -1.0)
        index = torch.tensor([3, 7, 39, 0, 3])
        part = bank.subset(index)
        assert (part.num_rows, part.num_distinct, part.dtype) == (5, 4, torch.uint8)
        assert torch.equal(part.rows(torch.arange(5)), bank.rows(index))
        assert part.labels_of(torch.arange(5)).tolist() == bank.labels_of(index).tolist()

    def test_of_unlabelled_rows(self):
        part = DataBank(torch.eye(6)).subset(torch.tensor([5, 1]))
        assert torch.equal(part.rows(torch.arange(2)), torch.eye(6)[[5, 1]])
        assert not part.has_labels

    def test_refuses_rows_that_are_not_there(self):
        with pytest.raises((ValueError, IndexError), match="6"):
            DataBank(torch.eye(6)).subset(torch.tensor([6]))
