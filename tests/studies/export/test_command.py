"""Exported folders draw our images in a process without the package; exported files are checkpoints again."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fm_stages import cli
from fm_stages.flow import Guidance, keyed_normal, sample
from fm_stages.networks import DiT, UNet
from fm_stages.networks.embeddings import LabelEmbedding
from fm_stages.studies import export_file, export_folder
from fm_stages.studies.export.card import card
from fm_stages.studies.export.pipeline import FlowMatchingPipeline, VelocityNetwork
from fm_stages.studies.export.source import source_of
from fm_stages.studies.models import load_trained
from fm_stages.training import CONFIG_KEY, init_from

STEPS, SEED = 7, 3
LABELS = torch.tensor([4, -1, 0, 2])
GUIDED = {"guidance_scale": 2.5, "guidance_interval": (0.2, 0.7)}
DIT = {"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3}
MODERN = {"qk_norm": True, "rms_norm": True, "swiglu": True, "rotary": True, "time_scale": 1000.0}
UNET = {"input_size": 8, "in_channels": 3, "channels": [16, 24], "layers_per_block": 1, "head_size": 8}
UNET |= {"norm_groups": 4, "attention_levels": [1], "activation_checkpointing": True}

NETWORKS = {
    "dit": (DiT, {**DIT, "num_classes": 5}, {}),
    "modern": (DiT, {**DIT, **MODERN, "num_classes": 5}, {}),
    "unet": (UNet, {**UNET, "num_classes": 5}, {}),
    "cosine": (DiT, {**DIT, "num_classes": 5}, {"path": {"class_path": "fm_stages.flow.CosinePath"}}),
    "vp": (DiT, {**DIT, "num_classes": 5}, {"path": {"class_path": "fm_stages.flow.VPPath"}}),
    "unlabelled": (DiT, {**DIT, "num_classes": 0}, {}),
    "labels_only": (DiT, {**DIT, "num_classes": 5, "compile_blocks": True}, {"label_dropout": 0.0}),
    "latents": (DiT, {**DIT, "in_channels": 4, "num_classes": 5, "learn_sigma": True}, {"ema_decay": 0.0}),
}  # fmt: skip
"""Of each exported folder: class and arguments of the network, and other parts of section ``model``."""


def write(path: Path, name: str) -> Path:
    """A checkpoint whose raw and EMA weights are random and differ; its velocity is far from zero."""
    constructor, arguments, model = NETWORKS[name]
    network = {"class_path": f"fm_stages.networks.{constructor.__name__}", "init_args": arguments}
    config = {"model": {"network": network, **model}, "data": {"class_path": "fm_stages.data.CIFAR10"}}
    config["data"]["init_args"] = {"data_dir": "/somewhere/private"}
    if name == "latents":  # as after an import
        del config["data"]
    state = {}
    for prefix in ("network.", "network_ema."):
        torch.manual_seed(len(state))
        made = constructor(**arguments)
        for weight in made.parameters():
            torch.nn.init.normal_(weight, std=0.3 if weight.ndim < 2 else weight[0].numel() ** -0.5)
        state |= {prefix + key: value for key, value in made.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 1200, CONFIG_KEY: yaml.safe_dump(config)}, path)
    return path


def noise(channels: int = 3) -> Tensor:
    return keyed_normal(("sample", SEED), torch.arange(len(LABELS)), (channels, 8, 8))


PLAIN = {"class_labels": LABELS, "latents": noise(), "output_type": "latent", "num_inference_steps": STEPS}
CALLS = {
    "dit": [
        PLAIN,
        {**PLAIN, **GUIDED},
        {**PLAIN, **GUIDED, "guidance_channels": 2},
        {"class_labels": 2, "latents": noise()},  # all else as the folder says, to PIL
        {**PLAIN, "output_type": "np"},
        {**PLAIN, "output_type": "pt"},
        {"batch_size": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"},
        {"class_labels": [5]},
        {"class_labels": [1, 2], "batch_size": 3},
        {**PLAIN, "latents": noise()[:, :2]},
        {"output_type": "jpg"},
        {"guidance_scale": 2, "guidance_interval": (0.7, 0.2)},
        {"num_inference_steps": 0},
    ],
    "modern": [PLAIN, {**PLAIN, **GUIDED}],
    "unet": [PLAIN, {**PLAIN, **GUIDED}],
    "cosine": [{**PLAIN, **GUIDED}],
    "vp": [{**PLAIN, **GUIDED}],
    "unlabelled": [{"latents": noise(), "output_type": "latent"}, {"guidance_scale": 2.0}, {"class_labels": 0}],
    "labels_only": [{}, {"class_labels": 1, "guidance_scale": 2.0}],
    "latents": [{**PLAIN, "latents": noise(4)}, {"class_labels": 1}],
}
DRAWING = {"unet": ("--shift", 3), "dit": ("--num_steps", 5, "--shift", 0.6, "--guidance_scale", 3)}
"""What the folders are exported with."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The folders, each exported by the command, with their checkpoints beside them."""
    root = tmp_path_factory.mktemp("exported")
    for name in NETWORKS:
        arguments = ["--ckpt", write(root / f"{name}.ckpt", name), "--out", root / name, *DRAWING.get(name, ())]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fm-stages", "export", *map(str, arguments)])
            cli.main()
    return root


@pytest.fixture(scope="module")
def drawn(exported) -> dict[str, list]:
    """What diffusers draws from the folders where there is no fm_stages, no network and an empty cache."""
    torch.save({str(exported / name): calls for name, calls in CALLS.items()}, exported / "jobs.pt")
    environment = {**os.environ, "HF_HOME": str(exported / "empty"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment = {key: value for key, value in environment.items() if key not in ("HF_MODULES_CACHE", "HF_HUB_CACHE")}
    script = Path(__file__).with_name("run_exported.py")
    done = subprocess.run(
        [sys.executable, script, exported / "jobs.pt", exported / "drawn.pt"],
        env=environment, cwd=exported, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    results = torch.load(exported / "drawn.pt", weights_only=False)  # PIL images
    return {name: results[str(exported / name)] for name in CALLS}


@pytest.fixture(scope="module")
def ours(exported):
    """What `sample` draws with a checkpoint's EMA weights, in units of the data."""

    def draw(name: str, labels: Tensor = LABELS, num_steps: int = STEPS, **settings) -> Tensor:
        trained = load_trained(exported / f"{name}.ckpt")
        return sample(trained.network, labels, trained.shape, SEED, num_steps, **settings)

    return draw


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.5  # images that the network has changed, and not blown up
    assert expected.std() < 20
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class TestFolder:
    @pytest.mark.parametrize(
        ("name", "call", "settings"),
        [
            ("dit", 0, {"shift": 0.6, "guidance": Guidance(3.0)}),
            ("dit", 1, {"shift": 0.6, "guidance": Guidance(2.5, (0.2, 0.7))}),
            ("dit", 2, {"shift": 0.6, "guidance": Guidance(2.5, (0.2, 0.7), 2)}),
            ("modern", 0, {}),
            ("modern", 1, {"guidance": Guidance(2.5, (0.2, 0.7))}),
            ("unet", 0, {"shift": 3.0}),
            ("unet", 1, {"shift": 3.0, "guidance": Guidance(2.5, (0.2, 0.7))}),
            ("cosine", 0, {"guidance": Guidance(2.5, (0.2, 0.7))}),
            ("vp", 0, {"guidance": Guidance(2.5, (0.2, 0.7))}),
            ("unlabelled", 0, {"num_steps": 50, "labels": torch.full((4,), -1)}),
            ("latents", 0, {}),
        ],
    )
    def test_draws_our_images(self, drawn, ours, name, call, settings):
        assert_same(drawn[name][call], ours(name, **settings))

    def test_the_interval_and_the_shift_matter_here(self, ours):
        settings = [{}, {"guidance": Guidance(2.5)}, {"guidance": Guidance(2.5, (0.2, 0.7))}, {"shift": 0.6}]
        images = [ours("dit", **one) for one in settings]
        for i in range(4):
            for j in range(i):
                assert (images[i] - images[j]).abs().max() > 0.05

    def test_kinds_of_output(self, drawn, ours):
        whole = (ours("dit", shift=0.6, guidance=Guidance(3.0)) / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(drawn["dit"][5], whole, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(drawn["dit"][4]).movedim(-1, 1), whole, rtol=0, atol=1e-4)

    def test_defaults_are_those_of_the_export(self, drawn, ours):
        pictures = np.stack([np.asarray(picture) for picture in drawn["dit"][3]])
        expected = ours("dit", torch.full((4,), 2), 5, shift=0.6, guidance=Guidance(3.0))
        pixels = ((expected.double() + 1) * 127.5).round().clamp(0, 255).movedim(1, -1)
        difference = np.abs(pictures - pixels.numpy())
        assert difference.max() <= 1  # where a value lies in the middle between two pixels
        assert (difference > 0).mean() < 0.01

    def test_generator(self, drawn):
        images = drawn["dit"][6]
        assert images.shape == (2, 3, 8, 8)
        assert (images[0] - images[1]).abs().max() > 0.1

    @pytest.mark.parametrize(
        ("name", "call", "message"),
        [
            ("dit", 7, "there is no class 5: the network knows 0 to 4, and -1 for none"),
            ("dit", 8, "class_labels are of shape (2,): give one, or one for each image"),
            ("dit", 9, "latents have the shape (4, 2, 8, 8), these images need (4, 3, 8, 8)"),
            ("dit", 10, "output_type='jpg': there are pil, np, pt and latent"),
            ("dit", 11, "two increasing times in [0, 1], got 0.7 0.2"),
            ("dit", 12, "at least one step, got num_steps=0"),
            ("unlabelled", 1, "guidance_scale=2.0 needs a network that was trained with labels and without"),
            ("unlabelled", 2, "there is no class 0: the network knows none, leave class_labels out"),
            ("labels_only", 0, "trained with labels only: give class_labels from 0 to 4"),
            ("labels_only", 1, "guidance_scale=2.0 needs a network that was trained with labels and without"),
            ("latents", 1, "the network draws no pixels, take 'latent' and decode them"),
        ],
    )
    def test_refuses(self, drawn, name, call, message):
        assert message in drawn[name][call]

    def test_stochastic_steps_take_a_linear_path(self):
        class Network(VelocityNetwork):
            architecture = DiT

        scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        network = Network({**DIT, "num_classes": 0}).eval()
        assert len(FlowMatchingPipeline(network, scheduler)(num_inference_steps=2).images) == 1
        with pytest.raises(ValueError, match="stochastic_sampling takes a linear path, .* trained on VPPath"):
            FlowMatchingPipeline(network, scheduler, path="VPPath")(num_inference_steps=2)

    def test_card(self, exported):
        card = (exported / "dit" / "README.md").read_text()
        for words in (
            "| data | CIFAR10 |",
            "| steps of training | 1,200 |",
            "EMA, decay 0.9999",
            "| path | LinearPath |",
            "| shift of the time grid | 0.6 |",
            "| guidance | scale 3; for t from 0 to 1 |",
            "t = 0 is noise and t = 1 is data",
            "They need diffusers, scipy, timm, torch.",
            "pipeline(class_labels=[0, 1])",
        ):
            assert words in card
        assert "do not use the scheduler's `scale_noise`" in (exported / "vp" / "README.md").read_text()
        assert "timm" not in (exported / "unet" / "README.md").read_text()
        imported = (exported / "latents" / "README.md").read_text()
        assert "| data | not known: the weights were imported |" in imported
        assert "| weights | EMA; digest" in imported
        assert 'pipeline(class_labels=[0, 1], output_type="latent")' in imported
        for file in exported.glob("*/**/*.*"):
            if file.suffix in (".md", ".json", ".py"):
                assert "/somewhere/private" not in file.read_text()

    def test_the_cards_call_names_classes_that_there_are(self):
        index = {"num_classes": 1, "null_class": True, "path": "LinearPath", "pixels": True}
        assert "pipeline(class_labels=[0])" in card({"network": "DiT, 1 weights"}, index, [])

    def test_a_link_to_an_empty_folder(self, exported, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "link").symlink_to("empty")
        export_folder(load_trained(exported / "dit.ckpt"), tmp_path / "link")
        assert (tmp_path / "empty/model_index.json").exists()

    def test_raw_weights_on_demand(self, exported, tmp_path):
        export_folder(load_trained(exported / "dit.ckpt", "raw"), tmp_path / "raw")
        assert "| weights | raw;" in (tmp_path / "raw/README.md").read_text()
        with safe_open(tmp_path / "raw/network/diffusion_pytorch_model.safetensors", framework="pt") as file:
            found = file.get_tensor("network.pos_embed")
        state = torch.load(exported / "dit.ckpt")["state_dict"]
        assert torch.equal(found, state["network.pos_embed"])
        assert not torch.equal(found, state["network_ema.pos_embed"])

    def test_files_of_source_are_the_packages(self, exported):
        file = (exported / "unet/network/unet_network.py").read_text()
        for part in (UNet, LabelEmbedding):
            assert inspect.getsource(part) in file
        assert "class DiT" not in file
        scheduler = json.loads((exported / "unet/scheduler/scheduler_config.json").read_text())
        assert scheduler["shift"] == 3
        assert "activation_checkpointing" not in (exported / "unet/network/config.json").read_text()
        assert "compile_blocks" not in (exported / "labels_only/network/config.json").read_text()


class TestFile:
    def test_is_a_checkpoint_again(self, exported, tmp_path, ours):
        trained = load_trained(exported / "modern.ckpt")
        out = tmp_path / "sub" / "modern.safetensors"
        export_file(trained, out)
        again = load_trained(out)
        assert (again.weights, again.step, again.digest) == ("ema", 1200, trained.digest)
        assert type(again.data).__name__ == "CIFAR10"
        expected = ours("modern")
        assert torch.equal(sample(again.network, LABELS, again.shape, SEED, STEPS), expected)
        fresh = DiT(**NETWORKS["modern"][1])
        assert init_from(fresh, out).startswith("Started from the EMA weights of")
        assert torch.equal(fresh.pos_embed, trained.network.pos_embed)
        with safe_open(out, framework="pt") as file:
            assert {key: file.metadata()[key] for key in ("global_step", "weights")} == {
                "global_step": "1200",
                "weights": "ema",
            }

    def test_commands_take_it(self, write_checkpoint, tmp_path, command):
        ckpt = write_checkpoint(tmp_path / "last.ckpt")
        done = command("export", "--ckpt", ckpt, "--out", "raw.safetensors", "--weights", "raw")
        assert done.status == 0, done.err
        assert "raw weights of step 7" in done.out
        for file, folder in ((ckpt, "a"), ("raw.safetensors", "b")):
            done = command("sample", "--ckpt", file, "--num", 2, "--out", folder, "--weights", "raw", "--num_steps", 2)
            assert done.status == 0, done.err
        assert Path("a/images/000001.png").read_bytes() == Path("b/images/000001.png").read_bytes()
        done = command("sample", "--ckpt", "raw.safetensors", "--num", 2, "--out", "c", "--weights", "ema")
        assert done.status == 2
        assert "holds no ema weights, only raw ones" in done.err


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--out", "full"], "--out full holds other files (mine.txt, ...): give a new or an empty folder"),
            (["--out", "full/mine.txt"], "--out full/mine.txt is a file: give a new or an empty folder, or a name"),
            (["--out", "x.pt"], "--out x.pt: give a name that ends in .safetensors, or a folder"),
            (["--out", "x.safetensors", "--shift", 2], "--shift is for a folder: a .safetensors holds weights alone"),
            (["--out", "there.safetensors"], "there.safetensors exists already: choose another --out"),
            (["--out", "x", "--shift", 0], "a shift must be positive"),
            (["--out", "x", "--num_steps", 0], "a solver needs at least one step"),
            (["--out", "x", "--guidance_scale", 2, "--guidance_interval", 0.5, 0.4], "two increasing times"),
            (["--out", "x", "--weights", "raww"], "weights"),
        ],
    )
    def test_of_options(self, write_checkpoint, tmp_path, command, arguments, message):
        ckpt = write_checkpoint(tmp_path / "run/last.ckpt")
        Path("full").mkdir()
        Path("full/mine.txt").write_text("mine")
        Path("there.safetensors").write_text("mine")
        done = command("export", "--ckpt", ckpt, *arguments)
        assert done.status == 2
        assert done.err.count("\n") == 1
        assert message in done.err
        assert sorted(path.name for path in Path().iterdir()) == ["full", "run", "there.safetensors"]
        assert Path("there.safetensors").read_text() == Path("full/mine.txt").read_text() == "mine"

    def test_guidance_without_null_class(self, write_checkpoint, tmp_path, command):
        ckpt = write_checkpoint(tmp_path / "last.ckpt", label_dropout=0.0)
        done = command("export", "--ckpt", ckpt, "--out", "x", "--guidance_scale", 2)
        assert done.status == 2
        assert "--guidance_scale 2.0 needs a network that was trained with labels and without" in done.err
        assert not Path("x").exists()

    def test_no_such_weights(self, write_checkpoint, tmp_path, command):
        ckpt = write_checkpoint(tmp_path / "last.ckpt", ema=False)
        assert (
            "holds no ema weights, only raw ones"
            in command("export", "--ckpt", ckpt, "--out", "x", "--weights", "ema").err
        )
        assert "no checkpoint at nowhere.ckpt" in command("export", "--ckpt", "nowhere.ckpt", "--out", "x").err

    def test_text_in_a_file_of_weights_builds_nothing_else(self, tmp_path, command):
        other = {"class_path": "logging.FileHandler", "init_args": {"filename": str(tmp_path / "made")}}
        sizes = {"in_features": 1, "out_features": 1, "device": other}  # of no stated type
        network = {"class_path": "torch.nn.Linear", "init_args": sizes}
        config = yaml.safe_dump({"model": {"network": network}})
        save_file({"network.weight": torch.ones(1)}, "x.safetensors", {CONFIG_KEY: config})
        assert command("export", "--ckpt", "x.safetensors", "--out", "x").status == 2
        assert not (tmp_path / "made").exists()

    def test_the_folder_one_stands_in(self, write_checkpoint, tmp_path, command, monkeypatch):
        ckpt = write_checkpoint(tmp_path / "last.ckpt")
        Path("empty").mkdir()
        monkeypatch.chdir("empty")
        assert "--out . is where you are" in command("export", "--ckpt", ckpt, "--out", ".").err

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ({"model": {}, "ema": {}}, "it has no state_dict. `fm-stages import` converts weights"),
            ({"state_dict": [1]}, "it has no state_dict"),
            ({"state_dict": {}}, "carries no configuration: only what `fm-stages` fit, import or export wrote does"),
            ({"state_dict": {}, CONFIG_KEY: "5"}, "carries a configuration without a model"),
            ({"state_dict": {}, CONFIG_KEY: "data: null"}, "carries a configuration without a model"),
        ],
    )
    def test_of_foreign_files(self, tmp_path, command, tree, message):
        torch.save(tree, tmp_path / "x.pt")
        done = command("export", "--ckpt", tmp_path / "x.pt", "--out", "x")
        assert done.status == 2
        assert message in done.err

    def test_text_in_a_checkpoint_names_no_command(self, write_checkpoint, tmp_path, command):
        ckpt = write_checkpoint(tmp_path / "last.ckpt", optimizer="os.system")
        done = command("export", "--ckpt", ckpt, "--out", "x")
        assert done.status == 2
        assert "model.optimizer: os.system may not be named in a configuration" in done.err

    def test_a_network_of_ones_own(self, exported, tmp_path):
        class Own(DiT):
            pass

        trained = load_trained(exported / "dit.ckpt")
        trained.network.__class__ = Own
        with pytest.raises(
            ValueError, match=r"Own is not of fm_stages.networks.*write its weights with --out .*\.safetensors"
        ):
            export_folder(trained, tmp_path / "own")
        assert not list(tmp_path.iterdir())

    def test_what_breaks_leaves_nothing(self, exported, tmp_path, monkeypatch):
        from fm_stages.studies.export import command as export

        def fail(*arguments):
            raise OSError("disk full")

        monkeypatch.setattr(export, "card", fail)  # the last file
        with pytest.raises(OSError, match="disk full"):
            export_folder(load_trained(exported / "dit.ckpt"), tmp_path / "out")
        assert not list(tmp_path.iterdir())


class TestSource:
    def test_of_another_package(self):
        with pytest.raises(ValueError, match="torch.nn.modules.linear.Linear is not a part of fm_stages"):
            source_of(torch.nn.Linear)

    def test_imports_nothing_of_the_package(self):
        found = source_of(FlowMatchingPipeline)
        assert "fm_stages" not in found.libraries
        assert {"diffusers", "scipy", "torch"} < set(found.libraries)
        assert "timm" not in found.libraries
