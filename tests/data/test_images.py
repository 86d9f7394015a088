"""The data sets against their sources: scikit-learn's digits, torchvision's files, images written to a folder."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from jsonargparse import ArgumentParser
from PIL import Image

from fm_stages.data import CIFAR10, Digits, FashionMNIST, ImageData, ImageFolder, images


class TestStratifiedSplit:
    def test_same_part_of_each_class(self):
        labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
        train, val = images.stratified_split(labels, 0.2)
        assert sorted(torch.cat([train, val]).tolist()) == list(range(113))
        assert labels[val].bincount(minlength=4).tolist() == [20, 2, 1, 0]
        assert train.tolist() == sorted(train.tolist())
        assert not torch.equal(val, images.stratified_split(labels, 0.2, seed=1)[1])

    def test_a_class_keeps_training_images(self):
        train, _ = images.stratified_split(torch.tensor([0, 0, 1, 1, 1]), 0.99)
        assert train.tolist() == [t for t in train.tolist() if t in range(5)]
        assert len(train) == 2


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits()
    data.setup()
    return data


class TestDigits:
    def test_pixels_and_labels_are_scikit_learns(self, digits):
        from sklearn.datasets import load_digits

        source = load_digits()
        pixels = torch.from_numpy(source.images / 16 * 2 - 1).float().flatten(1)
        rows = torch.arange(digits.num_train)
        ours = torch.cat([digits.bank().rows(rows), *(batch["x1"] for batch in digits.val_dataloader())]).flatten(1)
        labels = torch.cat([digits.bank().labels_of(rows), *(batch["labels"] for batch in digits.val_dataloader())])
        distance, match = torch.cdist(ours, pixels, p=float("inf")).min(1)
        assert distance.max() <= 1 / 255 + 1e-6
        assert sorted(match.tolist()) == list(range(1797))  # each image once: none is both trained on and held out
        assert labels.tolist() == source.target[match].tolist()

    def test_split(self, digits):
        assert digits.shape == (1, 8, 8)
        assert (digits.num_train, digits.num_val, digits.num_classes) == (1438, 359, 10)
        labels = torch.cat([batch["labels"] for batch in digits.val_dataloader()])
        assert (labels.bincount() / torch.tensor(list(digits.bank().label_counts.values()))).sub(
            0.25
        ).abs().max() < 0.01


def fashion_dir() -> Path:
    return Path(os.environ.get("FM_STAGES_DATA") or "data")


@pytest.mark.skipif(
    not (fashion_dir() / "FashionMNIST/raw/train-images-idx3-ubyte").exists(),
    reason="no Fashion-MNIST files: set FM_STAGES_DATA to the folder that has them",
)
class TestFashionMNIST:
    def test_pixels_are_the_files_bytes(self):
        data = FashionMNIST()
        data.setup()
        assert data.shape == (1, 28, 28)
        assert (data.num_train, data.num_val, data.num_classes) == (60_000, 10_000, 10)
        assert data.class_names[0] == "T-shirt/top"
        raw = np.fromfile(fashion_dir() / "FashionMNIST/raw/t10k-images-idx3-ubyte", dtype=np.uint8)[16:]
        expected = torch.from_numpy(raw).view(-1, 1, 28, 28).float() / 127.5 - 1
        batch = next(iter(data.val_dataloader()))
        assert (batch["x1"] - expected[batch["position"]]).abs().max() < 1e-6
        labels = torch.cat([batch["labels"] for batch in data.val_dataloader()])
        assert labels.bincount().tolist() == [1000] * 10

    def test_first_images_shrunk_as_by_pillow(self):
        data = FashionMNIST(image_size=14, num_train=64, batch_size=8)
        source = torchvision.datasets.FashionMNIST(str(fashion_dir()))
        x1 = data.bank().rows(torch.arange(64))
        assert x1.shape == (64, 1, 14, 14)
        for image, row in zip(source.data, x1, strict=False):
            small = Image.fromarray(image.numpy()).resize((14, 14), Image.Resampling.BICUBIC)
            assert (torch.from_numpy(np.array(small)).float() / 127.5 - 1 - row[0]).abs().max() < 1.1 / 127.5
        assert data.bank().labels_of(torch.arange(64)).tolist() == source.targets[:64].tolist()

    def test_sizes_that_are_not_there_raise(self):
        with pytest.raises(ValueError, match="num_train=60001, but FashionMNIST has 60000"):
            FashionMNIST(num_train=60_001).setup()
        with pytest.raises(ValueError, match="image_size=32 is larger .* 28x28"):
            FashionMNIST(image_size=32).setup()


class TestCIFAR10:
    @pytest.fixture
    def cifar_dir(self, tmp_path, monkeypatch) -> Path:
        """Two tiny batches in torchvision's layout, whose check sums are then not asked for."""
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        generator = np.random.default_rng(0)
        for name, num in (("data_batch_1", 6), ("test_batch", 3)):
            pixels = generator.integers(0, 256, (num, 3 * 32 * 32), dtype=np.uint8)
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(num))}))
        names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", None]])
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", None]])
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
        return tmp_path

    def test_pixels_are_the_files_bytes(self, cifar_dir):
        data = CIFAR10(data_dir=str(cifar_dir), batch_size=2)
        data.setup()
        assert data.shape == (3, 32, 32)
        assert (data.num_train, data.num_val, data.num_classes) == (6, 3, 10)
        assert data.class_names[2] == "bird"
        raw = pickle.loads((cifar_dir / "cifar-10-batches-py/data_batch_1").read_bytes())["data"]
        expected = torch.from_numpy(raw).view(6, 3, 32, 32).float() / 127.5 - 1
        assert (data.bank().rows(torch.arange(6)) - expected).abs().max() < 1e-6
        assert data.bank().labels_of(torch.arange(6)).tolist() == list(range(6))

    def test_the_environment_names_the_folder(self, cifar_dir, monkeypatch):
        monkeypatch.setenv("FM_STAGES_DATA", str(cifar_dir))
        data = CIFAR10(num_train=4, batch_size=2, image_size=16)
        data.setup()
        assert (data.num_train, data.shape) == (4, (3, 16, 16))

    def test_existing_files_are_not_downloaded(self, cifar_dir, monkeypatch):
        downloads = []
        monkeypatch.setattr(
            torchvision.datasets.cifar, "download_and_extract_archive", lambda *args, **kwargs: downloads.append(args)
        )
        CIFAR10(data_dir=str(cifar_dir), download=True).prepare_data()
        assert downloads == []

    def test_a_failed_download_names_the_folder_and_the_way_out(self, tmp_path, monkeypatch):
        def no_network(*args, **kwargs):
            raise OSError("no route to host")

        monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
        with pytest.raises(RuntimeError, match=f"{tmp_path} .*no route to host.* data_dir"):
            CIFAR10(data_dir=str(tmp_path), download=True).prepare_data()

    def test_a_damaged_file_raises(self, cifar_dir):
        (cifar_dir / "cifar-10-batches-py/test_batch").write_bytes(b"\x80")
        with pytest.raises(FileNotFoundError, match="no readable CIFAR10 files"):
            CIFAR10(data_dir=str(cifar_dir)).setup()


@pytest.mark.parametrize("dataset", [FashionMNIST, CIFAR10])
def test_a_missing_folder_names_itself_and_three_ways_out(dataset, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        dataset(data_dir=str(tmp_path / "nowhere")).setup()
    message = str(caught.value)
    assert all(text in message for text in [str(tmp_path / "nowhere"), "data_dir", "FM_STAGES_DATA", "download"])


@pytest.mark.parametrize("arguments", [{"num_train": 0}, {"image_size": 0}, {"num_train": -1}])
def test_sizes_below_one_raise(arguments):
    with pytest.raises(ValueError, match="must be 1 or more"):
        FashionMNIST(**arguments)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def write(path: Path, size: tuple[int, int], colour: tuple[int, int, int] | int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def folder_of(root: Path, num: int = 10) -> Path:
    """Two classes in images of two shapes: red cats, blue dogs."""
    for i in range(num):
        write(root / "cat" / f"{i}.png", (20, 12), RED)
        write(root / "dog" / "deeper" / f"{i}.png", (9, 30), BLUE)
    return root


class TestImageFolder:
    def test_images_labels_and_split(self, tmp_path):
        data = ImageFolder(str(folder_of(tmp_path)), image_size=8, val_fraction=0.3, batch_size=2)
        bank = data.bank()
        assert data.class_names == ["cat", "dog"]
        assert data.shape == (3, 8, 8)
        assert (data.num_train, data.num_val) == (14, 6)
        assert bank.label_counts == {0: 7, 1: 7}
        colours = {0: torch.tensor([1.0, -1, -1]), 1: torch.tensor([-1.0, -1, 1])}
        for batch in [*data.train_dataloader(), *data.val_dataloader()]:
            for x, label in zip(batch["x1"], batch["labels"].tolist(), strict=True):
                assert torch.equal(x, colours[label].view(3, 1, 1).expand(3, 8, 8))

    def test_the_centre_is_cut_out_of_the_resized_image(self, tmp_path):
        wide, tall = Image.new("RGB", (40, 16), RED), Image.new("RGB", (16, 40), RED)
        wide.paste(GREEN, (12, 0, 28, 16))
        tall.paste(GREEN, (0, 12, 16, 28))
        decoded = []
        for number, image in enumerate([wide, tall]):
            image.save(tmp_path / f"{number}.png")
            decoded.append(images.decode([str(tmp_path / f"{number}.png")], 16)[0])
            half = images.decode([str(tmp_path / f"{number}.png")], 8)[0]
            assert half.shape == (3, 8, 8)
            assert (half[:, 2:6, 2:6] == torch.tensor(GREEN).view(3, 1, 1)).all()
        assert all((x == torch.tensor(GREEN).view(3, 1, 1)).all() for x in decoded)

    def test_grey_images_become_rgb(self, tmp_path):
        write(tmp_path / "grey.png", (8, 8), 100, mode="L")
        assert (images.decode([str(tmp_path / "grey.png")], 8) == 100).all()

    def test_train_and_val_folders_are_the_splits(self, tmp_path):
        folder_of(tmp_path / "train", 4)
        write(tmp_path / "val" / "dog" / "a.png", (8, 8), BLUE)
        data = ImageFolder(str(tmp_path), image_size=4, batch_size=2)
        data.setup()
        assert (data.num_train, data.num_val) == (8, 1)
        assert next(iter(data.val_dataloader()))["labels"].tolist() == [1]

    @pytest.mark.parametrize("own_folder", [False, True])
    def test_a_part_of_the_held_out_images_is_like_all_of_them(self, tmp_path, own_folder):
        """Files come class by class, and validation may stop after some batches."""
        folder_of(tmp_path / "train", 30)
        if own_folder:
            folder_of(tmp_path / "val", 15)
        data = ImageFolder(str(tmp_path), image_size=4, val_fraction=0.5, batch_size=10)
        assert next(iter(data.val_dataloader()))["labels"].unique().tolist() == [0, 1]

    def test_val_dir_comes_first(self, tmp_path):
        folder_of(tmp_path / "a" / "train", 4)
        folder_of(tmp_path / "a" / "val", 4)
        write(tmp_path / "b" / "cat" / "a.png", (8, 8), RED)
        data = ImageFolder(str(tmp_path / "a"), image_size=4, val_dir=str(tmp_path / "b"))
        data.setup()
        assert (data.num_train, data.num_val) == (8, 1)

    def test_the_split_follows_its_own_seed(self, tmp_path):
        for i in range(20):
            write(tmp_path / "a" / f"{i:02}.png", (2, 2), i, mode="L")

        def held_out(**seeds) -> list[float]:
            data = ImageFolder(str(tmp_path), image_size=2, val_fraction=0.5, **seeds)
            return [float(x) for batch in data.val_dataloader() for x in batch["x1"][:, 0, 0, 0]]

        assert held_out(seed=0) == held_out(seed=1)
        assert held_out(split_seed=0) != held_out(split_seed=1)

    def test_a_damaged_image_is_named(self, tmp_path):
        folder_of(tmp_path)
        (tmp_path / "cat" / "3.png").write_bytes((tmp_path / "cat" / "3.png").read_bytes()[:40])
        with pytest.raises(ValueError, match=r"cannot read the image .*cat/3\.png"):
            ImageFolder(str(tmp_path), image_size=4).setup()

    def test_an_empty_class_is_named(self, tmp_path):
        (folder_of(tmp_path) / "fish").mkdir()
        with pytest.raises(FileNotFoundError, match="classes fish.*Remove the class folders that hold no image"):
            ImageFolder(str(tmp_path), image_size=4).setup()

    def test_held_out_classes_must_be_known(self, tmp_path):
        folder_of(tmp_path / "a")
        write(tmp_path / "b" / "fish" / "a.png", (8, 8), RED)
        with pytest.raises(ValueError, match="lacks: fish"):
            ImageFolder(str(tmp_path / "a"), image_size=4, val_dir=str(tmp_path / "b")).setup()

    def test_held_out_images_inside_the_training_folder_raise(self, tmp_path):
        folder_of(folder_of(tmp_path) / "held_out")
        with pytest.raises(ValueError, match="held_out lies inside"):
            ImageFolder(str(tmp_path), image_size=4, val_dir=str(tmp_path / "held_out")).setup()

    def test_a_missing_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            ImageFolder(str(tmp_path / "nowhere"), image_size=4).setup()

    def test_too_much_for_the_memory_raises_before_decoding(self, tmp_path, monkeypatch):
        folder_of(tmp_path)
        needed = 20 * 3 * 64 * 64 + 2 * 20 * 3 * 64 * 64
        monkeypatch.setattr(images, "available_memory_bytes", lambda: needed - 1)
        with pytest.raises(MemoryError, match="20 images of 64x64 .* smaller image_size"):
            ImageFolder(str(tmp_path), image_size=64).setup()
        monkeypatch.setattr(images, "available_memory_bytes", lambda: needed)
        ImageFolder(str(tmp_path), image_size=64).setup()

    def test_memory_is_read_in_bytes(self):
        assert 2**26 < images.available_memory_bytes() < 2**50


@pytest.mark.parametrize("name", ["Digits", "FashionMNIST", "CIFAR10"])
def test_arguments_of_the_base_class_can_be_configured(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    path = f"fm_stages.data.{name}"
    config = parser.parse_object({"data": {"class_path": path, "init_args": {"batch_size": 32, "flip": True}}})
    data = parser.instantiate(config).data
    assert (data.batch_size, data.val_batch_size, data.flip) == (32, 32, True)
    with pytest.raises(Exception, match="batchsize"):
        parser.parse_object({"data": {"class_path": path, "init_args": {"batchsize": 32}}})
