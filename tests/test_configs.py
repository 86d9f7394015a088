"""Every shipped configuration through the real command line: it parses, builds what it says, and takes two steps."""

import functools
import inspect
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
import yaml
from torchvision.datasets import CIFAR10

from fm_stages import cli
from fm_stages.networks import DiT, UNet
from fm_stages.training import CONFIG_KEY, TrainingCLI, read_checkpoint
from tests.data import latent_folders

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
CONFIGS = [file for file in FILES if not file.stem.startswith(("strategy_", "features_"))]
"""Those of ``fit``: a strategy lies on top of another one, and features are a classifier's."""

BASE = Path(cli.__file__).parent / "base.yaml"
SMALL = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"),
    *("--trainer.accelerator=cpu", "--trainer.logger=CSVLogger", "--trainer.enable_progress_bar=false"),
    *("--data.init_args.batch_size=4", "--monitor.every_n_steps=1", "--monitor.window=2"),
    *("--samples.num_samples=1", "--samples.num_steps=1", "--trainer.default_root_dir=run"),
]


def idx(values: np.ndarray) -> bytes:
    """The format of MNIST's files: bytes of unsigned numbers behind their shape."""
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def small_data(tmp_path, monkeypatch) -> None:
    """Some training and four held-out images of each data set, in torchvision's layout; labels 0 to 9 occur."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "data/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for name, num in (("train", 100), ("t10k", 4)):
        (raw / f"{name}-images-idx3-ubyte").write_bytes(idx(generator.integers(0, 256, (num, 28, 28))))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(num) % 10))
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir()
    for name, num in (("data_batch_1", 12), ("test_batch", 4)):
        pixels = generator.integers(0, 256, (num, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(num)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "_check_exists", lambda self: True)
    monkeypatch.setenv("FM_STAGES_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(latent_folders, "SHAPE", (4, 32, 32))
    for split, num in (("train", 12), ("val", 4)):
        latent_folders.write_indexed(tmp_path / "data/imagenet256_latents" / split, num=num, seed=num)


@pytest.fixture
def shallow_networks(monkeypatch) -> None:
    """One narrow block in place of twelve, 64 channels of 256: what a config says of the data is tried all the same."""
    make = DiT.__init__

    @functools.wraps(make)
    def make_shallow(self, *args, **kwargs) -> None:
        bound = inspect.signature(make).bind(self, *args, **kwargs)
        width = min(bound.arguments["hidden_size"], 32 * bound.arguments["num_heads"])
        make(**{**bound.arguments, "depth": 1, "hidden_size": width})

    monkeypatch.setattr(DiT, "__init__", make_shallow)
    monkeypatch.setattr("fm_stages.oracle.wiener.MAX_DIMS", 4000)  # a covariance of latents takes a CPU 15 s
    make_unet = UNet.__init__

    @functools.wraps(make_unet)
    def make_narrow(self, *args, channels, **kwargs) -> None:
        make_unet(self, *args, channels=tuple(min(width, 64) for width in channels), **kwargs)

    monkeypatch.setattr(UNet, "__init__", make_narrow)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
class TestEachConfig:
    def test_takes_two_steps(self, config, small_data, shallow_networks, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which the command sets: so that it is unset afterwards
        monkeypatch.setattr("fm_stages.plots.save", lambda figure, path: path)
        monkeypatch.setattr(sys, "argv", ["fm-stages", "fit", "--config", str(config), *SMALL])
        cli.main()
        checkpoint = read_checkpoint("run/checkpoints/last.ckpt")
        assert checkpoint["global_step"] == 2
        shipped, used = yaml.safe_load(config.read_text()), yaml.safe_load(checkpoint[CONFIG_KEY])
        network, data = used["model"]["network"], used["data"]
        assert network["class_path"] == shipped["model"]["network"]["class_path"]
        assert network["init_args"].items() >= shipped["model"]["network"]["init_args"].items()
        assert data["class_path"] == shipped["data"]["class_path"]
        assert used["model"]["optimizer"]["init_args"].items() >= shipped["model"]["optimizer"]["init_args"].items()
        assert "held-out EMA, all t" in capsys.readouterr().out

    def test_is_a_short_overlay_that_says_how_to_run_it(self, config):
        lines = config.read_text().splitlines()
        assert len(lines) <= 40
        assert lines[0].startswith(f"# fm-stages fit --config configs/{config.name}")
        assert lines[1].startswith("# ")

    def test_writes_into_a_folder_of_its_own(self, config):
        folder = yaml.safe_load(config.read_text())["trainer"]["default_root_dir"]
        assert folder == f"runs/{config.stem}"


@pytest.mark.parametrize("size", ["b2", "xl2"])
def test_imagenet_follows_sit(size):
    """The published recipe, in every number that makes the result."""
    config = yaml.safe_load((CONFIGS[0].parent / f"imagenet256_dit_{size}.yaml").read_text())
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert model["optimizer"]["init_args"] == {"lr": 1e-4, "weight_decay": 0.0}
    assert (model["label_dropout"], model["ema_decay"]) == (0.1, 0.9999)
    assert (data["batch_size"], data["flip"], data["normalisation"]) == (256, True, "vae")
    assert trainer["gradient_clip_val"] is None
    assert not {"path", "timesteps", "weighting", "target", "warmup_steps"} & model.keys()  # linear, uniform, constant


def test_the_defaults_are_package_data():
    assert BASE.is_file()
    assert set(yaml.safe_load(BASE.read_text())) == {"seed_everything", "trainer", "model"}


def test_parsing_reads_no_data_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("FM_STAGES_DATA", os.fspath(tmp_path / "nowhere"))
    for config in CONFIGS:
        if not config.stem.startswith(("cifar", "imagenet")):  # whose networks take seconds to build
            TrainingCLI(["--config", str(config), "--trainer.logger=false"], run=False)
    assert list(tmp_path.iterdir()) == []
