"""``fm-stages features``: a classifier that learns, the same one from the same seed, in one file."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from fm_stages.data import Digits
from fm_stages.studies import ClassifierFeatures
from fm_stages.studies.features.command import _parser, train_classifier

CONFIG = Path(__file__).parents[3] / "configs/features_fashion_mnist.yaml"


def test_learns_digits(command):
    done = command(
        "features", "--data", "Digits", "--data.init_args.batch_size", 64, "--num_epochs", 8, "--out", "d/f.safetensors"
    )
    assert done.status == 0, done.err
    with safe_open("d/f.safetensors", framework="pt") as file:
        header = file.metadata()
    accuracy = float(header["test_accuracy"])
    assert accuracy > 0.95
    assert f"test accuracy {100 * accuracy:.2f} % of 359 held-out images (10 classes, chance 10 %)" in done.out
    assert json.loads(header["training"])["data"]["init_args"]["batch_size"] == 64
    assert json.loads(header["settings"])["image_size"] == 8
    assert len(header["weights_sha256"]) == 64
    assert [path.name for path in Path("d").iterdir()] == ["f.safetensors"]
    data = Digits()
    data.setup()
    features = ClassifierFeatures("d/f.safetensors").eval()
    batch = data.val_dataloader().dataset[torch.arange(359), torch.arange(359)]
    with torch.no_grad():
        found = features(data.to_pixels(batch["x1"]))[1].argmax(1)
    assert (found == batch["labels"]).double().mean().item() == pytest.approx(accuracy)


def test_the_seed_makes_the_file():
    data = Digits(batch_size=256)
    data.setup()
    one, same, other = (train_classifier(data, 16, 1, seed=seed, progress=False).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["logits.weight"], other["logits.weight"])


def test_shipped_config():
    lines = CONFIG.read_text().splitlines()
    assert lines[0] == f"# fm-stages features --config configs/{CONFIG.name}"
    options = _parser().parse_args(["--config", str(CONFIG), "--data.init_args.image_size", "14"])
    assert options.data.init_args.image_size == 14
    assert options.out == "runs/features_fashion_mnist/features.safetensors"
    assert set(yaml.safe_load(CONFIG.read_text())) <= set(options.as_dict())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--num_epochs", 0], "--num_epochs 0 must be 1 or more"),
        (["--lr", 0], "--lr 0.0 must be above 0"),
        (["--out", "f.pth"], "--out f.pth: the file is a .safetensors"),
        (["--out", "/proc/x/f.safetensors"], "cannot be written"),
        (["--data", "Digitz"], "Digitz"),
        (["--epochs", 3], "--epochs"),
        (["--data.init_args.batch_size", 5000], "batch_size=5000"),
    ],
)
def test_mistakes(command, arguments, complaint):
    done = command("features", "--data", "Digits", "--out", "f.safetensors", *arguments)
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert complaint in done.err
    assert not list(Path().iterdir())
