"""Training sets of latents in every layout: batches and bank hold the files' numbers, and each other's, bit for bit."""

import errno
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fm_stages.data import Latents, load_vae, normalisation, pictures_of, read_rows, shared_memory
from fm_stages.oracle import DataBank, GaussianMixtureBank
from tests.data import latent_folders as folders
from tests.data.latent_folders import NUM, NUM_CLASSES, SHAPE, values

CHANNELS = (0, 2, 3)


def batches_of(data: Latents, epoch: int = 0) -> list[dict]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def check_against_bank(data: Latents) -> None:
    """Every batch of four epochs holds the bank's rows, with their labels."""
    bank = data.bank()
    for epoch in range(4):
        for batch in batches_of(data, epoch):
            assert torch.equal(bank.rows(batch["index"]), batch["x1"])
            assert torch.equal(bank.labels_of(batch["index"]), batch["labels"])


def own_images(data: Latents) -> torch.Tensor:
    """Which of the files' images are trained on."""
    return data._ready().train.own


def expected_rows(raw: torch.Tensor, all_rows: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std of each channel over all rows, in float64."""
    mean, std = all_rows.double().mean(CHANNELS, keepdim=True), all_rows.double().std(CHANNELS, False, keepdim=True)
    return (raw.double() - mean) / std


class TestLayouts:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_a_folder_with_an_index(self, tmp_path, dtype):
        folders.write_indexed(tmp_path, dtype=dtype)
        data = Latents(str(tmp_path), batch_size=8, val_fraction=0.2)
        bank = data.bank()
        assert (data.shape, data.num_classes, data.class_names) == (SHAPE, NUM_CLASSES, ["cat", "dog", "fox"])
        assert data.num_train + data.num_val == NUM
        assert (len(bank), bank.dtype) == (2 * data.num_train, dtype)
        images = [values(name).to(dtype) for name in folders.NAMES]
        own = own_images(data)
        wanted = expected_rows(torch.cat([x[own] for x in images]), torch.cat(images))
        assert (bank.rows(torch.arange(len(bank))) - wanted).abs().max() < 3e-6
        assert torch.equal(bank.labels_of(torch.arange(len(bank))), folders.labels()[own].repeat(2))
        check_against_bank(data)

    def test_lightningdits_shards_without_the_padded_rows(self, tmp_path):
        image = folders.write_lightning(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data = Latents(str(tmp_path), batch_size=8, normalisation="none")
            bank = data.bank()
        own = image[own_images(data)]
        assert data.num_train + data.num_val == NUM
        assert torch.equal(bank.rows(torch.arange(len(bank))), torch.cat([values(name)[own] for name in folders.NAMES]))
        assert torch.equal(bank.labels_of(torch.arange(len(own))), folders.labels()[own])
        assert data.class_names == ["0", "1", "2"]
        check_against_bank(data)

    @pytest.mark.parametrize("name", ["folder", "dataset.zip"])
    def test_one_latent_for_each_file(self, tmp_path, name):
        folders.write_files(tmp_path / name, moments=False)
        data = Latents(str(tmp_path / name), batch_size=8, flip=False, normalisation="none", multiplier=0.3099)
        x1 = data.bank().rows(torch.arange(data.num_train))
        assert torch.equal(x1, values("latents")[own_images(data)] * 0.3099)
        check_against_bank(data)

    def test_without_labels(self, tmp_path):
        folders.write_files(tmp_path, moments=False)
        (tmp_path / "dataset.json").unlink()
        data = Latents(str(tmp_path), batch_size=8, flip=False)
        assert not data.bank().has_labels
        assert (data.num_classes, data.class_names) == (0, [])
        assert all((batch["labels"] == -1).all() for batch in batches_of(data))
        check_against_bank(data)

    def test_without_flips_the_bank_has_the_images_alone(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), batch_size=8, flip=False)
        assert len(data.bank()) == data.num_train
        check_against_bank(data)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_held_out_rows_of_their_own_folder(self, tmp_path, num_workers):
        folders.write_indexed(tmp_path / "train")
        folders.write_indexed(tmp_path / "val", num=11, seed=3)
        data = Latents(str(tmp_path / "train"), str(tmp_path / "val"), val_batch_size=4, num_workers=num_workers)
        data.setup()
        assert (data.num_train, data.num_val) == (NUM, 11)
        x1 = torch.cat([batch["x1"] for batch in data.val_dataloader()])
        all_rows = torch.cat([values(name) for name in folders.NAMES])
        expected = expected_rows(values("latents", 11, 3), all_rows)
        away = torch.cdist(x1.double().flatten(1), expected.flatten(1))
        assert away.min(1).values.max() < 1e-5
        assert sorted(away.argmin(1).tolist()) == list(range(11))
        assert all("index" not in batch for batch in data.val_dataloader())

    def test_a_part_of_the_held_out_rows_is_like_all_of_them(self, tmp_path):
        """Files come class by class, and validation may stop after some batches."""
        folders.write_indexed(tmp_path / "train")
        folders.write_indexed(tmp_path / "val", num=120, seed=3)
        data = Latents(str(tmp_path / "train"), str(tmp_path / "val"), val_batch_size=40)
        data.setup()
        labels = [batch["labels"] for batch in data.val_dataloader()]
        assert labels[0].unique().equal(torch.cat(labels).unique())

    def test_held_out_rows_are_not_in_the_bank(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), batch_size=8, val_fraction=0.3)
        bank = data.bank().rows(torch.arange(len(data.bank()))).flatten(1)
        held_out = torch.cat([batch["x1"] for batch in data.val_dataloader()]).flatten(1)
        assert torch.cdist(held_out, bank).min() > 1
        labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
        assert labels.bincount().tolist() == [round(0.3 * n) for n in folders.labels().bincount().tolist()]

    def test_the_rows_go_to_another_process(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), batch_size=8)
        train = data._ready().train
        sent = pickle.dumps(train)
        assert len(sent) < 20_000  # the files' names, and no latents
        index = torch.tensor([3, 50, 0])
        assert torch.equal(pickle.loads(sent).stored(index), train.stored(index))


class TestResidency:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_batches_are_the_same_bit_for_bit(self, tmp_path, dtype):
        folders.write_indexed(tmp_path, dtype=dtype)
        disk, ram, device = (Latents(str(tmp_path), residency=r, batch_size=8) for r in ("disk", "ram", "device"))
        for epoch in range(2):
            for batches in zip(*(batches_of(data, epoch) for data in (disk, ram, device)), strict=True):
                for other in batches[1:]:
                    assert all(torch.equal(other[name], values) for name, values in batches[0].items())
        assert ram._ready().train.memory.dtype == dtype
        assert torch.equal(ram.bank().rows(torch.arange(9)), device.bank().rows(torch.arange(9)))

    def test_what_does_not_go_together(self, tmp_path):
        with pytest.raises(ValueError, match="num_workers=2: with residency 'device' .* set num_workers to 0"):
            Latents(str(tmp_path), residency="device", num_workers=2)

    def test_more_than_the_memory_raises_before_reading(self, tmp_path, monkeypatch):
        folders.write_indexed(tmp_path)
        monkeypatch.setattr(shared_memory, "available_memory_bytes", lambda: 1000)
        with pytest.raises(MemoryError, match="choose residency 'disk'"):
            Latents(str(tmp_path), residency="ram", batch_size=8).train_dataloader()


class TestMoments:
    @pytest.mark.parametrize("layout", ["index", "folder", "dataset.zip"])
    def test_the_bank_is_the_mixture_and_batches_are_drawn_from_it(self, tmp_path, layout):
        if layout == "index":
            folders.write_indexed(tmp_path / layout, ("mean", "std", "mean_flip", "std_flip"))
        else:
            folders.write_files(tmp_path / layout, moments=True)
        data = Latents(
            str(tmp_path / layout), batch_size=8, flip=layout == "index", normalisation="none", multiplier=0.18215
        )
        bank, own = data.bank(), own_images(data)
        assert isinstance(bank, GaussianMixtureBank)
        assert data.shape == bank.shape == SHAPE
        versions = [("mean", "std"), ("mean_flip", "std_flip")] if layout == "index" else [("mean", "std")]
        wanted = torch.cat([torch.stack([values(name)[own] for name in pair], 1) for pair in versions]) * 0.18215
        assert torch.equal(bank.moments_of(torch.arange(len(bank))), wanted)
        normal = torch.cat([(batch["x1"] - wanted[batch["index"], 0]) / wanted[batch["index"], 1]
                            for epoch in range(3) for batch in batches_of(data, epoch)])  # fmt: skip
        assert abs(normal.mean()) < 4 / normal.numel() ** 0.5
        assert abs(normal.var() - 1) < 6 / normal.numel() ** 0.5
        assert (normal.diff(dim=0).abs().amax((1, 2, 3)) > 0.1).all()  # each its own noise

    def test_draws_depend_on_seed_epoch_and_place_alone(self, tmp_path):
        folders.write_files(tmp_path, moments=True)
        options = {"flip": False, "batch_size": 8}
        one, other = (Latents(str(tmp_path), num_workers=n, **options) for n in (0, 1))
        for a, b in zip(batches_of(one, 1), batches_of(other, 1), strict=True):
            assert torch.equal(a["x1"], b["x1"])
        assert not torch.equal(batches_of(one, 0)[0]["x1"], batches_of(one, 1)[0]["x1"])
        seeded = Latents(str(tmp_path), seed=1, **options)
        assert not torch.equal(batches_of(one)[0]["x1"], batches_of(seeded)[0]["x1"])
        assert torch.equal(next(iter(one.val_dataloader()))["x1"], next(iter(one.val_dataloader()))["x1"])

    def test_channels_are_normalised_as_the_mixture(self, tmp_path):
        folders.write_files(tmp_path, moments=True)
        data = Latents(str(tmp_path), flip=False, multiplier=2.0)
        mean, std = values("mean").double(), values("std").double()
        centre = mean.mean(CHANNELS, keepdim=True)
        spread = (mean.var(CHANNELS, False, keepdim=True) + std.square().mean(CHANNELS, keepdim=True)).sqrt()
        own = own_images(data)
        wanted = torch.stack([(mean - centre) / spread * 2, std / spread * 2], 1)[own]
        assert (data.bank().moments_of(torch.arange(data.num_train)) - wanted).abs().max() < 3e-6


class TestNormalisation:
    def test_statistics_are_made_once_over_all_rows(self, tmp_path, monkeypatch):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path))
        data.setup()
        stats = torch.load(tmp_path / "latents_stats.pt", weights_only=True)
        all_rows = torch.cat([values(name) for name in folders.NAMES]).double()
        assert (stats["mean"] - all_rows.mean(CHANNELS, keepdim=True)).abs().max() < 1e-6
        assert (stats["std"] - all_rows.std(CHANNELS, False, keepdim=True)).abs().max() < 1e-6
        monkeypatch.setattr(normalisation, "channel_statistics", lambda blocks: pytest.fail("made again"))
        again = Latents(str(tmp_path))
        again.setup()
        assert torch.equal(again._ready().train.scale, data._ready().train.scale)

    def test_statistics_of_a_peer_are_taken(self, tmp_path):
        folders.write_lightning(tmp_path)
        mean, std = torch.full((1, 4, 1, 1), 2.0), torch.full((1, 4, 1, 1), 4.0)
        torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
        data = Latents(str(tmp_path), multiplier=0.5)
        image = folders.write_lightning(tmp_path)[own_images(data)]
        x1 = data.bank().rows(torch.arange(data.num_train))
        assert (x1 - (values("latents")[image] - 2) / 4 * 0.5).abs().max() < 1e-6

    def test_by_the_vaes_numbers(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), batch_size=8, normalisation="vae", multiplier=3.0)
        x1 = data.bank().rows(torch.arange(data.num_train))
        assert (x1 - (values("latents")[own_images(data)] - 0.25) * 0.5 * 3).abs().max() < 3e-6
        check_against_bank(data)
        assert not (tmp_path / "latents_stats.pt").exists()

    def test_where_nothing_can_be_written_they_are_computed_with_a_warning(self, tmp_path, monkeypatch):
        def read_only(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        folders.write_indexed(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(normalisation, "locked", read_only)
            with pytest.warns(UserWarning, match=r"latents_stats.pt cannot be written \(Read-only file system\)"):
                one = Latents(str(tmp_path)).bank()
        assert not (tmp_path / "latents_stats.pt").exists()
        every = torch.arange(len(one))
        assert torch.equal(one.rows(every), Latents(str(tmp_path)).bank().rows(every))

    @pytest.mark.parametrize("write", [folders.write_indexed, folders.write_lightning])
    def test_a_profile_sees_the_same_rows(self, tmp_path, write):
        write(tmp_path)
        read = read_rows(tmp_path)
        profiled = DataBank(read.x1, read.labels, read.scale, read.shift)
        data = Latents(str(tmp_path), batch_size=8)
        bank, own = data.bank(), own_images(data)
        index = torch.cat([own, own + NUM])
        assert torch.equal(profiled.rows(index), bank.rows(torch.arange(len(bank))))
        assert torch.equal(profiled.labels_of(index), bank.labels_of(torch.arange(len(bank))))


class TestPictures:
    @pytest.fixture
    def vae(self, write_vae, tmp_path):
        return write_vae(tmp_path / "vae")

    @pytest.mark.parametrize("normalisation", ["channels", "vae", "none"])
    def test_pixels_are_those_of_the_vae(self, tmp_path, vae, normalisation):
        folders.write_indexed(tmp_path / "data")
        data = Latents(str(tmp_path / "data"), vae=str(vae), normalisation=normalisation, multiplier=0.7, batch_size=8)
        raw = values("latents")[own_images(data)]
        pixels = data.to_pixels(data.bank().rows(torch.arange(11)))
        assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (11, *data.picture_shape(SHAPE)))
        wanted = (load_vae(str(vae)).decode(raw[:11]) + 1) * 127.5
        assert (pixels - wanted).abs().max() < 0.51

    def test_the_vae_goes_to_where_the_latents_are(self, tmp_path, vae):
        folders.write_indexed(tmp_path / "data")
        data = Latents(str(tmp_path / "data"), vae=str(vae), batch_size=8)
        data.picture_shape(SHAPE)  # has loaded it
        assert data.decoder().device.type == "cpu"
        decoder = data.decoder(torch.device("meta"))
        data.picture_shape(SHAPE)
        assert decoder.device.type == "meta"
        assert {parameter.device.type for parameter in decoder._model.parameters()} == {"meta"}

    def test_rows_are_shown_decoded_or_by_their_channels(self, tmp_path, vae):
        folders.write_indexed(tmp_path / "data")
        options = {"data_dir": str(tmp_path / "data"), "batch_size": 8}
        decoding, plain = Latents(vae=str(vae), **options), Latents(vae="none", **options)
        x = decoding.bank().rows(torch.arange(6)).unflatten(0, (2, 3))
        picture, note = pictures_of(decoding.bank(), decoding)
        assert note == "; decoded by the VAE"
        side = 4 * SHAPE[-1]
        assert picture(x).shape == (2, 3, side, side, 3)
        picture, note = pictures_of(plain.bank(), plain)
        assert "first three of 4 channels" in note
        assert picture(x).shape == (2, 3, *SHAPE[1:], 3)

    def test_a_vae_that_is_gone(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), vae=str(tmp_path / "gone"), batch_size=8)
        data.bank()  # needs none
        with pytest.raises(FileNotFoundError, match="no VAE for the pictures of .*gone.*set the data's vae"):
            data.picture_shape(SHAPE)
        with pytest.raises(ValueError, match="nothing decodes the latents"):
            Latents(str(tmp_path), vae="none").to_pixels(torch.zeros(1, *SHAPE))

    def test_a_vae_that_only_the_index_names(self, tmp_path):
        folders.write_indexed(tmp_path)
        data = Latents(str(tmp_path), batch_size=8)
        with pytest.warns(UserWarning, match="first channels.*no VAE for the pictures .*some/vae.*set the data's vae"):
            assert data.picture_shape(SHAPE) is None
        assert "first three of 4 channels" in pictures_of(data.bank(), data)[1]

    def test_a_vae_of_other_latents(self, tmp_path, write_vae):
        folders.write_indexed(tmp_path / "data")
        vae = write_vae(tmp_path / "vae", latent_channels=2)
        with pytest.raises(ValueError, match="makes latents of 2 channels, .*data holds 4"):
            Latents(str(tmp_path / "data"), vae=str(vae)).picture_shape(SHAPE)


class TestErrors:
    def fails(self, message, place, error=ValueError, **kwargs):
        with pytest.raises(error, match=message):
            Latents(str(place), **kwargs).bank()

    def test_arguments(self, tmp_path):
        for name, value in (("multiplier", 0.0), ("multiplier", float("nan")), ("val_fraction", 1.0)):
            self.fails(f"{name}={value}", tmp_path, **{name: value})

    def test_no_latents(self, tmp_path):
        self.fails("there is no .*nowhere: give a folder of index.json", tmp_path / "nowhere", FileNotFoundError)
        self.fails("holds no latents: give a folder", tmp_path)
        (tmp_path / "x.txt").touch()
        self.fails("x.txt is no folder", tmp_path / "x.txt")

    @pytest.mark.parametrize("how", ["missing", "truncated", "changed"])
    def test_a_shard_that_is_not_what_was_written(self, tmp_path, how):
        folders.write_indexed(tmp_path)
        file = tmp_path / "latents_rank00_shard002.safetensors"
        content = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(content[:-1] if how == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
        messages = {"missing": "is missing, .* copy it", "truncated": "has .* bytes, .* copy it", "changed": "checksum"}
        self.fails(f"shard002.safetensors.*{messages[how]}", tmp_path, verify=True)
        if how == "changed":
            Latents(str(tmp_path)).bank()  # only checksums tell
        else:
            self.fails("shard002.safetensors", tmp_path)
            with pytest.raises(ValueError, match="shard002.safetensors"):
                read_rows(tmp_path)

    def test_an_index_of_a_half_encoded_folder(self, tmp_path):
        index = folders.write_indexed(tmp_path)
        del index.shards[3]
        folders.write_index(tmp_path, index)
        self.fails("encoded in part, 4 of 5 shards: run the same fm-stages encode again", tmp_path)
        with pytest.raises(ValueError, match="encoded in part, 4 of 5 shards"):
            read_rows(tmp_path)

    @pytest.mark.parametrize("change", [lambda x: x.half(), lambda x: x[:, :3].contiguous()])
    def test_shards_that_differ(self, tmp_path, change):
        folders.write_lightning(tmp_path)
        file = tmp_path / "latents_rank01_shard001.safetensors"
        held = load_file(file)
        save_file({name: x if name == "labels" else change(x) for name, x in held.items()}, file)
        self.fails("latents_rank01_shard001.safetensors holds latents of", tmp_path)

    def test_labels_that_do_not_match(self, tmp_path):
        folders.write_files(tmp_path, moments=True)
        listed = tmp_path / "dataset.json"
        listed.write_text(listed.read_text().replace("00000005.npy", "00000500.npy"))
        self.fails("dataset.json gives .*00000005.npy the label None", tmp_path, flip=False)

    @pytest.mark.parametrize("how", ["channels", "none"])
    def test_a_latent_that_is_not_finite_is_named(self, tmp_path, how):
        folders.write_lightning(tmp_path)
        file = tmp_path / "latents_rank01_shard001.safetensors"
        held = load_file(file)
        held["latents_flip"][2, 0, 0, 0] = torch.nan
        save_file(held, file)
        message = r"latents_flip\[2\] of .*rank01_shard001.safetensors holds NaN or infinity"
        self.fails(message, tmp_path, normalisation=how, val_fraction=0.01)

    def test_what_is_asked_for_has_to_be_there(self, tmp_path):
        folders.write_files(tmp_path, moments=False)
        self.fails("holds no latents of flipped images.*set flip to false", tmp_path)
        self.fails(
            "'vae' takes .* index.json, which .* lacks: choose 'none'", tmp_path, flip=False, normalisation="vae"
        )
        self.fails("verify compares .* index.json, which .* lacks", tmp_path, verify=True)

    def test_held_out_rows_unlike_the_others(self, tmp_path):
        folders.write_indexed(tmp_path / "train")
        folders.write_indexed(tmp_path / "half", dtype=torch.float16)
        folders.write_lightning(tmp_path / "unnamed")
        train = tmp_path / "train"
        self.fails("is data_dir", train, val_dir=str(tmp_path / "train"))
        self.fails("train has rows of torch.float32, .*half torch.float16", train, val_dir=str(tmp_path / "half"))
        self.fails(r"train has classes \['cat', .*unnamed \[\]", train, val_dir=str(tmp_path / "unnamed"))

    def test_a_compressed_zip(self, tmp_path):
        import zipfile

        folders.write_files(tmp_path / "a.zip", moments=True)
        with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "a.unpacked" / "00000" / "img-mean-std-00000000.npy", "img-mean-std-0.npy")
        self.fails("b.zip is compressed", tmp_path / "b.zip", flip=False)
        (tmp_path / "c.zip").write_bytes(b"words")
        self.fails("cannot read .*c.zip", tmp_path / "c.zip")

    def test_moments_of_an_odd_number_of_channels(self, tmp_path):
        for i in range(2):
            np.save(tmp_path / f"img-mean-std-{i}.npy", np.zeros((3, 2, 2), np.float32))
        self.fails(r"img-mean-std-0.npy holds float32 of shape \(3, 2, 2\): moments", tmp_path, flip=False)
