"""``fm-stages encode``: folders that hold what they say, after kills, on several ranks, and on a full disk."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fm_stages.data import read_rows
from fm_stages.data.latent_index import locked, read_index

NUM = 24
HERE = Path(__file__)


def write_images(folder, num=NUM, num_classes=3):
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        file = folder / f"class{i % num_classes}/{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


@pytest.fixture(scope="module")
def vae(write_vae, tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def arguments(vae, images):
    return ["encode", "--data", str(images), "--vae", str(vae), "--image_size", "16", "--shard_rows", "4"]


@pytest.fixture
def encode(command, arguments):
    return lambda *more, out="out": command(*arguments, "--out", out, *more)


def digests(folder):
    files = [*sorted(folder.glob("*.safetensors")), folder / "latents_stats.pt"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


class TestOneRank:
    def test_rows_are_read_as_the_peers_are(self, encode):
        done = encode()
        assert done.status == 0, done.err
        assert "24 images in out: one draw of each and of its flip, 4x4x4, in 6 shards" in done.out
        rows = read_rows("out")
        assert rows.x1.shape == (2 * NUM, 4, 4, 4)
        assert rows.labels.tolist() == 2 * sorted(i % 3 for i in range(NUM))
        normalised = rows.x1 * rows.scale + rows.shift
        assert normalised.mean((0, 2, 3)).abs().max() < 1e-5
        assert (normalised.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
        index = read_index(Path("out"))
        assert index.complete
        assert index.encoding["crop"] == "ADM centre crop"
        assert Path("out/sources.txt").read_text().splitlines()[8] == "class1/001.png"

        again = encode()
        assert (again.status, again.out) == (0, "nothing to do: out holds the latents of all 24 images\n")
        before = digests(Path("out"))
        for change, said in (
            (("--image_size", 20), "image_size was 16 and is 20"),
            (("--seed", 1), "seed was 0 and is 1"),
            (("--flip", "false"), "flip was True and is False"),
            (("--shard_rows", 5), "shard_rows was 4 and is 5"),
        ):
            refused = encode(*change)
            assert refused.status == 2
            assert f"holds other latents: {said}. Undo that, or give another folder" in refused.err
        assert digests(Path("out")) == before

    def test_other_weights_and_other_images_are_refused(self, encode, write_vae, images, tmp_path):
        assert encode().status == 0
        write_vae(tmp_path / "other", seed=1)
        assert "the VAE was " in encode("--vae", tmp_path / "other").err
        write_images(tmp_path / "fewer", NUM - 1)
        assert "the list of images was another one (24 images, now 23)" in encode("--data", tmp_path / "fewer").err

    def test_train_and_val(self, command, arguments, tmp_path):
        write_images(tmp_path / "data/train")
        write_images(tmp_path / "data/val", 5, num_classes=2)
        done = command(*arguments, "--data", tmp_path / "data", "--out", "out", "--moments")
        assert done.status == 0, done.err
        train, val = (read_index(Path("out", name)) for name in ("train", "val"))
        assert sorted(train.tensors) == ["labels", "mean", "mean_flip", "std", "std_flip"]
        assert sorted(val.tensors) == ["labels", "mean", "std"]
        assert (train.num_rows, val.num_rows) == (NUM, 5)
        assert val.class_names == train.class_names == ["class0", "class1", "class2"]
        again = command(*arguments, "--data", tmp_path / "data", "--out", "out", "--moments")
        assert again.out.count("nothing to do") == 2

    def test_held_out_labels_follow_the_classes_of_the_training_set(self, command, arguments, tmp_path):
        write_images(tmp_path / "data/train")
        write_images(tmp_path / "data/val", 5, num_classes=2)
        again = (*arguments, "--data", tmp_path / "data", "--out", "out")
        assert command(*again).status == 0
        write_images(tmp_path / "data/train/a", 1)
        shutil.rmtree("out/train")
        refused = command(*again)
        assert refused.status == 2
        assert "out/val holds other latents: the classes were other ones (3, now 4)" in refused.err

    def test_small_images_are_enlarged_and_counted(self, encode):
        done = encode("--image_size", 24, "--shard_rows", 100)
        assert "24 images were smaller than 24 pixels and were enlarged" in done.out


class TestMistakes:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--image_size", 18), "--image_size 18 is no multiple of 4, by which .* take 16"),
            (("--data", "/no/such"), "there is no folder /no/such"),
            (("--vae", "/no/such"), "there is no folder /no/such"),
            (("--batch_size", 0), "--batch_size 0 must be 1 or more"),
            (("--device", "cuda:77"), "--device cuda:77 cannot be used"),
            (("--precison", "bf16"), "precison"),
        ],
    )
    def test_each_costs_one_line_and_no_folder(self, encode, more, said):
        done = encode(*more)
        assert done.status == 2
        assert len(done.err.splitlines()) == 1
        assert re.search(said, done.err)
        assert not Path("out").exists()

    def test_out_holds_other_things(self, encode, images):
        Path("other").mkdir()
        Path("other/mine").write_text("mine")
        assert "--out other holds other files (mine, ...)" in encode(out="other").err
        assert os.listdir("other") == ["mine"]
        assert "--out other/mine is a file" in encode(out="other/mine").err
        assert "lies inside" in encode(out=images / "latents").err

    def test_a_second_process_is_refused_at_once(self, encode):
        with locked(Path("out"), "encode"):
            done = encode()
        assert done.status == 2
        assert "another process does this in out" in done.err


def test_a_killed_run_goes_on_to_the_same_bits(encode, arguments, tmp_path):
    assert encode(out="whole").status == 0
    # dies without a chance to clean up, once while a shard is written and once before the index knows of one
    script = (
        "import os, signal, sys; from fm_stages.data import shard_writing; from fm_stages import cli\n"
        "name, turns = sys.argv.pop(1), [int(sys.argv.pop(1))]\n"
        "original = getattr(shard_writing, name)\n"
        "def dies(*a, **k):\n"
        "    turns[0] -= 1\n"
        "    if not turns[0]:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(*a, **k)\n"
        "setattr(shard_writing, name, dies); cli.main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[2])}
    for name, turn, finished, parts in (("save_file", 3, 2, 1), ("write_index", 2, 3, 0)):
        killed = subprocess.run(
            [sys.executable, "-c", script, name, str(turn), *arguments, "--out", "killed"],
            env=environment, cwd=tmp_path, capture_output=True,
        )  # fmt: skip
        assert killed.returncode == -signal.SIGKILL
        assert len(list(Path("killed").glob("*.safetensors"))) == finished
        assert len(list(Path("killed").glob("*.part"))) == parts
    kept = {file: file.stat().st_mtime_ns for file in Path("killed").glob("*.safetensors")}
    done = encode(out="killed")
    assert "12 of them were encoded in this call" in done.out
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items())  # the third was adopted
    assert digests(Path("killed")) == digests(Path("whole"))
    assert not list(Path("killed").glob("*.part"))


def test_two_ranks(encode, arguments, images, launch, tmp_path):
    assert encode(out="one").status == 0
    assert encode(out="begun").status == 0
    begun = read_index(Path("begun"))
    for number in (0, 3, 4):  # ranks go on with what one has begun
        Path("begun", begun.file_of(number)).unlink()
    Path("begun/latents_stats.pt").unlink()
    broken = write_images(tmp_path / "broken")
    (broken / "class2/023.png").write_bytes(b"no image")
    call = [*arguments, "--out"]
    calls = [[*call, "two"], [*call, "begun"], [*call, "broken_out", "--data", str(broken)], [*call, "two"]]
    (tmp_path / "calls.json").write_text(json.dumps(calls))
    ends = launch(HERE.with_name("encode_on_ranks.py"), tmp_path, 2, "cpu")
    assert [[status for status, _ in of_rank] for of_rank in ends] == [[0, 0, 2, 0]] * 2, ends
    assert digests(Path("two")) == digests(Path("begun")) == digests(Path("one"))
    assert (Path("two/index.json")).read_text() == Path("one/index.json").read_text()
    assert all(f"cannot read the image {broken}/class2/023.png" in of_rank[2][1] for of_rank in ends)
    assert "nothing to do" in ends[0][3][1]
    assert torch.load("one/latents_stats.pt", weights_only=True)["mean"].shape == (1, 4, 1, 1)
    assert not list(Path("broken_out").glob("*.part"))


def test_a_full_disk_keeps_what_is_finished(encode, monkeypatch):
    from fm_stages.data import shard_writing

    assert encode(out="whole").status == 0
    saved = []
    save_file = shard_writing.save_file

    def full(tensors, path, **more):
        saved.append(path)
        if len(saved) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **more)

    monkeypatch.setattr(shard_writing, "save_file", full)
    done = encode()
    assert done.status == 2
    assert "shard002.safetensors ([Errno 28] No space left on device): make room there" in done.err.splitlines()[-1]
    assert len(list(Path("out").glob("*.safetensors"))) == len(read_index(Path("out")).shards) == 2
    assert not list(Path("out").glob("*.part"))
    assert encode().status == 0
    assert digests(Path("out")) == digests(Path("whole"))
