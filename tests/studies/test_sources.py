"""Every way to name a training set gives its bank, and every mistake one line with the name in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fm_stages.data import Digits
from fm_stages.flow import CosinePath, LinearPath, VPPath
from fm_stages.oracle import DataBank
from fm_stages.studies import open_source

CONFIG = Path(__file__).parents[2] / "configs" / "digits_dit.yaml"
ROWS = np.random.default_rng(0).normal(size=(40, 1, 4, 4)).astype("float32")


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def all_rows(bank: DataBank) -> torch.Tensor:
    return bank.rows(torch.arange(bank.num_rows))


@pytest.fixture(scope="module")
def digits() -> DataBank:
    data = Digits()
    data.prepare_data()
    data.setup()
    return data.bank()


class TestWhatIsRead:
    @pytest.mark.parametrize(
        ("spec", "name"),
        [
            ("Digits", "Digits"),
            ("fm_stages.data.Digits", "Digits"),
            ("{class_path: fm_stages.data.Digits, init_args: {batch_size: 7}}", "Digits"),
            ("mine={class_path: Digits}", "mine"),
            (str(CONFIG), "digits_dit"),
            (f"v1.5={CONFIG}", "v1.5"),
        ],
    )
    def test_data_modules(self, digits, spec, name):
        source = open_source(spec)
        assert (source.name, source.num_rows) == (name, 1438)
        assert torch.equal(all_rows(source.bank), all_rows(digits))
        index = torch.arange(1438)
        assert torch.equal(source.bank.labels_of(index), digits.labels_of(index))
        assert isinstance(source.path, LinearPath)

    def test_arguments_of_a_data_module(self):
        assert open_source("{class_path: Digits, init_args: {flip: true}}").num_rows == 2 * 1438

    def test_a_config_says_path_and_label_dropout_and_an_option_overrides(self):
        path = "path:\n    class_path: fm_stages.flow.VPPath\n    init_args:\n      beta_max: 12"
        Path("run.yaml").write_text(f"data:\n  class_path: Digits\nmodel:\n  label_dropout: 0.3\n  {path}\n")
        source = open_source("run.yaml")
        assert source.label_dropout == 0.3
        assert isinstance(source.path, VPPath)
        assert source.path.beta_max == 12
        assert isinstance(open_source("run.yaml", path=CosinePath()).path, CosinePath)

    def test_array_with_labels(self):
        np.save("a.b.npy", ROWS)
        np.save("a.b_labels.npy", np.arange(40) % 3)
        source = open_source("a.b.npy")
        assert source.name == "a.b"
        np.testing.assert_array_equal(all_rows(source.bank), ROWS)
        assert source.bank.labels_of(torch.arange(40)).tolist() == [i % 3 for i in range(40)]
        assert not open_source("a.b.npy", labels=False).bank.has_labels

    def test_folders_of_images_and_latents(self):
        for folder in ("v1.5", "latents"):
            Path(folder).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(f"v1.5/{i}.png")
        save_file({"latents": torch.from_numpy(ROWS)}, "latents/latents_rank00_shard000.safetensors")
        images, latents = open_source("v1.5/"), open_source("./latents")
        assert (images.name, latents.name) == ("v1.5", "latents")
        expected = pixels.transpose(0, 3, 1, 2) * (2 / 255) - 1
        np.testing.assert_allclose(all_rows(images.bank), expected, atol=1e-6)
        mean, std = (stat(ROWS.astype(np.float64), (0, 2, 3), keepdims=True) for stat in (np.mean, np.std))
        np.testing.assert_allclose(all_rows(latents.bank), (ROWS - mean) / std, atol=1e-6)  # as they are trained on

    @pytest.mark.parametrize("spec", ["Digits", "rows.npy"])
    def test_a_part_of_the_rows(self, spec):
        np.save("rows.npy", ROWS)
        every = open_source(spec)
        part = open_source(spec, rows=20)
        assert (part.bank.num_rows, part.num_rows) == (20, every.num_rows)
        known = {row.numpy().tobytes() for row in all_rows(every.bank)}
        drawn = [row.numpy().tobytes() for row in all_rows(part.bank)]
        assert len(set(drawn)) == 20
        assert set(drawn) <= known
        assert torch.equal(all_rows(open_source(spec, rows=20).bank), all_rows(part.bank))
        assert not torch.equal(all_rows(open_source(spec, rows=20, seed=1).bank), all_rows(part.bank))

    def test_a_part_keeps_its_labels_unless_told(self, digits):
        part = open_source("Digits", rows=30)
        of_row = {row.numpy().tobytes(): i for i, row in enumerate(all_rows(digits))}
        index = torch.tensor([of_row[row.numpy().tobytes()] for row in all_rows(part.bank)])
        assert torch.equal(part.bank.labels_of(torch.arange(30)), digits.labels_of(index))
        assert not open_source("Digits", rows=30, labels=False).bank.has_labels


def files() -> None:
    np.save("rows.npy", ROWS)
    np.save("nan.npy", np.where(np.arange(40)[:, None, None, None] == 5, np.nan, ROWS))
    np.save("one.npy", ROWS[:1])
    np.save("equal.npy", np.repeat(ROWS[:1], 5, 0))
    np.save("integers.npy", np.arange(12).reshape(3, 4))
    Path("broken.yaml").write_text("data: [1")
    Path("no_data.yaml").write_text("model: {}\n")
    Path("words.txt").write_text("words")
    Path("broken.ckpt").write_text("words")
    Path("broken.npy").write_text("words")


MISTAKES = {
    "no file": ("nowhere.npy", {}, "there is no .*nowhere.npy"),
    "no folder": ("./nowhere", {}, "there is no .*nowhere"),
    "no config": ("nowhere.yaml", {}, "no file nowhere.yaml"),
    "no class": ("fm_stages.data.Digit", {}, "no attribute 'Digit'; .*class path of a data module"),
    "no module": ("nowhere.Digits", {}, "nowhere.Digits is not imported: .* add --allow-import nowhere"),
    "a word": ("Digitz", {}, "class path of a data module, as Digits"),
    "another class": ("torch.nn.Linear", {}, "torch.nn.Linear does not correspond to a subclass"),
    "misspelt argument": ("{class_path: Digits, init_args: {batch_siz: 3}}", {}, "'batch_siz' is not accepted"),
    "missing argument": ("ImageFolder", {}, "data_dir, image_size"),
    "no space": ("{class_path:Digits}", {}, "a space after each colon"),
    "half a mapping": ("{class_path: Digits", {}, "not YAML, line 1"),
    "broken config": ("broken.yaml", {}, "expected ',' or ']'"),
    "config without data": ("no_data.yaml", {}, "says nothing about data"),
    "broken checkpoint": ("broken.ckpt", {}, "not a checkpoint"),
    "broken array": ("broken.npy", {}, "write it with np.save"),
    "text": ("./words.txt", {}, "of no kind that can be read"),
    "integers": ("integers.npy", {}, "holds int64"),
    "NaN": ("nan.npy", {}, "row 5 .* holds NaN"),
    "one row": ("one.npy", {}, "1 rows, 1 distinct: stages need at least two"),
    "equal rows": ("equal.npy", {}, "5 rows, 1 distinct: stages need at least two"),
    "one drawn row": ("rows.npy", {"rows": 1}, "at least two rows that differ"),
    "too many rows": ("rows.npy", {"rows": 41}, "--rows 41 is more than the 40 rows"),
    "no rows": ("rows.npy", {"rows": 0}, "--rows 0 must be 1 or more"),
    "too many of a module": ("Digits", {"rows": 1439}, "--rows 1439 must lie between 1 and .* 1438"),
    "labels of none": ("rows.npy", {"labels": True}, "there are no labels: leave --labels out"),
    "size of an array": ("rows.npy", {"image_size": 8}, "--image_size is for a folder"),
    "size of a module": ("Digits", {"image_size": 8}, "--image_size 8 is for a folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_data_and_the_reason(name):
    files()
    spec, arguments, message = MISTAKES[name]
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s)^--data .*{message}") as error:
        open_source(spec, **arguments)
    assert str(error.value).startswith(f"--data {spec}: ")
    assert "Union" not in str(error.value)


def test_a_name_needs_a_letter_so_that_it_is_a_folder():
    with pytest.raises(FileNotFoundError):
        open_source("..=rows/x.npy")
