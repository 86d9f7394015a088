"""Training sets written to files by their own libraries, and read back; files that nothing may be read from."""

import json
import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fm_stages.data import FashionMNIST, ImageFolder, Rows, read_rows, rows, stored_rows
from fm_stages.oracle import DataBank


def bank_of(read: Rows) -> DataBank:
    return DataBank(read.x1, read.labels, read.scale, read.shift)


def seen(read: Rows) -> torch.Tensor:
    """What the network sees of the rows, in their order."""
    bank = bank_of(read)
    return bank.rows(torch.arange(len(bank)))


def pixels(num: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, 1, 4, 4), dtype=np.uint8)


class Evil:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class TestArray:
    def test_pixels_of_a_data_set_make_its_bank(self, tmp_path):
        data = FashionMNIST(num_train=300, batch_size=10)
        try:
            bank = data.bank()
        except FileNotFoundError:
            pytest.skip("no Fashion-MNIST files: set FM_STAGES_DATA to the folder that has them")
        images = data._ready().train.images.numpy()
        np.save(tmp_path / "fashion.npy", images)
        np.save(tmp_path / "fashion_labels.npy", data._ready().train.labels.numpy().astype(np.uint8))
        read = read_rows(tmp_path / "fashion.npy")
        assert read.x1.dtype == torch.uint8
        every = torch.arange(300)
        assert torch.equal(bank_of(read).rows(every), bank.rows(every))
        assert torch.equal(bank_of(read).labels_of(every), bank.labels_of(every))
        flat = Rows(read.x1.flatten(1), *read[1:])
        np.save(tmp_path / "flat.npy", images.reshape(300, -1))
        assert torch.equal(seen(read_rows(str(tmp_path / "flat.npy"))), seen(flat))

    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [("f2", torch.float16), ("f4", torch.float32), ("f8", torch.float32), (">f4", torch.float32)],
    )
    def test_floats_are_taken_as_they_are(self, tmp_path, dtype, kept):
        values = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(dtype)
        np.save(tmp_path / "x.npy", np.asfortranarray(values))
        read = read_rows(tmp_path / "x.npy")
        assert read.x1.dtype == kept
        assert (read.labels, read.scale, read.shift, read.class_names) == (None, 1, 0, [])
        assert np.array_equal(read.x1.numpy(), values.astype(np.float32).astype(read.x1.numpy().dtype))

    def test_many_pieces_are_put_in_order(self, tmp_path):
        values = np.arange(2 * stored_rows.PIECE + 5, dtype=np.float32)[:, None]
        np.save(tmp_path / "x.npy", values)
        assert np.array_equal(read_rows(tmp_path / "x.npy").x1.numpy(), values)

    @pytest.mark.parametrize(
        ("array", "complaint"),
        [
            (np.zeros((3, 2), np.int32), "holds int32: rows are uint8"),
            (np.zeros((3, 2), np.int8), "holds int8: rows are uint8"),
            (np.zeros((3, 2), np.uint16), "holds uint16: rows are uint8"),
            (np.zeros((3, 2), bool), "holds bool: rows are uint8"),
            (np.zeros((3, 2), np.complex64), "holds complex64: rows are uint8"),
            (np.zeros((3, 2), np.longdouble), "holds (float128|longdouble): rows are uint8"),
            (np.array([["a"]]), "holds str32: rows are uint8"),
            (np.zeros(3, [("a", "f4")]), "holds void32: rows are uint8"),
            (np.float32(3), r"shape \(\): need \(N, ...\)"),
            (np.zeros(3, np.float32), r"shape \(3,\): need \(N, ...\)"),
            (np.zeros((0, 3), np.float32), r"shape \(0, 3\): need \(N, ...\)"),
            (np.zeros((3, 0), np.float32), r"shape \(3, 0\): need \(N, ...\)"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, array, complaint):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=f"x.npy holds .*{complaint.removeprefix('holds ')}"):
            read_rows(tmp_path / "x.npy")

    @pytest.mark.parametrize(
        ("labels", "complaint"),
        [
            (np.zeros(19, np.int64), r"each of 20 rows, got int64 of shape \(19,\)"),
            (np.zeros((20, 1), np.int64), r"each of 20 rows, got int64 of shape \(20, 1\)"),
            (np.zeros(20, np.float32), "holds float32: labels are integers"),
            (np.zeros(20, bool), "holds bool: labels are integers"),
            (np.full(20, -1), "count classes from 0, got -1"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, tmp_path, labels, complaint):
        np.save(tmp_path / "x.npy", pixels())
        np.save(tmp_path / "x_labels.npy", labels)
        with pytest.raises(ValueError, match=f"x_labels.npy.*{complaint}"):
            read_rows(tmp_path / "x.npy")

    @pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"words " * 30])
    def test_damaged_files_are_named(self, tmp_path, content):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*x\.npy"):
            read_rows(tmp_path / "x.npy")

    def test_a_file_cut_short_is_named(self, tmp_path):
        np.save(tmp_path / "x.npy", pixels())
        (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"cannot read .*x\.npy"):
            read_rows(tmp_path / "x.npy")


class TestNothingIsUnpickled:
    @pytest.fixture
    def trace(self, tmp_path) -> Path:
        return tmp_path / "executed"

    def test_the_trap_works(self, trace):
        pickle.loads(pickle.dumps(Evil(trace)))
        assert trace.exists()

    @pytest.mark.parametrize("name", ["x.npy", "x_labels.npy"])
    @pytest.mark.parametrize("as_array", [True, False])
    def test_arrays(self, tmp_path, trace, name, as_array):
        np.save(tmp_path / "x.npy", pixels())
        if as_array:
            np.save(tmp_path / name, np.array([[Evil(trace)]] * 20, dtype=object), allow_pickle=True)
        else:
            (tmp_path / name).write_bytes(pickle.dumps(Evil(trace)))
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            read_rows(tmp_path / "x.npy")
        assert not trace.exists()

    def test_a_file_of_a_folder(self, tmp_path, trace):
        np.save(tmp_path / "a.npy", pixels()[0])
        np.save(tmp_path / "b.npy", np.array([Evil(trace)], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"cannot read .*b\.npy"):
            read_rows(tmp_path)
        assert not trace.exists()

    def test_statistics(self, tmp_path, trace):
        save_file({"latents": torch.zeros(3, 2, 4, 4)}, tmp_path / "x.safetensors")
        torch.save({"mean": Evil(trace), "std": Evil(trace)}, tmp_path / "latents_stats.pt")
        with pytest.raises(ValueError, match=r"cannot read .*latents_stats.pt") as caught:
            read_rows(tmp_path)
        assert "\n" not in str(caught.value)
        assert not trace.exists()

    def test_a_file_of_torch(self, tmp_path, trace):
        torch.save(Evil(trace), tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x.pt is of no kind that can be read: give a .npy"):
            read_rows(tmp_path / "x.pt")
        assert not trace.exists()


def latents(num: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num, 2, 3, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestSafetensors:
    @pytest.mark.parametrize("name", ["latents", "images", "x1", "anything"])
    def test_the_tensor_of_rows_is_found(self, tmp_path, name):
        save_file({name: latents(), "labels": torch.arange(6)}, tmp_path / "x.safetensors")
        read = read_rows(tmp_path / "x.safetensors")
        assert torch.equal(read.x1, latents())
        assert read.labels.tolist() == [0, 1, 2, 3, 4, 5]
        assert read.labels.dtype == torch.int64

    def test_a_known_name_comes_before_others(self, tmp_path):
        save_file({"other": latents(4), "latents": latents()}, tmp_path / "x.safetensors")
        assert torch.equal(read_rows(tmp_path / "x.safetensors").x1, latents())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_dtypes(self, tmp_path, dtype):
        save_file({"latents": latents(dtype=dtype)}, tmp_path / "x.safetensors")
        read = read_rows(tmp_path / "x.safetensors")
        assert read.x1.dtype == (torch.float32 if dtype == torch.float64 else dtype)
        assert torch.equal(read.x1, latents(dtype=dtype).to(read.x1.dtype))
        assert (read.labels, read.scale, read.shift) == (None, 1, 0)

    def test_pixels_are_seen_as_pixels(self, tmp_path):
        save_file({"images": torch.from_numpy(pixels())}, tmp_path / "x.safetensors")
        np.save(tmp_path / "x.npy", pixels())
        assert torch.equal(seen(read_rows(tmp_path / "x.safetensors")), seen(read_rows(tmp_path / "x.npy")))

    def test_flips_are_rows_after_the_others(self, tmp_path):
        labels = torch.tensor([3, 1, 4, 1, 5, 9])
        held = {"latents": latents(), "latents_flip": latents(seed=1), "labels": labels.int()}
        save_file(held, tmp_path / "x.safetensors")
        read = read_rows(tmp_path / "x.safetensors")
        assert torch.equal(read.x1, torch.cat([latents(), latents(seed=1)]))
        assert torch.equal(read.labels, labels.repeat(2))

    @pytest.mark.parametrize(
        ("held", "complaint"),
        [
            ({"a": latents(), "b": latents()}, "holds a, b: call the one tensor that holds the rows latents"),
            ({"latents": latents(), "images": latents()}, "holds images, latents: call the one"),
            ({"labels": torch.arange(6)}, "holds labels: call the one"),
            ({}, "holds no tensor: call the one"),
            ({"x1": torch.zeros(6, 2, dtype=torch.int64)}, "holds int64: rows are uint8"),
            ({"x1": torch.zeros(6, 2, dtype=torch.complex64)}, "holds complex64: rows are uint8"),
            ({"x1": torch.zeros(6)}, r"shape \(6,\): need \(N, ...\)"),
            ({"x1": torch.zeros(0, 3)}, r"shape \(0, 3\): need \(N, ...\)"),
            ({"latents": latents(), "latents_flip": latents(5)}, r"latents_flip of torch.float32 and shape \(5, 2"),
            ({"latents": latents(), "latents_flip": latents().half()}, "latents_flip of torch.float16"),
            ({"latents": latents(), "labels": torch.arange(5)}, r"each of 6 rows, got int64 of shape \(5,\)"),
            ({"latents": latents(), "labels": torch.zeros(6)}, "each of 6 rows, got float32"),
            ({"latents": latents(), "labels": torch.full((6,), -1)}, "count classes from 0, got -1"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, held, complaint):
        save_file(held, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"x.safetensors.*{complaint}"):
            read_rows(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("content", [b"", b"words " * 30, (2**60).to_bytes(8, "little") + b"{}"])
    def test_damaged_files_are_named(self, tmp_path, content):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*x\.safetensors"):
            read_rows(tmp_path / "x.safetensors")


def write_shards(folder: Path, num: int, ranks: int, per_shard: int = 3, labels: torch.Tensor | None = None) -> None:
    """Items 0..num-1 as LightningDiT's ranks write them: dealt in turn, the first ones again until all have as many.

    The values of item i are i + 0.25, of its flip i + 0.5; of one that is repeated 1000 more: it is encoded anew.
    """
    folder.mkdir(exist_ok=True)
    padded = torch.arange(-(-num // ranks) * ranks)
    for rank in range(ranks):
        for shard, items in enumerate(padded[rank::ranks].split(per_shard)):
            value = (items % num + 1000.0 * (items >= num)).view(-1, 1, 1, 1).expand(-1, 2, 2, 2)
            held = {"latents": value + 0.25, "latents_flip": value + 0.5}
            if labels is not None:
                held["labels"] = labels[items % num]
            header = {"total_size": str(len(items)), "dtype": "torch.float32", "device": "cpu"}
            save_file(held, folder / f"latents_rank{rank:02d}_shard{shard:03d}.safetensors", header)


class TestShards:
    def test_every_item_and_its_flip_once(self, tmp_path):
        labels = torch.arange(22) // 4
        write_shards(tmp_path, 22, ranks=4, labels=labels)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = read_rows(tmp_path)
        values = read.x1[:, 0, 0, 0]
        assert (read.x1 == values.view(-1, 1, 1, 1)).all()
        assert sorted(values.tolist()) == sorted([i + 0.25 for i in range(22)] + [i + 0.5 for i in range(22)])
        by_rank = [i + 0.25 for rank in range(4) for i in range(rank, 22, 4)]
        assert values[:22].tolist() == by_rank
        assert torch.equal(read.labels, labels[values.floor().long()])

    @pytest.mark.parametrize(("num", "ranks"), [(20, 4), (21, 1), (9, 3), (21, 4), (22, 4), (23, 4), (9, 8), (31, 16)])
    def test_repeated_rows_are_left_out(self, tmp_path, num, ranks):
        write_shards(tmp_path, num, ranks, labels=torch.arange(num) // 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = read_rows(tmp_path).x1[:, 0, 0, 0]
        assert sorted(values[:num].floor().tolist()) == list(range(num))
        assert len(values) == 2 * num

    @pytest.mark.parametrize(
        "labels",
        [None, torch.zeros(22, dtype=torch.int64), torch.arange(22) % 5],
        ids=["without labels", "one class", "in no order"],
    )
    def test_without_a_sign_all_rows_are_taken_with_a_warning(self, tmp_path, labels):
        write_shards(tmp_path, 22, ranks=4, labels=labels)
        with pytest.warns(UserWarning, match="4 ranks wrote .* up to 3 of 24 rows"):
            read = read_rows(tmp_path)
        assert len(read.x1) == 48

    def test_a_missing_shard_is_warned_of(self, tmp_path):
        write_shards(tmp_path, 22, ranks=4, labels=torch.arange(22) // 4)
        (tmp_path / "latents_rank02_shard001.safetensors").unlink()
        with pytest.warns(UserWarning, match="its 4 ranks hold 3 to 6 rows, .* a shard is missing"):
            assert len(read_rows(tmp_path).x1) == 2 * 21

    def test_other_names_are_files_one_after_another(self, tmp_path):
        for name, seed in (("b", 1), ("a", 0)):
            save_file({"x1": latents(seed=seed)}, tmp_path / f"{name}.safetensors")
        assert torch.equal(read_rows(tmp_path).x1, torch.cat([latents(), latents(seed=1)]))

    @pytest.mark.parametrize("leading", [1, None])
    @pytest.mark.parametrize("single", [True, False])
    def test_statistics_normalise(self, tmp_path, leading, single):
        x = latents(64) * 3 + 5
        mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
        save_file({"latents": x}, tmp_path / "x.safetensors")
        stats = {"mean": mean, "std": std} if leading else {"mean": mean[0], "std": std[0]}
        torch.save(stats, tmp_path / "latents_stats.pt")
        read = read_rows(tmp_path / "x.safetensors" if single else tmp_path)
        assert torch.equal(read.x1, x)
        assert read.scale.dtype == read.shift.dtype == torch.float32
        assert (seen(read) - (x - mean) / std).abs().max() < 1e-6

    @pytest.mark.parametrize(
        ("stats", "complaint"),
        [
            ({"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 2, 1, 1)}, r"mean of shape \(3, 1, 1\) does not"),
            ({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(5, 2, 1, 1)}, r"std of shape \(5, 2, 1, 1\) does not"),
            ({"mean": torch.zeros(1, 2, 1, 1), "std": torch.zeros(1, 2, 1, 1)}, "std above 0 .*: 0"),
            ({"mean": torch.full((1, 2, 1, 1), torch.nan), "std": torch.ones(1, 2, 1, 1)}, "must be finite"),
            ({"mean": torch.zeros(1, 2, 1, 1)}, "need torch.save of two tensors"),
            ({"mean": 0.0, "std": 1.0}, "need torch.save of two tensors"),
            (torch.zeros(3), "need torch.save of two tensors"),
        ],
    )
    def test_statistics_that_do_not_fit_are_refused(self, tmp_path, stats, complaint):
        save_file({"latents": latents()}, tmp_path / "x.safetensors")
        torch.save(stats, tmp_path / "latents_stats.pt")
        with pytest.raises(ValueError, match=f"latents_stats.pt.*{complaint}"):
            read_rows(tmp_path)

    @pytest.mark.parametrize(
        ("other", "complaint"),
        [
            ({"latents": latents(), "labels": torch.arange(6)}, "only one of .*a.safetensors and .*b.* has labels"),
            ({"latents": latents(), "latents_flip": latents()}, "has latents_flip"),
            ({"x1": latents()}, "has latents"),
            ({"latents": latents().half()}, r"b.safetensors holds latents of torch.float16"),
            ({"latents": latents()[:, :1].contiguous()}, r"b.safetensors holds latents of .* shape \(6, 1, 3, 3\)"),
        ],
    )
    def test_shards_that_differ_are_refused(self, tmp_path, other, complaint):
        save_file({"latents": latents()}, tmp_path / "a.safetensors")
        save_file(other, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=complaint):
            read_rows(tmp_path)

    def test_shards_that_lie_deeper_are_not_searched(self, tmp_path):
        for split in ("imagenet_train_256", "imagenet_val_256"):
            write_shards(tmp_path / split, 8, ranks=1)
        with pytest.raises(ValueError, match="imagenet_train_256/.* lies deeper .* give the folder"):
            read_rows(tmp_path)


def write_latent_files(folder: Path, num: int = 5) -> np.ndarray:
    """SpeedrunDiT's layout, two files to a folder."""
    values = np.random.default_rng(0).normal(size=(num, 4, 2, 2)).astype(np.float32)
    for i, value in enumerate(values):
        (folder / f"{i // 2:05d}").mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i // 2:05d}" / f"img-latents-{i:08d}.npy", value)
    return values


def listed(num: int = 5, label=lambda i: i % 3) -> list:
    return [[f"{i // 2:05d}/img-latents-{i:08d}.npy", label(i)] for i in reversed(range(num))]


class TestLatentFiles:
    def test_rows_and_labels(self, tmp_path):
        values = write_latent_files(tmp_path)
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": listed()}))
        read = read_rows(tmp_path)
        assert np.array_equal(read.x1.numpy(), values)
        assert read.labels.tolist() == [0, 1, 2, 0, 1]
        normal = values.astype(np.float64)
        normal = (normal - normal.mean((0, 2, 3), keepdims=True)) / normal.std((0, 2, 3), keepdims=True)
        assert np.abs(seen(read).numpy() - normal).max() < 1e-6

    @pytest.mark.parametrize(
        "labels", [None, [], [None] * 5, listed(label=lambda i: None), "no file"], ids=lambda labels: str(labels)[:12]
    )
    def test_without_labels(self, tmp_path, labels):
        write_latent_files(tmp_path)
        if labels != "no file":
            (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        assert read_rows(tmp_path).labels is None

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (json.dumps({"labels": listed(4)}), "00002/img-latents-00000004.npy the label None"),
            (json.dumps({"labels": listed(label=lambda i: i or None)}), "00000000.npy the label None"),
            (json.dumps({"labels": listed(label=lambda i: [0, 1])}), r"the label \[0, 1\]"),
            (json.dumps({"labels": listed(label=lambda i: 0.5)}), "the label 0.5"),
            (json.dumps({"labels": listed(label=lambda i: True)}), "the label True"),
            (json.dumps({"labels": listed(label=lambda i: -1)}), "count classes from 0, got -1"),
            (json.dumps({"labels": 3}), "need {"),
            (json.dumps({"labels": [1, 2]}), "need {"),
            (json.dumps([1]), "need {"),
            (json.dumps({}), "need {"),
            ("{", "need {"),
        ],
    )
    def test_labels_that_do_not_fit_are_refused(self, tmp_path, content, complaint):
        write_latent_files(tmp_path)
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=f"dataset.json.*{complaint}"):
            read_rows(tmp_path)

    @pytest.mark.parametrize(
        ("row", "complaint"),
        [
            (np.zeros((4, 2, 3), np.float32), r"img-latents-x.npy holds float32 of shape \(4, 2, 3\)"),
            (np.zeros((4, 2, 2), np.float16), "img-latents-x.npy holds float16"),
        ],
    )
    def test_a_row_unlike_the_others_is_named(self, tmp_path, row, complaint):
        write_latent_files(tmp_path)
        np.save(tmp_path / "img-latents-x.npy", row)
        with pytest.raises(ValueError, match=complaint):
            read_rows(tmp_path)

    @pytest.mark.parametrize("row", [np.float32(1), np.zeros((0, 2), np.float32), np.zeros(3, np.int64)])
    def test_what_is_no_row_is_refused(self, tmp_path, row):
        for name in "ab":
            np.save(tmp_path / f"{name}.npy", row)
        with pytest.raises(ValueError, match=r"a\.npy holds"):
            read_rows(tmp_path)

    def test_moments_are_refused(self, tmp_path):
        for name in ("img-mean-std-00000008.npy", "img-mean-std-00000009.npy"):
            np.save(tmp_path / name, np.zeros((8, 2, 2), np.float32))
        with pytest.raises(ValueError, match=f"{tmp_path.name} holds moments, .* mixture of Gaussians"):
            read_rows(tmp_path, num_rows=1)
        with pytest.raises(ValueError, match="img-mean-std-00000009.npy .* give the folder"):
            read_rows(tmp_path / "img-mean-std-00000009.npy")
        np.save(tmp_path / "img-latents-00000000.npy", np.zeros((4, 2, 2), np.float32))
        with pytest.raises(ValueError, match="only one of .*img-latents.* and img-mean-std-00000008.npy holds moments"):
            read_rows(tmp_path)

    @pytest.mark.parametrize("with_labels", [True, False])
    def test_a_folder_around_one_array_is_not_one_row(self, tmp_path, with_labels):
        np.save(tmp_path / "x.npy", pixels())
        if with_labels:
            np.save(tmp_path / "x_labels.npy", np.zeros(20, np.int64))
        with pytest.raises(ValueError, match=r"each .npy file is one row; .* give its path, as .*x.npy"):
            read_rows(tmp_path)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_image(file: Path, colour: tuple[int, int, int] | int, size: tuple[int, int] = (8, 8)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(file)


def colours(read: Rows) -> list[list[int]]:
    return read.x1[:, :, 0, 0].tolist()


class TestImages:
    def test_class_folders_with_nothing_held_out(self, tmp_path):
        for i in range(4):
            write_image(tmp_path / "cat" / f"{i}.png", (i, 0, 9))
            write_image(tmp_path / "dog" / "deeper" / f"{i}.png", (i, 1, 9))
        read = read_rows(tmp_path)
        assert colours(read) == [[i % 4, i // 4, 9] for i in range(8)]
        assert read.labels.tolist() == [0] * 4 + [1] * 4
        assert read.class_names == ["cat", "dog"]
        assert read.x1.shape == (8, 3, 8, 8)

    def test_the_network_sees_the_rows_of_an_image_folder(self, tmp_path):
        generator = np.random.default_rng(0)
        for i in range(6):
            for split in ("train", "val"):
                file = tmp_path / split / "ab"[i % 2] / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(file)
        read = read_rows(tmp_path, image_size=8)
        bank = ImageFolder(str(tmp_path), image_size=8, batch_size=2).bank()
        assert torch.equal(seen(read), bank.rows(torch.arange(6)))
        assert torch.equal(read.labels, bank.labels_of(torch.arange(6)))

    def test_a_class_may_be_called_train(self, tmp_path):
        for name in ("plane", "train"):
            write_image(tmp_path / name / "a.png", BLUE)
        assert read_rows(tmp_path).class_names == ["plane", "train"]

    def test_a_flat_folder_has_no_labels(self, tmp_path):
        for i in range(3):
            write_image(tmp_path / f"{i}.png", (i, i, 0))
        read = read_rows(tmp_path)
        assert (read.labels, read.class_names) == (None, [])
        assert colours(read) == [[0, 0, 0], [1, 1, 0], [2, 2, 0]]

    def test_grey_files_are_the_array_of_their_pixels(self, tmp_path):
        for i, image in enumerate(pixels()):
            Image.fromarray(image[0]).save(tmp_path / f"{i:02d}.png")
        np.save(tmp_path.with_suffix(".npy"), pixels())
        assert torch.equal(seen(read_rows(tmp_path)), seen(read_rows(tmp_path.with_suffix(".npy"))))
        Image.new("1", (4, 4), 1).save(tmp_path / "99.png")
        assert read_rows(tmp_path).x1.shape == (21, 1, 4, 4)
        assert (read_rows(tmp_path).x1[-1] == 255).all()

    @pytest.mark.parametrize("image_size", [None, 8])
    def test_one_colour_file_makes_all_rgb(self, tmp_path, image_size):
        for i in range(5):
            write_image(tmp_path / f"{i}.png", i)
        write_image(tmp_path / "2.png", RED)
        read = read_rows(tmp_path, image_size)
        assert colours(read) == [list(RED) if i == 2 else [i, i, i] for i in range(5)]
        parts = [read_rows(tmp_path, image_size, num_rows=1, seed=seed).x1 for seed in range(9)]
        assert {part.shape for part in parts} == {(1, 3, 8, 8)}  # whatever is drawn

    def test_sizes_that_differ_are_named(self, tmp_path):
        for i, size in enumerate([(8, 8), (20, 12), (9, 30), (8, 8)]):
            write_image(tmp_path / f"{i}.png", BLUE, size)
        with pytest.raises(ValueError, match="images of 8x8, 9x30, 20x12: give --image_size"):
            read_rows(tmp_path)
        assert read_rows(tmp_path, image_size=4).x1.shape == (4, 3, 4, 4)

    def test_many_sizes_are_named_in_part(self, tmp_path):
        for i in range(6):
            write_image(tmp_path / f"{i}.png", BLUE, (i + 1, 8))
        with pytest.raises(ValueError, match=r"images of 1x8, 2x8, 3x8, 4x8, \.\.\.: give"):
            read_rows(tmp_path)

    def test_oblong_images_need_a_size(self, tmp_path):
        write_image(tmp_path / "a.png", BLUE, (20, 12))
        with pytest.raises(ValueError, match="images of 20x12: give --image_size"):
            read_rows(tmp_path)

    @pytest.mark.parametrize("image_size", [None, 4])
    def test_a_damaged_image_is_named(self, tmp_path, image_size):
        write_image(tmp_path / "a.png", BLUE)
        (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
        with pytest.raises(ValueError, match=r"cannot read the image .*b\.png"):
            read_rows(tmp_path, image_size)

    def test_only_chosen_images_are_decoded(self, tmp_path):
        for i in range(8):
            write_image(tmp_path / f"{i}.png", (i, 0, 0))
        chosen = [colour[0] for colour in colours(read_rows(tmp_path, num_rows=3))]
        for i in {*range(8)} - {*chosen}:
            whole = (tmp_path / f"{i}.png").read_bytes()
            (tmp_path / f"{i}.png").write_bytes(whole[:45])  # the header is left
        assert [colour[0] for colour in colours(read_rows(tmp_path, num_rows=3))] == chosen
        with pytest.raises(ValueError, match="cannot read the image"):
            read_rows(tmp_path)

    def test_images_beside_class_folders_are_refused(self, tmp_path):
        write_image(tmp_path / "a.png", BLUE)
        write_image(tmp_path / "rejected" / "b.png", BLUE)
        with pytest.raises(ValueError, match="1 images beside folders of images"):
            read_rows(tmp_path)

    def test_an_empty_class_is_named(self, tmp_path):
        write_image(tmp_path / "cat" / "a.png", BLUE)
        (tmp_path / "fish").mkdir()
        with pytest.raises(FileNotFoundError, match="classes fish.*Remove the class folders that hold no image"):
            read_rows(tmp_path)


def as_array(path: Path) -> Path:
    np.save(path / "x.npy", np.arange(30, dtype=np.float32).repeat(4).reshape(30, 4))
    np.save(path / "x_labels.npy", np.arange(30))
    return path / "x.npy"


def as_tensors(path: Path) -> Path:
    values = torch.arange(30.0).view(30, 1).repeat(1, 4)
    held = {"latents": values[:15].clone(), "latents_flip": values[15:].clone(), "labels": torch.arange(15)}
    save_file(held, path / "x.safetensors")
    return path / "x.safetensors"


def as_shards(path: Path) -> Path:
    for i, values in enumerate(torch.arange(30).split(4)):
        held = {"latents": values.view(-1, 1).repeat(1, 4).float(), "labels": values}
        save_file(held, path / f"latents_rank00_shard{i:03d}.safetensors")
    return path


def as_latent_files(path: Path) -> Path:
    for i in range(30):
        np.save(path / f"{i:02d}.npy", np.full(4, i, np.float32))
    (path / "dataset.json").write_text(json.dumps({"labels": [[f"{i:02d}.npy", i] for i in range(30)]}))
    return path


def as_images(path: Path) -> Path:
    for i in range(30):
        write_image(path / f"{i:02d}" / "a.png", i, (2, 2))
    return path


class TestNumRows:
    @pytest.mark.parametrize("write", [as_array, as_tensors, as_shards, as_latent_files, as_images])
    def test_a_random_part_of_every_kind(self, tmp_path, write):
        path = write(tmp_path)
        modulus = 15 if write is as_tensors else 30
        draws = {}
        for seed in (0, 1):
            read = read_rows(path, num_rows=11, seed=seed)
            draws[seed] = [int(row.flatten()[0]) for row in read.x1]
            assert len(set(draws[seed])) == 11
            assert draws[seed] == sorted(draws[seed])
            assert read.labels.tolist() == [value % modulus for value in draws[seed]]
            assert torch.equal(read.x1, read_rows(path).x1[draws[seed]])
        assert draws[0] != draws[1]
        assert torch.equal(read_rows(path, num_rows=30).x1, read_rows(path).x1)

    def test_the_same_part_of_every_kind(self, tmp_path):
        drawn = set()
        for number, write in enumerate([as_array, as_tensors, as_shards, as_latent_files, as_images]):
            (tmp_path / str(number)).mkdir()
            read = read_rows(write(tmp_path / str(number)), num_rows=7)
            drawn.add(tuple(int(row.flatten()[0]) for row in read.x1))
        assert len(drawn) == 1

    def test_each_row_is_drawn_equally_often(self, tmp_path):
        np.save(tmp_path / "x.npy", np.arange(10, dtype=np.float32)[:, None])
        counts = torch.zeros(10)
        for seed in range(400):
            counts[read_rows(tmp_path / "x.npy", num_rows=3, seed=seed).x1.flatten().long()] += 1
        assert (counts - 120).abs().max() < 4.5 * (400 * 0.3 * 0.7) ** 0.5

    def test_more_than_there_are_raises(self, tmp_path):
        with pytest.raises(ValueError, match=r"--rows 31 is more than the 30 rows of .*x\.safetensors"):
            read_rows(as_tensors(tmp_path), num_rows=31)

    @pytest.mark.parametrize("arguments", [{"num_rows": 0}, {"num_rows": -3}, {"image_size": 0}])
    def test_less_than_one_raises(self, tmp_path, arguments):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"--{name.removeprefix('num_')} {value} must be 1 or more"):
            read_rows(as_images(tmp_path), **arguments)

    def test_more_than_the_memory_raises_before_reading(self, tmp_path, monkeypatch):
        path = as_array(tmp_path)
        monkeypatch.setattr(rows, "available_memory_bytes", lambda: 2 * 20 * 4 * 4)
        assert len(read_rows(path, num_rows=20).x1) == 20
        with pytest.raises(MemoryError, match=r"21 rows of shape \(4,\) .* --rows"):
            read_rows(path, num_rows=21)


class TestPath:
    def test_a_missing_path_is_named_with_what_is_accepted(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere: give a .npy or .safetensors file, a folder of images"):
            read_rows(tmp_path / "nowhere")

    @pytest.mark.parametrize("name", ["x.npz", "x.txt", "x"])
    def test_other_files_are_refused(self, tmp_path, name):
        (tmp_path / name).write_text("words")
        with pytest.raises(ValueError, match=f"{name} is of no kind that can be read: give a .npy"):
            read_rows(tmp_path / name)

    def test_an_empty_folder_is_refused(self, tmp_path):
        (tmp_path / "readme.txt").write_text("words")
        with pytest.raises(ValueError, match="holds nothing that can be read: give a .npy"):
            read_rows(tmp_path)

    @pytest.mark.parametrize(
        ("kinds", "complaint"),
        [
            ((as_images, as_shards), "images and .safetensors files"),
            ((as_images, as_latent_files), "images and .npy files"),
            ((as_shards, as_latent_files), ".safetensors files and .npy files"),
        ],
    )
    def test_a_folder_of_two_kinds_is_refused(self, tmp_path, kinds, complaint):
        for write in kinds:
            write(tmp_path)
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} holds {complaint}: give a .npy"):
            read_rows(tmp_path)

    @pytest.mark.parametrize("write", [as_array, as_tensors, as_shards, as_latent_files])
    def test_an_image_size_is_for_images(self, tmp_path, write):
        with pytest.raises(ValueError, match=r"--image_size is for a folder of images; .* of shape \(4,\)"):
            read_rows(write(tmp_path), image_size=8)
