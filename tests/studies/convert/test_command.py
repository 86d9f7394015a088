"""Imported weights give the velocity of their own project's formulas, in our time; what is unknown is refused."""

import argparse
import math
import re
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fm_stages import cli
from fm_stages.networks import DiT, DiT_B, DiT_L, DiT_S, DiT_XL
from fm_stages.studies import import_network
from fm_stages.studies.convert.layouts import HEADS as HEADS_BY_SIZE
from fm_stages.studies.models import load_trained
from fm_stages.training import init_from
from tests.networks import dit_formulas

# every dimension differs from every other, so that no two axes can be swapped unseen
SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, BATCH = 6, 2, 3, 40, 2, 5, 7, 4
GRID, HEAD = SIDE // PATCH, HIDDEN // HEADS


def source(lightning: bool = False, learn_sigma: bool = False, qk_norm: bool = False, channels: int = CHANNELS) -> dict:
    """Random weights under the names and in the shapes of published files."""
    d, out = HIDDEN, PATCH**2 * channels * (2 if learn_sigma else 1)
    linears = {
        "t_embedder.mlp.0": (d, 256),
        "t_embedder.mlp.2": (d, d),
        "final_layer.linear": (out, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    mlp = {"mlp.w12": (2 * 106, d), "mlp.w3": (d, 106)} if lightning else {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
    block = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "adaLN_modulation.1": (6 * d, d), **mlp}
    for i in range(DEPTH):
        linears |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes = {"x_embedder.proj.weight": (d, channels, PATCH, PATCH), "x_embedder.proj.bias": (d,)}
    shapes |= {"y_embedder.embedding_table.weight": (CLASSES + 1, d)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    w = {k: torch.randn(s, generator=generator) / math.sqrt(max(math.prod(s[1:]), 16)) for k, s in shapes.items()}
    places = [dit_formulas.position(row, column, d) for row in range(GRID) for column in range(GRID)]
    w["pos_embed"] = torch.tensor(places)[None]
    for i in range(DEPTH):
        for name, width in [("norm1", d), ("norm2", d)] if lightning else []:
            w[f"blocks.{i}.{name}.weight"] = 1 + torch.randn(width, generator=generator) / 4
        for name in ["q", "k"] if qk_norm else []:
            w[f"blocks.{i}.attn.{name}_norm.weight"] = 1 + torch.randn(HEAD, generator=generator) / 4
            if not lightning:
                w[f"blocks.{i}.attn.{name}_norm.bias"] = torch.randn(HEAD, generator=generator) / 4
    if lightning:
        w["final_layer.norm_final.weight"] = 1 + torch.randn(d, generator=generator) / 4
        pairs = [10_000 ** (-i / (HEAD // 4)) for i in range(HEAD // 4) for _ in range(2)]
        cells = [(row, column) for row in range(GRID) for column in range(GRID)]
        angles = torch.tensor([[place * f for place in cell for f in pairs] for cell in cells])
        w |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    return w


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0.0, 0.13, 0.71, 1.0]), torch.tensor([2, -1, 0, CLASSES - 1])


@pytest.fixture
def file(tmp_path):
    """A file of weights, and the path of the one to make of it."""

    def make(tree, name: str = "theirs.pt") -> dict:
        path = tmp_path / name
        # the metadata that Hugging Face's libraries write
        save_file(tree, path, {"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tree, path)
        return {"source": path, "out": tmp_path / "ours.ckpt"}

    return make


def velocity_of(path, inputs, weights: str | None = None) -> Tensor:
    trained = load_trained(path, weights)
    with torch.no_grad():
        return trained.network.double()(inputs[0].double(), *inputs[1:])


class TestVelocities:
    """Tolerances are those of float32 features of t, which the imported network has in float64 too."""

    @pytest.mark.parametrize("learn_sigma", [False, True])
    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_sit(self, file, inputs, learn_sigma, qk_norm):
        w = source(learn_sigma=learn_sigma, qk_norm=qk_norm)
        paths = file(w)
        told = import_network(**paths, num_heads=HEADS)
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS)
        assert expected.std() > 0.3
        velocity = velocity_of(paths["out"], inputs)
        torch.testing.assert_close(velocity, expected[:, :CHANNELS], rtol=0, atol=2e-6)
        assert ("the channels for sigma dropped" in told) == learn_sigma
        assert "predicts noise" in told  # DiT's own weights look the same
        if not qk_norm:  # the number of heads cannot be told from the weights, and matters
            assert (velocity - dit_formulas.velocity(w, *inputs, num_heads=2)[:, :CHANNELS]).abs().max() > 1e-2

    def test_repa_runs_the_other_way(self, file, inputs):
        x, t, y = inputs
        w = source()
        projector = {f"projectors.0.{i}.{part}": torch.ones(3) for i in (0, 2, 4) for part in ("weight", "bias")}
        paths = file({"model": {k: -v for k, v in w.items()}, "ema": {**w, **projector}, "opt": {}, "steps": 3})
        told = import_network(**paths, num_heads=HEADS)
        assert told.startswith("repa, ema weights")
        expected = -dit_formulas.velocity(w, x, 1 - t.double(), y, num_heads=HEADS)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=2e-6)

    def test_early_repa_counts_its_blocks_in_two_parts(self, file, inputs):
        x, t, y = inputs
        w = {k.replace("blocks.1.", "decoder_blocks.0."): v for k, v in source().items()}
        paths = file({**w, "projectors.0.0.weight": torch.ones(3)})
        import_network(**paths, num_heads=HEADS)
        expected = -dit_formulas.velocity(source(), x, 1 - t.double(), y, num_heads=HEADS)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(("noise_at", "time_scale"), [(0, 1), (0, 1000), (1, 1), (1, 1000)])
    def test_dit_with_velocity_says_its_time(self, file, inputs, noise_at, time_scale):
        x, t, y = inputs
        w = source(learn_sigma=True)
        paths = file(w)
        with pytest.raises(ValueError, match="--kind dit: say at which time"):
            import_network(**paths, num_heads=HEADS, kind="dit")
        import_network(**paths, num_heads=HEADS, kind="dit", noise_at=noise_at, time_scale=time_scale)
        theirs, sign = (1 - t.double(), -1) if noise_at else (t, 1)
        expected = sign * dit_formulas.velocity(w, x, theirs, y, num_heads=HEADS, time_scale=time_scale)[:, :CHANNELS]
        tolerance = 2e-6 if time_scale == 1 else 3e-4  # float32 knows 1000 rad to 6e-5
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_lightning_dit_tells_its_heads(self, file, inputs, qk_norm):
        w = source(lightning=True, qk_norm=qk_norm)
        paths = file({"model": {f"module.{k}": -v for k, v in w.items()}, "ema": w, "config": {"model": "XL"}})
        assert import_network(**paths).startswith("lightningdit, ema weights")
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS, rotary=True)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=3e-6)

    def test_the_raw_weights_are_others(self, file, inputs):
        w = source()
        paths = file({"model": {f"module._orig_mod.{k}": -v for k, v in w.items()}, "ema": w})
        assert "raw weights" in import_network(**paths, num_heads=HEADS, weights="raw")
        with pytest.raises(ValueError, match="holds no ema weights, only raw ones"):
            load_trained(paths["out"], "ema")
        expected = dit_formulas.velocity(
            {k: -v for k, v in w.items() if k != "pos_embed"} | {"pos_embed": w["pos_embed"]}, *inputs, num_heads=HEADS
        )
        network = load_trained(paths["out"], "raw").network
        network.pos_embed.data.neg_()  # the formula's positions are not those of negated weights
        torch.testing.assert_close(network(*inputs).double(), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("theirs", ["theirs.pt", "theirs.safetensors"])
    @pytest.mark.parametrize("prefix", ["", "ema.", "module.", "_orig_mod.module."])
    def test_safetensors_in_and_out(self, file, tmp_path, inputs, theirs, prefix):
        w = source()
        tree = {prefix + k: v for k, v in w.items()}
        if prefix == "ema.":
            tree |= {f"model.{k}": -v for k, v in w.items()}
        paths = {**file(tree, theirs), "out": tmp_path / "made/ours.safetensors"}
        import_network(**paths, num_heads=HEADS)
        assert all(
            key.startswith("network_ema." if prefix == "ema." else "network.") for key in load_file(paths["out"])
        )
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=2e-6)

    def test_sets_inside_a_training_frameworks_state_dict(self, file, inputs):
        w = source()
        state = {f"ema_model.module.{k}": v for k, v in w.items()} | {f"model.{k}": -v for k, v in w.items()}
        paths = file({"state_dict": state, "epoch": 3})
        assert "ema weights" in import_network(**paths, num_heads=HEADS)
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("width", [53, 100, 106, 107, 160])
    def test_gated_mlps_of_any_width(self, file, inputs, width):
        w = source(lightning=True)
        for i in range(DEPTH):
            shapes = {"w12.weight": (2 * width, HIDDEN), "w12.bias": (2 * width,), "w3.weight": (HIDDEN, width)}
            w |= {f"blocks.{i}.mlp.{name}": torch.randn(shape) / 8 for name, shape in shapes.items()}
        paths = file(w)
        import_network(**paths)
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS, rotary=True)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=5e-6)

    def test_training_starts_from_them(self, file, inputs):
        w = source()
        paths = file(w)
        import_network(**paths, num_heads=HEADS)
        network = DiT(SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES)
        assert "raw weights" in init_from(network, paths["out"])
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS)
        torch.testing.assert_close(network(*inputs).double(), expected, rtol=0, atol=1e-5)

    def test_half_precision_becomes_float32(self, file):
        paths = file({k: v.half() for k, v in source().items()})
        import_network(**paths, num_heads=HEADS)
        assert {v.dtype for v in load_trained(paths["out"]).network.state_dict().values()} == {torch.float32}

    def test_a_file_that_does_not_say_which_weights_it_holds(self, file):
        paths = file(source())
        assert "ema weights" in import_network(**paths, num_heads=HEADS, weights="ema")
        assert load_trained(paths["out"]).weights == "ema"

    def test_a_table_without_null_class(self, file, inputs):
        w = source()
        paths = file(w)
        told = import_network(**paths, num_heads=HEADS, num_classes=CLASSES + 1)
        assert "no null class" in told
        trained = load_trained(paths["out"])
        assert trained.network.num_classes == CLASSES + 1
        assert trained.module.label_dropout == 0
        last = trained.network(*inputs[:2], torch.full((BATCH,), CLASSES)).double()
        expected = dit_formulas.velocity(w, *inputs[:2], torch.full((BATCH,), CLASSES), num_heads=HEADS)
        torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)

    def test_a_null_row_that_nobody_trained_is_not_guided_with(self, file):
        w = source()
        w["y_embedder.embedding_table.weight"][-1] *= 0.02  # beside classes that have grown
        paths = file(w)
        assert "label dropout was 0" in import_network(**paths, num_heads=HEADS)
        assert load_trained(paths["out"]).module.label_dropout == 0
        paths["out"].unlink()
        trained = file(source(), "trained.pt")
        assert "label dropout" not in import_network(**trained, num_heads=HEADS)
        assert load_trained(trained["out"]).module.label_dropout == 0.1


@pytest.mark.parametrize("constructor", [DiT_S, DiT_B, DiT_L, DiT_XL])
def test_published_sizes_tell_their_heads(constructor):
    with torch.device("meta"):
        network = constructor(4, 2, 4, 10)
    assert HEADS_BY_SIZE[len(network.blocks), network.pos_embed.shape[2]] == network.blocks[0].attn.num_heads


def changed(**weights) -> dict:
    return {**source(), **{k.replace("__", "."): v for k, v in weights.items()}}


class TestRefusals:
    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            ({"conv1.weight": torch.ones(2)}, r"no layout that is known .*: pos_embed, .* not among conv1.weight"),
            (
                changed(blocks__0__cross__weight=torch.ones(2)),
                "1 weights that no known layout has: blocks.0.cross.weight",
            ),
            (
                {k: v for k, v in source().items() if k != "blocks.1.attn.proj.bias"},
                "1 weights are missing: blocks.1.attn.proj.bias",
            ),
            (
                {k: v[: 4 * HIDDEN] if "blocks.0.adaLN" in k else v for k, v in source().items()},
                r"2 weights have another shape: .*0.adaLN_modulation.1.weight \(160, 40\) where \(240, 40\) belongs",
            ),
            (
                changed(pos_embed=torch.ones(9), x_embedder__proj__weight=torch.ones(40, 12)),
                r"has these shapes: pos_embed \(9,\), x_embedder.proj.weight \(40, 12\)",
            ),
            (changed(pos_embed=torch.ones(1, 8, HIDDEN)), "pos_embed has 8 places, which are no square grid"),
            (
                changed(final_layer__linear__bias=torch.full((12,), math.nan)),
                "not finite numbers: final_layer.linear.bias",
            ),
            ({"args": 3, "epoch": 4}, r"is not a dictionary of weights: it holds args \(int\), epoch \(int\)"),
            ([torch.ones(2)], "holds a list, not a dictionary"),
            ({"state_dict": {}, "fm_stages_config": ""}, "is a checkpoint of fm-stages: it needs no import"),
            ({"pos_embed": torch.ones(1), "module.pos_embed": torch.ones(1)}, "holds weights twice"),
        ],
    )
    def test_of_files(self, file, tree, message):
        paths = file(tree)
        with pytest.raises(ValueError, match=message):
            import_network(**paths, num_heads=HEADS)
        assert not paths["out"].exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "no published network has depth 2 and width 40: give it with --num_heads"),
            ({"num_heads": 3}, "hidden_size=40 must be a multiple of num_heads=3"),
            (
                {"num_heads": HEADS, "kind": "lightningdit"},
                "--kind lightningdit: the weights are those of sit or dit or",
            ),
            ({"num_heads": HEADS, "num_classes": 3}, "--num_classes 3: the label table has 8 rows, so 7 or 8 fit"),
            ({"num_heads": HEADS, "noise_at": 2}, "--noise_at 2: time runs from 0 to 1"),
            ({"num_heads": HEADS, "time_scale": 0.0}, "--time_scale 0.0 must be positive"),
        ],
    )
    def test_of_options(self, file, options, message):
        paths = file(source())
        with pytest.raises(ValueError, match=message):
            import_network(**paths, **options)

    def test_heads_that_the_weights_contradict(self, file):
        with pytest.raises(ValueError, match="--num_heads 4: the weights have heads of 8 channels, which are 5"):
            import_network(**file(source(lightning=True)), num_heads=4)

    def test_nothing_is_unpickled_without_the_flag(self, file, inputs):
        w = source()
        paths = file({"ema": w, "model": w, "args": argparse.Namespace(model="SiT-S/2")})
        with pytest.raises(ValueError, match=r"holds more than weights \(argparse.Namespace\).*add --unpickle"):
            import_network(**paths, num_heads=HEADS)
        import_network(**paths, num_heads=HEADS, unpickle=True)
        expected = dit_formulas.velocity(w, *inputs, num_heads=HEADS)
        torch.testing.assert_close(velocity_of(paths["out"], inputs), expected, rtol=0, atol=2e-6)

    def test_nor_of_torchs_older_format(self, file):
        paths = file({"ema": source(), "args": argparse.Namespace(model="SiT-S/2")})
        tree = torch.load(paths["source"], weights_only=False)
        torch.save(tree, paths["source"], _use_new_zipfile_serialization=False)
        with pytest.raises(ValueError, match=r"holds more than weights \(argparse.Namespace\).*add --unpickle"):
            import_network(**paths, num_heads=HEADS)
        assert "ema weights" in import_network(**paths, num_heads=HEADS, unpickle=True)

    def test_a_pickle_whose_code_is_not_here(self, file, monkeypatch):
        class Settings:
            pass

        elsewhere = ModuleType("their_project")
        elsewhere.Settings, Settings.__module__, Settings.__qualname__ = Settings, "their_project", "Settings"
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "their_project", elsewhere)
            paths = file({"ema": source(), "args": Settings()})
        with pytest.raises(ValueError, match="needs the code that it was saved with, .*'their_project'"):
            import_network(**paths, num_heads=HEADS, unpickle=True)

    @pytest.mark.parametrize("name", ["theirs.pt", "theirs.safetensors"])
    def test_a_file_cut_short(self, file, name):
        paths = file(source(), name)
        whole = paths["source"].read_bytes()
        for length in (0, 100, len(whole) // 2):
            paths["source"].write_bytes(whole[:length])
            with pytest.raises(ValueError, match="cannot be read: it is damaged"):
                import_network(**paths, num_heads=HEADS)

    def test_nothing_is_overwritten(self, file):
        paths = file(source())
        paths["out"].write_text("mine")
        with pytest.raises(ValueError, match="exists already: choose another --out"):
            import_network(**paths, num_heads=HEADS)
        assert paths["out"].read_text() == "mine"
        with pytest.raises(FileNotFoundError, match="no file at"):
            import_network("nowhere.pt", "other.ckpt")


class TestCommand:
    def test_imports(self, file, command):
        paths = file(source(lightning=True))
        done = command("import", "--ckpt", str(paths["source"]), "--out", str(paths["out"]), "--path", "CosinePath")
        assert done.status == 0, done.err
        assert re.search(r"lightningdit, raw weights: [\d,]+ in DiT\(input_size=6, patch_size=2,", done.out)
        trained = load_trained(paths["out"])
        assert type(trained.module.path).__name__ == "CosinePath"
        assert trained.shape == (CHANNELS, SIDE, SIDE)

    def test_a_mistake_is_one_line(self, file, command):
        paths = file(source())
        done = command("import", "--ckpt", str(paths["source"]), "--out", str(paths["out"]))
        assert done.status == 2
        assert done.err.startswith(f"fm-stages: {paths['source']}: no weight tells the number of attention heads")
        assert done.err.count("\n") == 1

    def test_what_was_imported_can_be_diagnosed_on_data_that_is_named(self, file, command, tmp_path):
        w = {k: v for k, v in source(channels=1).items() if k != "y_embedder.embedding_table.weight"}
        places = [dit_formulas.position(row, column, HIDDEN) for row in range(4) for column in range(4)]
        w |= {"pos_embed": torch.tensor(places)[None], "y_embedder.embedding_table.weight": torch.ones(11, HIDDEN)}
        paths = file(w)
        import_network(**paths, num_heads=HEADS)
        arguments = ("diagnose", "--ckpt", str(paths["out"]), "--num_samples", "64", "--out", str(tmp_path / "d"))
        done = command(*arguments)
        assert done.status == 2
        assert "does not say on which data it was trained: name it with --data" in done.err
        done = command(*arguments, "--data", "fm_stages.data.Digits")
        assert done.status == 0, done.err
        assert (tmp_path / "d/raw/gap_by_t.png").exists()

    def test_is_listed(self):
        assert "import" in cli.COMMANDS
