"""Image files to rows: the crop against ADM's on plain arrays, rows against the VAE called on each image."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from fm_stages.data import load_vae
from fm_stages.data.encode import Encoder, Encoding, planned_index, rows_per_shard, sums_of_shard
from fm_stages.data.image_files import list_images, open_square, splits_of
from fm_stages.data.latent_index import locked, read_index
from fm_stages.data.shard_writing import complete_folder, list_of_sources, open_folder, write_shard
from fm_stages.data.statistics import combine_sums, statistics_of
from fm_stages.flow import keyed_normal

NUM = 11


def picture(size, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven images in two classes, of several sizes and kinds."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(NUM):
        name = folder / "ba"[i % 2] / f"image {i:02d}.{('png', 'jpg')[i % 3 == 0]}"
        name.parent.mkdir(exist_ok=True)
        image = picture((20 + 9 * i, 50), i)
        (image.convert("L") if i == 4 else image).save(name)
    return folder


@pytest.fixture(scope="module")
def vae(write_vae, tmp_path_factory):
    return load_vae(str(write_vae(tmp_path_factory.mktemp("vae"))))


@pytest.fixture
def plan(vae, folder):
    """An encoder of shards of four rows, with its index."""

    def make(batch_size=4, **settings):
        images, encoding = list_images(folder), Encoding(**{"image_size": 16, **settings})
        sources = list_of_sources(folder, images.files)[1]
        index = planned_index(images, sources, vae, encoding, shard_rows=4)
        return Encoder(vae, images, index, encoding, batch_size, num_workers=2)

    return make


class TestCrop:
    @pytest.mark.parametrize("size", [(23, 16), (16, 40), (70, 33), (131, 77), (9, 12), (16, 16)])
    def test_is_adms(self, size, tmp_path):
        picture(size).save(tmp_path / "a.png")
        pixels, enlarged = open_square(tmp_path / "a.png", 16)
        image = picture(size)  # as guided-diffusion's center_crop_arr goes about it
        while min(*image.size) >= 2 * 16:
            image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
        scale = 16 / min(*image.size)
        array = np.array(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
        y, x = (array.shape[0] - 16) // 2, (array.shape[1] - 16) // 2
        assert (pixels.permute(1, 2, 0).numpy() == array[y : y + 16, x : x + 16]).all()
        assert enlarged == (min(size) < 16)

    def test_large_images_are_halved_by_averages(self, tmp_path):
        array = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "a.png")
        means = array.reshape(16, 2, 16, 2, 3).mean((1, 3))
        assert (
            np.abs(open_square(tmp_path / "a.png", 16)[0].permute(1, 2, 0).numpy() - means).max() <= 1
        )  # Pillow rounds twice

    def test_a_file_that_is_no_image_is_named(self, tmp_path):
        picture((40, 40)).save(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:400])
        with pytest.raises(ValueError, match=f"cannot read the image {tmp_path}/a.png .*repair or remove"):
            open_square(tmp_path / "a.png", 16)


class TestFiles:
    def test_order_and_labels_are_image_folders(self, folder):
        from torchvision.datasets import ImageFolder

        images, theirs = list_images(folder), ImageFolder(str(folder))
        assert [str(folder / file) for file in images.files] == [file for file, _ in theirs.samples]
        assert images.labels.tolist() == theirs.targets
        assert images.class_names == theirs.classes

    def test_splits_share_their_classes(self, folder, tmp_path):
        for name in ("train/a", "train/b", "train/c", "val/b", "val/c"):
            (tmp_path / name).mkdir(parents=True)
            picture((20, 20)).save(tmp_path / name / "x.png")
        splits = splits_of(tmp_path)
        assert list(splits) == ["train", "val"]
        train = list_images(splits["train"])
        assert list_images(splits["val"], train.class_names).labels.tolist() == [1, 2]
        with pytest.raises(ValueError, match="not among the classes: c"):
            list_images(splits["val"], ["a", "b"])
        assert splits_of(folder) == {"": folder}

    def test_a_flat_folder_is_one_class(self, folder):
        images = list_images(folder / "a")
        assert images.class_names == ["a"]
        assert images.labels.tolist() == [0] * len(os.listdir(folder / "a"))

    def test_folders_without_order(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no images"):
            list_images(tmp_path)
        (tmp_path / "a").mkdir()
        with pytest.raises(FileNotFoundError, match="a"):
            list_images(tmp_path)
        picture((20, 20)).save(tmp_path / "x.png")
        with pytest.raises(ValueError, match=r"holds images \(x.png, ...\) beside folders \(a, ...\)"):
            list_images(tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            splits_of(tmp_path / "nowhere")


class TestRows:
    def expected(self, vae, folder, version, seed=0):
        """Mean, std and draw of each image by itself."""
        images = list_images(folder)
        pixels = torch.stack([open_square(folder / file, 16)[0] for file in images.files]).float() / 127.5 - 1
        pairs = [vae.moments((image.flip(-1) if version else image).unsqueeze(0)) for image in pixels]
        mean, std = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        noise = keyed_normal(("latents", seed, int(bool(version))), torch.arange(NUM), (4, 4, 4))
        return mean, std, mean + std * noise

    def test_draws_whatever_the_batch(self, vae, folder, plan):
        by_size = []
        for batch_size in (4, 3):
            encoder, seen = plan(batch_size), []
            shards = dict(encoder.shards([0, 1, 2], seen.append))
            assert list(shards) == [0, 1, 2]
            assert sum(seen) == NUM
            by_size.append({name: torch.cat([shard[name] for shard in shards.values()]) for name in shards[0]})
        for version in ("", "_flip"):
            _, _, draw = self.expected(vae, folder, version)
            for rows in by_size:  # seen: 1e-6, of values of about 1
                torch.testing.assert_close(rows["latents" + version], draw, rtol=0, atol=1e-5)
        assert by_size[0]["labels"].equal(list_images(folder).labels)
        # a shard is the same whichever others the rank encodes, and its noise belongs to its rows
        ((_, alone),) = plan(4).shards([1], lambda _: None)
        assert all(alone[name].equal(by_size[0][name][4:8]) for name in alone)

    def test_moments_and_seeds(self, vae, folder, plan):
        encoder = plan(moments=True)
        ((_, shard),) = encoder.shards([2], lambda _: None)
        assert sorted(shard) == ["labels", "mean", "mean_flip", "std", "std_flip"]
        for version in ("", "_flip"):
            mean, std, _ = self.expected(vae, folder, version)
            torch.testing.assert_close(shard["mean" + version], mean[8:], rtol=0, atol=1e-5)
            torch.testing.assert_close(shard["std" + version], std[8:], rtol=0, atol=1e-5)
        ((_, other),) = plan(seed=3, flip=False).shards([2], lambda _: None)
        assert sorted(other) == ["labels", "latents"]
        torch.testing.assert_close(other["latents"], self.expected(vae, folder, "", 3)[2][8:], rtol=0, atol=1e-5)

    def test_bf16_is_near(self, plan):
        rows = [dict(plan(moments=True).shards([0], lambda _: None))[0]["mean"]]
        encoder = plan(moments=True, precision="bf16")
        encoder.vae = load_vae(encoder.vae.name, precision="bf16")
        rows.append(dict(encoder.shards([0], lambda _: None))[0]["mean"])
        assert 1e-4 < (rows[0] - rows[1]).abs().max() < 0.1

    def test_values_that_are_not_finite_name_the_image(self, plan, monkeypatch):
        encoder = plan()
        moments = encoder.vae.moments

        def one_nan(images):
            mean, std = moments(images)
            mean[2, 1] = torch.inf
            return mean, std

        monkeypatch.setattr(encoder.vae, "moments", one_nan)
        name = encoder.images.files[6]
        with pytest.raises(ValueError, match=f"latents that are not finite of {name}$"):
            list(encoder.shards([1], lambda _: None))

    def test_sizes_of_shards(self):
        assert rows_per_shard(1_281_167, 8) == 10_000
        assert rows_per_shard(50_000, 8) == 768
        assert rows_per_shard(100, 2) == 256


class TestWriting:
    def write(self, out, encoder, numbers):
        wanted = encoder.index
        out.mkdir(exist_ok=True)
        content, _ = list_of_sources(encoder.images.folder, encoder.images.files)
        index = open_folder(out, wanted, content, shard_rows_given=True)
        for number, tensors in encoder.shards([n for n in numbers if n not in index.shards], lambda _: None):
            write_shard(out, index, number, tensors)
        return read_index(out)

    def test_a_finished_folder(self, plan, tmp_path):
        encoder = plan()
        out = tmp_path / "out"
        self.write(out, encoder, [2, 0, 1])
        names = [encoder.index.file_of(number) for number in range(3)]
        sums = [part for name in names for part in sums_of_shard(out / name, encoder.encoding)]
        index = complete_folder(out, statistics_of(combine_sums(sums)))
        assert index.complete
        assert (out / "sources.txt").read_text().splitlines() == encoder.images.files
        rows = torch.cat(
            [shard[name] for _, shard in plan().shards([0, 1, 2], len_of) for name in shard if "lat" in name]
        )
        stats = torch.load(out / "latents_stats.pt", weights_only=True)
        torch.testing.assert_close(stats["mean"].flatten(), rows.double().mean((0, 2, 3)).float())
        torch.testing.assert_close(stats["std"].flatten(), rows.double().std((0, 2, 3), correction=0).float())
        assert os.stat(out / names[0]).st_mode == os.stat(out / "index.json").st_mode  # for others to read, too

    def test_a_shard_that_the_index_does_not_know_is_adopted(self, plan, tmp_path, monkeypatch):
        out = tmp_path / "out"
        before = self.write(out, plan(), [0, 1])
        (out / "index.json").unlink()
        self.write(tmp_path / "other", plan(), [0])
        (tmp_path / "other/index.json").rename(out / "index.json")  # knows shard 0 alone
        file = out / before.file_of(1)
        written = file.stat().st_mtime_ns
        after = self.write(out, plan(), [0, 1])
        assert after.shards == before.shards
        assert file.stat().st_mtime_ns == written

    def test_a_shard_of_other_settings_is_refused(self, plan, tmp_path):
        out, other = tmp_path / "out", tmp_path / "other"
        index = self.write(out, plan(), [0])
        self.write(other, plan(seed=1), [0, 1])
        for number in (0, 1):  # one that the index lists, and one that it does not
            kept = (out / index.file_of(number)).read_bytes() if number in index.shards else None
            (out / index.file_of(number)).write_bytes((other / index.file_of(number)).read_bytes())
            with pytest.raises(ValueError, match=f"shard00{number}.* was not encoded with these settings"):
                self.write(out, plan(), [0])
            if kept:
                (out / index.file_of(number)).write_bytes(kept)

    def test_a_truncated_shard_is_refused_and_a_missing_one_redone(self, plan, tmp_path):
        before = self.write(tmp_path, plan(), [0, 1, 2])
        file = tmp_path / before.file_of(1)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"{file} has .* bytes, .*remove it and run the same"):
            self.write(tmp_path, plan(), [0, 1, 2])
        file.unlink()
        assert self.write(tmp_path, plan(), [0, 1, 2]).shards == before.shards

    def test_what_was_half_written_is_removed_and_other_files_are_not(self, plan, tmp_path):
        (tmp_path / "latents_rank00_shard000.safetensors.77.part").write_bytes(b"half")
        with locked(tmp_path, "encode"):
            self.write(tmp_path, plan(), [0])
        assert not list(tmp_path.glob("*.part"))
        (tmp_path / "other").mkdir()
        (tmp_path / "other/mine.part").write_bytes(b"mine")
        with pytest.raises(ValueError, match="holds other files .mine.part, ...."):
            self.write(tmp_path / "other", plan(), [0])


def len_of(_):
    """Takes no notice of progress."""
