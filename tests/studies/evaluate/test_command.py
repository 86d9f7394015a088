"""``fm-stages evaluate``: numbers of drawn images and of files, what the report says of them, and what is refused."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import yaml
from PIL import Image
from torch import nn

from fm_stages.data import Digits
from fm_stages.flow import sample
from fm_stages.networks import DiT
from fm_stages.studies import ClassifierFeatures
from fm_stages.studies.evaluate.memorization import numbers_of
from fm_stages.studies.features.classifier import Classifier, write_classifier
from fm_stages.training import CONFIG_KEY
from tests.data import latent_folders
from tests.studies.drawn_files import pixels_of

NUM, STEPS = 70, 2
DRAW = ("--num", NUM, "--num_steps", STEPS)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints/last.ckpt")


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    """A classifier with random weights, of 12 features."""
    network = Classifier(1, 8, 10, num_features=12)
    network.initialise(0)
    file = tmp_path_factory.mktemp("features") / "f.safetensors"
    write_classifier(file, network, 0.25, {"data": "Digits"})
    return file


@pytest.fixture
def evaluate(command, features):
    """Calls the command with the classifier; the report, if there is one, and what was printed."""

    def run(*arguments, out="out", by=None):
        done = command("evaluate", "--features", by or features, "--out", out, "--num_memorization", 0, *arguments)
        file = Path(out, "evaluation.json")
        done.report = json.loads(file.read_text()) if file.is_file() else None
        return done

    return run


@pytest.fixture(scope="module")
def digits() -> dict[str, torch.Tensor]:
    """Pixels of both splits."""
    data = Digits()
    data.setup()
    loaders = {"train": data.train_dataloader(), "held_out": data.val_dataloader()}
    return {name: loader.dataset.images for name, loader in loaders.items()}


@pytest.fixture
def drawn(random_network) -> torch.Tensor:
    """Pixels of what the checkpoint draws, by the network itself."""
    values = sample(random_network(2), torch.arange(NUM) % 10, (1, 8, 8), num_steps=STEPS)
    return pixels_of(values).to(torch.uint8)


def plain_fid(one: torch.Tensor, other: torch.Tensor, features: Path) -> float:
    """By scipy, in float64."""
    with torch.no_grad():
        a, b = (ClassifierFeatures(str(features)).eval()(x)[0].double().numpy() for x in (one, other))
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False)) - 2 * np.trace(root)


class TestCheckpoint:
    def test_numbers(self, evaluate, ckpt, features, drawn, digits):
        done = evaluate("--ckpt", ckpt, *DRAW)
        assert done.status == 0, done.err
        scores, yardstick = done.report["scores"], done.report["yardstick"]
        assert scores["fid"] == pytest.approx(plain_fid(drawn, digits["held_out"], features), rel=1e-3)
        assert list(scores) == [
            *("fid", "kid", "kid_std", "inception_score", "inception_score_std"),
            *("precision", "recall", "mifid", "memorization_distance"),
        ]  # fmt: skip
        assert list(yardstick) == list(scores)
        assert yardstick["fid"] < scores["fid"] / 3
        assert yardstick["precision"] > scores["precision"]
        assert f"| {scores['fid']:.4g} " in done.out

    def test_what_the_report_says(self, evaluate, ckpt, features):
        report = evaluate(
            "--ckpt", ckpt, *DRAW, "--num_steps", 4, "--guidance_scale", 2, "--guidance_interval", 0.3, 0.8
        ).report
        samples = report["samples"]
        assert (samples["num"], samples["checkpoint"], samples["step"]) == (NUM, str(ckpt), 7)
        assert (samples["weights"], len(samples["weights_digest"])) == ("ema", 12)
        assert (samples["solver"], samples["num_steps"], samples["seed"]) == ("euler", 4, 0)
        assert (samples["guidance_scale"], samples["guidance_interval"]) == (2.0, [0.3, 0.8])
        assert report["reference"]["split"] == "held_out"
        assert (report["reference"]["num"], report["other"]["num"]) == (359, NUM)
        assert report["features"]["class"].endswith("ClassifierFeatures")
        assert (report["features"]["num_features"], report["features"]["test_accuracy"]) == (12, 0.25)
        assert len(report["features"]["file_sha256"]) == len(report["features"]["weights_sha256"]) == 64
        assert report["classes"]["samples"] == [7] * 10
        assert sum(report["classes"]["reference"]) == 359
        assert report["versions"]["torch-fidelity"].startswith("0.4")
        files = {path.name for path in Path("out").iterdir()}
        assert files == {"evaluation.json", "evaluation.md", "evaluation.csv", "evaluation.png"}
        text = Path("out/evaluation.md").read_text()
        for said in ("weights ema", "guidance_scale 2.0", "359 of 359 held-out images of Digits", "10, 7 images each"):
            assert said in text

    def test_training_images_as_reference(self, evaluate, ckpt, features, drawn, digits):
        report = evaluate("--ckpt", ckpt, *DRAW, "--reference", "train").report
        assert (report["reference"]["split"], report["reference"]["num"]) == ("train", 1438)
        assert (report["other"]["split"], report["other"]["num"]) == ("held_out", NUM)
        assert report["scores"]["fid"] == pytest.approx(plain_fid(drawn, digits["train"], features), rel=1e-3)

    def test_raw_weights_and_fewer_reference_images(self, evaluate, ckpt, features, random_network, digits):
        report = evaluate("--ckpt", ckpt, *DRAW, "--weights", "raw", "--num_reference", 100).report
        values = sample(random_network(1), torch.arange(NUM) % 10, (1, 8, 8), num_steps=STEPS)
        plain = plain_fid(pixels_of(values).to(torch.uint8), digits["held_out"][:100], features)
        assert report["scores"]["fid"] == pytest.approx(plain, rel=1e-3)
        assert report["samples"]["weights"] == "raw"

    def test_folders_beside_the_run(self, command, features, write_checkpoint):
        """One for each way to draw, whatever tells two of them apart."""
        path = write_checkpoint(Path("run/checkpoints/last.ckpt"))
        for other in ((), ("--labels", "1"), ("--seed", "1"), ("--num_reference", "99"), ()):
            words = ("--ckpt", path, "--features", features, *DRAW, "--num_memorization", 0, *other)
            done = command("evaluate", *words)
            assert done.status == 0, done.err
        there = list(Path("run/evaluation").glob("step_7_ema_euler_2_num_70_ClassifierFeatures_*/evaluation.json"))
        assert len(there) == len(list(Path("run/evaluation").iterdir())) == 4

    def test_experts(self, command, ckpt, features):
        both = ("--expert", ckpt, "--expert", ckpt, "--split", 0.4)
        done = command("evaluate", *both, "--features", features, *DRAW, "--num_memorization", 0, "--solver", "heun")
        assert done.status == 0, done.err
        (folder,) = (ckpt.parent.parent / "evaluation").glob("step_7+7_ema+ema_heun_2_num_70_ClassifierFeatures_*")
        samples = json.loads((folder / "evaluation.json").read_text())["samples"]
        assert (samples["checkpoint"], samples["split"], samples["solver"]) == ([str(ckpt)] * 2, 0.4, "heun")

    def test_without_torch_fidelity(self, evaluate, ckpt, monkeypatch):
        """As its import fails; FID and MIFID are there all the same."""
        monkeypatch.setattr("fm_stages.studies.evaluate.scores.has_fidelity", lambda: False)
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        done = evaluate("--ckpt", ckpt, *DRAW)
        assert done.status == 0, done.err
        assert list(done.report["scores"]) == ["fid", "mifid", "memorization_distance"]
        why = "torch-fidelity is not installed: pip install 'fm-stages[eval]'"
        assert f"Not computed: kid, inception_score, precision, recall: {why}." in done.out

    def test_wandb(self, evaluate, ckpt):
        done = evaluate("--ckpt", ckpt, *DRAW, "--wandb", "quality")
        assert done.status == 0, done.err
        assert list(Path("out/wandb").glob("offline-run-*"))


class Sums(nn.Module):
    """Any network: sums of rows and of columns."""

    def forward(self, images):
        return images.float().sum((1, 2)) / 100


class Same(nn.Module):
    def forward(self, images):
        return torch.ones(len(images), 3)


class NotFinite(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :3].float() / (images.flatten(1).sum(1, keepdim=True) == 0)


class Wrong(nn.Module):
    def forward(self, images):
        return images.float().mean((1, 2, 3))


HERE = "tests.studies.evaluate.test_command"


class Three(Sums):
    """Gives more than features and logits."""

    def forward(self, images):
        return (super().forward(images),) * 3


class Dark(Sums):
    """Features of sum 0 for every image, none of them constant."""

    def forward(self, images):
        sums = super().forward(images)
        return torch.cat([sums, -sums], 1)


class Drawn(Sums):
    """Weights that are drawn anew by every process."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.tensor(float(os.getpid())))


class InvertedDigits(Digits):
    """Training images that are others than those of the digits."""

    def read(self):
        splits = super().read()
        return splits._replace(train_images=255 - splits.train_images)


class TestExtractors:
    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch):
        monkeypatch.syspath_prepend(Path(__file__).parents[3])

    def test_any_network(self, evaluate, ckpt):
        done = evaluate("--ckpt", ckpt, *DRAW, by=f"{HERE}.Sums")
        assert done.status == 0, done.err
        assert done.report["features"]["num_features"] == 8
        assert "inception_score" not in done.report["scores"]
        assert "Not computed: inception_score: the extractor gives no class scores." in done.out

    @pytest.mark.parametrize(
        ("network", "complaint"),
        [
            ("Same", "the extractor gives all 359 held-out images the same features"),
            ("NotFinite", "NotFinite gives features that are not finite"),
            ("Wrong", "Wrong gives shape (2,) for 2 images: features are (B, F)"),
            ("Three", "Three gives tuple for 2 images: features are (B, F)"),
            ("Missing", "Missing"),
        ],
    )
    def test_what_is_none(self, evaluate, ckpt, network, complaint):
        done = evaluate("--ckpt", ckpt, *DRAW, by=f"{HERE}.{network}")
        assert done.status == 2
        assert complaint in done.err.splitlines()[-1]
        assert not list(Path().rglob("evaluation.*"))

    def test_features_without_a_direction(self, evaluate, ckpt):
        done = evaluate("--ckpt", ckpt, *DRAW, by=f"{HERE}.Dark")
        assert done.status == 0, done.err
        assert {"fid", "precision"} <= set(done.report["scores"])
        assert "Not computed: mifid, memorization_distance: all features of one kind of images sum to 0" in done.out


class TestMemorization:
    @pytest.fixture
    def study(self, command, features):
        """With the study of memorization, of 30 samples unless told otherwise; the report."""

        def run(*arguments, by=features):
            done = command("evaluate", "--features", by, "--out", "out", "--num_memorization", 30, *arguments)
            assert done.status == 0, done.err
            done.report = json.loads(Path("out/evaluation.json").read_text())
            return done

        return run

    def test_checkpoint(self, study, ckpt):
        done = study("--ckpt", ckpt, *DRAW)
        found = done.report["memorization"]
        assert found["summaries"]["samples"]["num"] == 30
        assert (
            found["summaries"]["memorizer"]["copies"]["value"] > 0.9 > found["summaries"]["samples"]["copies"]["value"]
        )
        assert "EMA weights" in found["index"]["of"]
        assert "## Memorization" in Path("out/evaluation.md").read_text()
        assert {"closest.png", "memorization_index.png", "memorization.json"} <= {p.name for p in Path("out").iterdir()}
        assert "closest.png" in done.out

    def test_copies_among_files(self, study, digits):
        """Every fifth is a training image; there is no network whose index could be measured."""
        images = torch.cat([digits["held_out"][:24], digits["train"][:6]])[torch.arange(30).view(6, 5).T.flatten()]
        write_pngs("foreign", images)
        found = study("--samples", "foreign", "--data", "Digits").report["memorization"]
        copies = found["summaries"]["samples"]["copies"]["value"]
        assert copies == pytest.approx(0.2, abs=0.04)
        assert found["index"] is None
        assert not Path("out/memorization_index.png").exists()

    def test_copies_of_what_the_network_was_trained_on(self, study, command, ckpt, digits, monkeypatch):
        """Other data are named for the reference: what samples may repeat are the training images of their network."""
        monkeypatch.syspath_prepend(Path(__file__).parents[3])
        assert command("sample", "--ckpt", ckpt, "--out", "drawn", *DRAW).status == 0
        for number in range(0, NUM, 2):
            Image.fromarray(digits["train"][number, 0].numpy()).save(f"drawn/images/{number:06d}.png")
        report = study("--samples", "drawn", "--data", f"{HERE}.InvertedDigits").report
        assert report["memorization"]["summaries"]["samples"]["copies"]["value"] == pytest.approx(0.5, abs=0.04)
        assert report["memorization"]["data"] == "Digits"
        assert "Held against the training images of Digits." in report["memorization"]["text"]
        assert report["reference"]["data"] == "InvertedDigits"

    def test_an_earlier_study_is_not_taken_for_this_one(self, study, ckpt):
        study("--ckpt", ckpt, *DRAW)
        study("--ckpt", ckpt, *DRAW, "--num_memorization", 0)
        assert {path.suffix for path in Path("out").iterdir()} == {".png", ".csv", ".md", ".json"}
        assert not list(Path("out").glob("*memorization*"))
        assert not Path("out/closest.png").exists()

    def test_black_images_cost_no_other_number(self, study, digits):
        write_pngs("foreign", torch.zeros(30, 1, 8, 8, dtype=torch.uint8))
        report = study("--samples", "foreign", "--data", "Digits").report
        assert report["memorization"]["text"].startswith("not measured: all 30 samples have one value everywhere")
        assert report["scores"]["fid"] > 0

    def test_latents(self, study, command, write_vae, monkeypatch):
        """Of drawn ones the latents are measured; of pictures there are none."""
        monkeypatch.syspath_prepend(Path(__file__).parents[3])
        path = latent_checkpoint(write_vae)
        done = study("--ckpt", path, *DRAW, by=f"{HERE}.Sums")
        assert done.report["reference"]["pixels"] == "decoded from latents by the VAE"
        assert done.report["memorization"]["summaries"]["samples"]["num"] == 30
        assert command("sample", "--ckpt", path, "--out", "drawn", *DRAW).status == 0
        files = study("--samples", "drawn", by=f"{HERE}.Sums").report
        assert files["memorization"]["text"].startswith("not measured: these are pixels")
        assert files["scores"]["fid"] == pytest.approx(done.report["scores"]["fid"], rel=0.02)  # rounded otherwise


def latent_checkpoint(write_vae) -> Path:
    """A network of latents 4x6x6, whose VAE makes pictures of 3x24x24."""
    latent_folders.write_indexed(Path("latents"), ("latents",), num=200)
    data = {
        "data_dir": "latents",
        "flip": False,
        "val_fraction": 0.4,
        "vae": str(write_vae(Path("vae"))),
        "batch_size": 8,
    }
    sizes = {"input_size": latent_folders.SHAPE[-1], "patch_size": 3, "in_channels": 4, "hidden_size": 16, "depth": 1}
    sizes |= {"num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    state = {f"network.{name}": weight for name, weight in DiT(**sizes).state_dict().items()}
    config = {
        "model": {"network": {"class_path": "fm_stages.networks.DiT", "init_args": sizes}},
        "data": {"class_path": "fm_stages.data.Latents", "init_args": data},
    }
    torch.save({"state_dict": state, "global_step": 3, CONFIG_KEY: yaml.safe_dump(config)}, "latents.ckpt")
    return Path("latents.ckpt")


class TestFiles:
    @pytest.mark.parametrize("form", ["png", "npz", "safetensors"])
    def test_what_sample_wrote_is_worth_what_its_checkpoint_is(self, evaluate, command, ckpt, form):
        assert command("sample", "--ckpt", ckpt, "--out", "drawn", "--format", form, *DRAW).status == 0
        done = evaluate("--samples", "drawn", out="of_files")
        assert done.status == 0, done.err
        direct = evaluate("--ckpt", ckpt, *DRAW).report
        for name, value in direct["scores"].items():
            assert done.report["scores"][name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
        said, drawn = done.report["samples"], direct["samples"]
        assert {name: said[name] for name in drawn} == drawn
        assert done.report["classes"] == direct["classes"]

    def test_default_folders(self, command, ckpt, features):
        assert command("sample", "--ckpt", ckpt, "--out", "drawn", *DRAW).status == 0
        assert command("evaluate", "--samples", "drawn", "--features", features, "--num", 30).status == 0
        assert json.loads(Path("drawn/evaluation/evaluation.json").read_text())["samples"]["num"] == 30
        assert command("sample", "--ckpt", ckpt, "--out", "drawn", *DRAW).status == 0  # goes on as before

    def test_a_folder_of_images_says_nothing_of_itself(self, evaluate, digits, features):
        write_pngs("foreign", digits["train"][:60])
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert done.status == 0, done.err
        plain = plain_fid(digits["train"][:60], digits["held_out"], features)
        assert done.report["scores"]["fid"] == pytest.approx(plain, rel=1e-3)
        said = done.report["samples"]
        assert {said[name] for name in ("step", "weights", "solver", "num_steps", "guidance_scale", "seed")} == {
            "unknown"
        }
        assert done.report["classes"]["samples"] is None
        assert "drawn with: unknown, the files do not say: step, weights, weights_digest, solver" in done.out

    def test_class_folders_and_colours_that_are_grey(self, evaluate, digits):
        for label in (0, 3):
            write_pngs(f"foreign/{label}", digits["train"][20 * label : 20 * label + 20], mode="RGB")
        report = evaluate("--samples", "foreign", "--data", "Digits").report
        assert report["classes"]["samples"] == [20, 0, 0, 20, 0, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_an_array_file(self, evaluate, digits, features, save):
        save("foreign.npz", arr_0=digits["train"][:60].movedim(1, -1).numpy(), arr_1=np.arange(60) % 10)
        report = evaluate("--samples", "foreign.npz", "--data", "Digits").report
        plain = plain_fid(digits["train"][:60], digits["held_out"], features)
        assert report["scores"]["fid"] == pytest.approx(plain, rel=1e-3)
        assert report["classes"]["samples"] == [6] * 10

    def test_labels_of_no_class_are_told(self, evaluate, digits):
        labels = np.array([3] * 20 + [117] * 5)
        np.savez("foreign.npz", arr_0=digits["train"][:25].movedim(1, -1).numpy(), arr_1=labels)
        done = evaluate("--samples", "foreign.npz", "--data", "Digits")
        assert done.status == 0, done.err
        assert done.report["classes"]["samples"] == [0, 0, 0, 20, 0, 0, 0, 0, 0, 0]
        assert "WARNING: 5 samples have labels of no class of the data (up to 117): not counted." in done.out

    def test_images_that_cannot_be_read_are_counted_and_named(self, evaluate, digits, features):
        write_pngs("foreign", digits["train"][:60])
        Path("foreign/000007.png").write_bytes(Path("foreign/000007.png").read_bytes()[:40])
        Path("foreign/000011.png").write_text("no image")
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert done.status == 0, done.err
        kept = [i for i in range(60) if i not in (7, 11)]
        plain = plain_fid(digits["train"][kept], digits["held_out"], features)
        assert done.report["scores"]["fid"] == pytest.approx(plain, rel=1e-3)
        assert (done.report["samples"]["num"], done.report["samples"]["num_skipped"]) == (58, 2)
        assert "WARNING: 2 of 60 samples could not be read and are left out: foreign/000007.png:" in done.out
        assert "foreign/000011.png" in done.out

    def test_fewer_images_than_features(self, evaluate, digits):
        write_pngs("foreign", digits["train"][:9])
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert done.status == 0, done.err
        assert "WARNING: 9 samples for 12 features: their covariance is singular" in done.out
        assert "take 13 at least, better 120" in done.out
        assert "Not computed: inception_score: the Inception score needs 20 images or more, there are 9." in done.out

    def test_one_image_over_and_over(self, evaluate, digits):
        write_pngs("foreign", digits["train"][:1].expand(30, -1, -1, -1))
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert done.status == 0, done.err
        assert "WARNING: All 30 samples have the same features" in done.out
        assert done.report["scores"]["recall"] == 0


def write_pngs(folder: str, images: torch.Tensor, mode: str = "L") -> None:
    Path(folder).mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).convert(mode).save(f"{folder}/{number:06d}.png")


class TestMistakes:
    """Each costs one line and no report."""

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ([], "--ckpt names a checkpoint to draw from, --samples images in files: give one of them"),
            (["--ckpt", "x.ckpt"], "no checkpoint at x.ckpt"),
            (["--samples", "x"], "--samples x does not say which real images"),
            (["--samples", "x", "--data", "Digits"], "--samples x: there is no such folder or file"),
            (["--samples", "x", "--num_steps", 3], "--num_steps is of drawing"),
            (["--samples", "x", "--ckpt", "y"], "--ckpt is of drawing, and --samples x was drawn before"),
            (["--samples", "x", "--data", "Digitz"], "--data Digitz"),
            (["--ckpt", "x", "--num", 1], "--num 1 must be 2 or more"),
            (["--ckpt", "x", "--num_reference", 0], "--num_reference 0 must be 2 or more"),
            (["--ckpt", "x", "--num_memorization", -1], "--num_memorization -1 must be 0 or more"),
            (["--ckpt", "x", "--reference", "test"], "test"),
            (["--ckpt", "x", "--batch_size", 0], "--batch_size 0 must be 1 or more"),
            (["--ckpt", "x", "--solver", "rk45"], "--solver rk45: there is no such solver"),
            (["--nums", 3], "--nums"),
        ],
    )
    def test_options(self, evaluate, arguments, complaint):
        done = evaluate(*arguments)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert complaint in done.err
        assert not list(Path().iterdir())

    def test_help_is_short(self, command):
        done = command("evaluate", "--help")
        assert done.status == 0
        assert "--guidance_interval LO HI" in done.out
        assert len(done.out) < 8000

    def test_no_extractor(self, command, ckpt):
        done = command("evaluate", "--ckpt", ckpt)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "features" in done.err

    @pytest.mark.parametrize(
        ("features", "complaint"),
        [
            ("nowhere.safetensors", "there is no file nowhere.safetensors: fm-stages features trains a classifier"),
            ("InceptionFeatures", "put it at"),
            ("DinoFeatures", "fetch https://huggingface.co/timm/vit_large_patch14_dinov2"),
        ],
    )
    def test_extractors_without_weights(self, evaluate, ckpt, features, complaint, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", "nothing")
        done = evaluate("--ckpt", ckpt, *DRAW, by=features)
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert complaint in done.err

    def test_sha256(self, evaluate, ckpt, features):
        done = evaluate("--ckpt", ckpt, *DRAW, "--features.sha256", "12ab")
        assert (done.status, done.err.count("\n")) == (2, 1), done.err
        assert "not 12ab: it is another file, or was damaged" in done.err

    def test_empty_folder(self, evaluate):
        Path("empty").mkdir()
        done = evaluate("--samples", "empty", "--data", "Digits")
        assert done.status == 2
        assert "empty holds no images: give a folder of images or of class folders" in done.err

    def test_no_image_that_can_be_read(self, evaluate):
        Path("bad").mkdir()
        Path("bad/a.png").write_text("no image")
        Path("bad/b.png").write_text("no image")
        done = evaluate("--samples", "bad", "--data", "Digits")
        assert done.status == 2
        assert "samples: 0 of 2 images could be read (bad/a.png: cannot identify image file" in done.err

    def test_unfinished_drawing(self, evaluate, command, ckpt):
        assert command("sample", "--ckpt", ckpt, "--out", "drawn", *DRAW).status == 0
        file = Path("drawn/sampling.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))
        done = evaluate("--samples", "drawn")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "says that drawing was not finished: call the same fm-stages sample --out drawn again" in done.err
        whole = json.loads(file.read_text())
        no_seed = {name: value for name, value in whole["settings"].items() if name != "seed"}
        for damaged in ({}, {**whole, "checkpoint": 5}, {**whole, "checkpoint": []}, {**whole, "settings": no_seed}):
            file.write_text(json.dumps(damaged))
            done = evaluate("--samples", "drawn")
            assert (done.status, "is not what fm-stages sample writes" in done.err) == (2, True), done.err

    def test_a_checkpoint_that_is_gone(self, evaluate, command, write_checkpoint):
        path = write_checkpoint(Path("run/checkpoints/last.ckpt"))
        assert command("sample", "--ckpt", path, "--out", "drawn", *DRAW).status == 0
        path.unlink()
        done = evaluate("--samples", "drawn")
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "which is not there (any more): name the real images with --data" in done.err
        assert evaluate("--samples", "drawn", "--data", "Digits").status == 0

    def test_values_of_a_network_are_no_pixels(self, evaluate, command, write_checkpoint):
        path = write_checkpoint(Path("imported.ckpt"), data=False)
        arguments = ("--ckpt", path, "--out", "drawn", "--format", "safetensors", *DRAW)
        assert command("sample", *arguments).status == 0
        done = evaluate("--samples", "drawn", "--data", "Digits")
        assert done.status == 2
        assert "holds values of a network (torch.float32), no pixels" in done.err
        done = evaluate("--ckpt", path, *DRAW)
        assert "imported.ckpt names no data to compare with: give it with --data" in done.err
        assert evaluate("--ckpt", path, *DRAW, "--data", "Digits").status == 0

    def test_sizes(self, evaluate, digits):
        write_pngs("foreign", digits["train"][:9])
        Image.fromarray(np.zeros((9, 8), np.uint8)).save("foreign/000004.png")
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert done.status == 2
        assert "foreign/000004.png is 1x9x8 (channels, height, width), the reference images are 1x8x8" in done.err
        np.savez("foreign.npz", arr_0=np.zeros((9, 14, 14, 1), np.uint8))
        done = evaluate("--samples", "foreign.npz", "--data", "Digits")
        assert (
            "an image of foreign.npz is 1x14x14 (channels, height, width), the reference images are 1x8x8" in done.err
        )
        np.savez("foreign.npz", arr_0=np.zeros((9, 8, 8, 1)))
        assert "arr_0 is float64 (9, 8, 8, 1), not uint8 (N, H, W, C)" in evaluate(
            "--samples", "foreign.npz", "--data", "Digits"
        ).err  # fmt: skip

    def test_colours(self, evaluate):
        Path("foreign").mkdir()
        for number in range(3):
            Image.fromarray(np.full((8, 8, 3), (9, 8, number), np.uint8)).save(f"foreign/{number}.png")
        done = evaluate("--samples", "foreign", "--data", "Digits")
        assert "foreign/0.png is 3x8x8 (channels, height, width), the reference images are 1x8x8" in done.err

    def test_more_than_there_are(self, evaluate, digits, ckpt):
        done = evaluate("--ckpt", ckpt, *DRAW, "--num_reference", 360)
        assert "--num_reference 360: Digits has 359 held-out images" in done.err
        write_pngs("foreign", digits["train"][:9])
        done = evaluate("--samples", "foreign", "--data", "Digits", "--num", 10)
        assert "--num 10: foreign holds 9 images" in done.err


def on_ranks(launch, tmp_path, ckpt, features, num_ranks, calls):
    folder = tmp_path / f"ranks{num_ranks}"
    folder.mkdir()
    whole = ["--features", str(features), "--num_memorization", "0", "--batch_size", "16"]
    (folder / "arguments.json").write_text(
        json.dumps([[*whole, *map(str, call), "--out", str(folder / f"out{i}")] for i, call in enumerate(calls)])
    )
    return launch(Path(__file__).with_name("evaluate_on_ranks.py"), folder, num_ranks, "cpu")


def check_ranks(found, evaluate, calls, num_ranks, features):
    for number, call in enumerate(calls):
        reports = [rank[number] for rank in found]
        if isinstance(reports[0], str):
            continue
        alone = evaluate(*call, "--batch_size", 16, out=f"one{number}").report
        for report in reports:
            assert report["scores"].keys() == alone["scores"].keys()
            for kind in ("scores", "yardstick"):
                for name, value in alone[kind].items():
                    assert report[kind][name] == pytest.approx(value, rel=1e-6, abs=1e-9), (num_ranks, name)
            assert report["classes"] == alone["classes"]
            assert report["samples"] == alone["samples"]
            if found := alone.get("memorization"):
                own = numbers_of(report["memorization"])
                assert own == pytest.approx(numbers_of(found), rel=1e-3)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_find_what_one_finds(launch, tmp_path, evaluate, ckpt, features, digits, num_ranks):
    """Drawn images, files of which one cannot be read, and files of which a rank meets a wrong one."""
    write_pngs("foreign", digits["train"][:20])
    Path("foreign/000007.png").write_text("no image")
    write_pngs("sizes", digits["train"][:40])
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("sizes/000020.png")  # which rank 1 meets
    foreign, sizes = ("--samples", Path("foreign").absolute()), ("--samples", Path("sizes").absolute())
    calls = [
        ["--ckpt", ckpt, *DRAW, "--num_memorization", 20],
        [*foreign, "--data", "Digits"],
        [*sizes, "--data", "Digits"],
        [*foreign, "--data", "Digits", "--features", f"{HERE}.Drawn"],
    ]
    found = on_ranks(launch, tmp_path, ckpt, features, num_ranks, calls)
    check_ranks(found, evaluate, calls, num_ranks, features)
    assert found[0][1]["samples"]["num"] == 19
    said = [rank[2] for rank in found]
    assert "000020.png is 1x9x8" in said[1]
    assert all(f"rank 1 cannot go on: {said[1]}" == message for rank, message in enumerate(said) if rank != 1)
    assert all("the weights of --features" in rank[3] for rank in found)
