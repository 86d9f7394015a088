"""``fm-stages sample``: files hold what `sample` draws, through interruptions, in any batches, on several ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fm_stages.flow import EulerMaruyama, Guidance, LinearPath, heun, keyed_uniform, sample
from fm_stages.studies.sample import files as sample_files
from tests.studies.drawn_files import assert_same, pixels_of, pngs, record

NUM, STEPS = 70, 3
LABELS = torch.arange(NUM) % 10


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory, write_checkpoint) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints/last.ckpt")


@pytest.fixture
def draw(command, ckpt):
    """Draws 70 images with 3 Euler steps, unless told otherwise."""

    def run(*arguments, out="out"):
        return command("sample", "--ckpt", ckpt, "--num", NUM, "--out", out, *arguments)

    return run


@pytest.fixture
def expected(random_network):
    """Pixels of what `sample` draws with the network itself."""

    def draw_plainly(seed_of_weights: int = 2, labels: torch.Tensor = LABELS, **settings) -> torch.Tensor:
        settings = {"seed": 0, "num_steps": STEPS, **settings}
        return pixels_of(sample(random_network(seed_of_weights), labels, (1, 8, 8), **settings))

    return draw_plainly


class TestImages:
    def test_pixels_and_record(self, draw, expected):
        done = draw("--num_steps", STEPS)
        assert done.status == 0, done.err
        assert_same(pngs(), expected())
        found = record()
        assert found["finished"]
        assert found["settings"]["weights"] == "ema"
        assert found["settings"]["labels"] == "balanced"
        (call,) = found["calls"]
        assert (call["images"], call["evaluations_per_image"]) == (NUM, STEPS)
        assert call["images_per_sec"] == pytest.approx(NUM / call["seconds"], rel=0.01)
        assert "3 network evaluations each" in done.out
        assert sorted(path.name for path in Path("out").iterdir()) == ["grid.png", "images", "sampling.json"]
        grid = np.asarray(Image.open("out/grid.png"))[..., 0]
        assert (grid[2:34, 2:34][::4, ::4] == pngs()[0, 0].numpy()).all()  # enlarged four times, in a frame of two

    @pytest.mark.parametrize(
        ("arguments", "settings"),
        [
            (["--weights", "raw", "--seed", 4], {"seed_of_weights": 1, "seed": 4}),
            (["--labels", "null", "--shift", 2.0], {"labels": torch.full((NUM,), -1), "shift": 2.0}),
            (["--labels", "3"], {"labels": torch.full((NUM,), 3)}),
            (["--labels", "3, 0"], {"labels": torch.tensor([3, 0])[torch.arange(NUM) % 2]}),
            (["--solver", "heun"], {"solver": heun}),
            (
                ["--guidance_scale", 2.5, "--guidance_interval", 0.2, 0.7],
                {"guidance": Guidance(2.5, (0.2, 0.7))},
            ),
            (
                ["--solver", "euler_maruyama", "--diffusion", "linear"],
                {"solver": EulerMaruyama(LinearPath(), "linear")},
            ),
        ],
    )  # fmt: skip
    def test_options(self, draw, arguments, settings, expected):
        done = draw("--num_steps", STEPS, "--batch_size", 33, *arguments)
        assert done.status == 0, done.err
        assert_same(pngs(), expected(**settings))

    def test_labels_are_drawn_by_number(self, draw):
        draw("--num_steps", STEPS, "--labels", "drawn", "--seed", 9, "--format", "npz")
        labels = np.load("out/samples.npz")["arr_1"]
        u = keyed_uniform(("sample labels", 9), torch.arange(NUM))
        assert labels.tolist() == (u * 10).long().tolist()
        assert len(set(labels.tolist())) == 10

    def test_dopri5_says_what_it_guarantees(self, draw):
        done = draw(
            "--solver",
            "dopri5",
            "--tolerance",
            1e-3,
            "--num",
            4,
            "--guidance_scale",
            2,
            "--guidance_interval",
            0.1,
            0.5,
        )
        assert done.status == 0, done.err
        assert "tolerance, 0.001" in record()["same_image"]
        assert record()["calls"][0]["evaluations_per_image"] > 20

    def test_interval_of_a_profile(self, draw, profile_of, expected):
        profile = profile_of(boundary=0.1, navigation_end=0.05)
        profile.save("profile.json")
        done = draw("--num_steps", 10, "--guidance_scale", 3, "--profile", "profile.json")
        assert done.status == 0, done.err
        assert record()["settings"]["guidance_interval"] == pytest.approx(list(profile.guidance_interval()))
        assert_same(pngs(), expected(num_steps=10, guidance=Guidance(3.0, profile.guidance_interval())))


class TestFormats:
    def test_npz_is_one_file_as_evaluators_read_it(self, draw, expected):
        draw("--num_steps", STEPS, "--format", "npz")
        with np.load("out/samples.npz") as arrays:
            assert list(arrays) == ["arr_0", "arr_1"]
            assert arrays["arr_0"].dtype == np.uint8
            assert arrays["arr_0"].shape == (NUM, 8, 8, 1)
            assert_same(torch.from_numpy(arrays["arr_0"]).movedim(-1, 1), expected())
            assert arrays["arr_1"].tolist() == LABELS.tolist()
        assert record()["files"] == ["samples.npz"]
        assert sorted(path.name for path in Path("out").iterdir()) == ["grid.png", "samples.npz", "sampling.json"]

    def test_safetensors_in_shards(self, draw, expected):
        draw("--num_steps", STEPS, "--format", "safetensors", "--batch_size", 50)
        names = record()["files"]
        assert names == [f"shards/{first:06d}.safetensors" for first in (0, 32, 64)]
        shards = [load_file(Path("out", name)) for name in names]
        assert_same(torch.cat([shard["images"] for shard in shards]), expected())
        assert torch.cat([shard["labels"] for shard in shards]).tolist() == LABELS.tolist()

    def test_what_is_no_picture_is_written_as_it_is(self, command, write_checkpoint, random_network):
        """Of an imported network, whose checkpoint names no data."""
        path = write_checkpoint(Path("imported.ckpt"), data=False)
        arguments = ["sample", "--ckpt", path, "--num", 5, "--out", "out", "--num_steps", STEPS]
        done = command(*arguments)
        assert done.status == 2
        assert "name data that does with --data, or --format safetensors writes them as they are" in done.err
        assert command(*arguments, "--format", "safetensors").status == 0
        images = load_file("out/shards/000000.safetensors")["images"]
        plain = sample(random_network(2), torch.arange(5), (1, 8, 8), num_steps=STEPS)
        torch.testing.assert_close(images, plain, rtol=0, atol=1e-5)
        assert not Path("out/grid.png").exists()

    def test_data_that_is_named_makes_pixels_of_it(self, command, write_checkpoint, random_network):
        path = write_checkpoint(Path("imported.ckpt"), data=False)
        arguments = ["sample", "--ckpt", path, "--num", 5, "--out", "out", "--num_steps", STEPS, "--data"]
        assert command(*arguments, "Digits").status == 0
        plain = sample(random_network(2), torch.arange(5), (1, 8, 8), num_steps=STEPS)
        assert_same(pngs(), pixels_of(plain))
        assert record()["settings"]["data"] == "Digits"
        other = command(*arguments, "{class_path: Digits, init_args: {flip: true}}")
        assert other.status == 2
        assert "holds other images: data was Digits and is {class_path" in other.err

    @pytest.mark.parametrize("kind", sample_files.FORMATS)
    def test_an_error_while_writing_leaves_no_file(self, kind, tmp_path, monkeypatch):
        """As a full disk: what is half written has another name."""
        files = sample_files.FORMATS[kind](tmp_path, 3, (1, 4, 4))

        def half(self, path, *rest, **more):
            Path(path).write_bytes(b"half")
            raise OSError("no space")

        monkeypatch.setattr(Image.Image, "save", half)
        monkeypatch.setattr(sample_files.ShardFiles, "write", half)
        monkeypatch.setattr(sample_files.NpzFile, "write", half)

        def add() -> None:
            files.add(torch.arange(3), torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
            files.flush()

        with pytest.raises(OSError, match="no space"):
            add()
        assert files.missing().tolist() == [0, 1, 2]
        assert all(path.name.endswith(".part") for path in tmp_path.rglob("*") if path.is_file())

    def test_ranks_share_all_images(self, tmp_path):
        files = sample_files.ShardFiles(tmp_path, 1000, (1, 4, 4))
        parts = [files.missing(rank, 3) for rank in range(3)]
        assert torch.cat(parts).sort().values.tolist() == list(range(1000))
        assert max(map(len, parts)) - min(map(len, parts)) <= files.per_shard

    def test_colours(self, tmp_path):
        files = sample_files.PngFiles(tmp_path, 2, (3, 4, 5))
        pixels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
        files.add(torch.arange(2), pixels, torch.zeros(2))
        files.flush()
        assert torch.equal(files.first(2), pixels)
        with pytest.raises(ValueError, match="the images have 4: --format npz or safetensors"):
            sample_files.PngFiles(tmp_path, 2, (4, 4, 4))


class TestResume:
    @pytest.mark.parametrize("kind", sample_files.FORMATS)
    def test_goes_on_where_it_was_stopped(self, draw, monkeypatch, kind):
        whole = draw("--num_steps", STEPS, "--format", kind, out="whole")
        assert whole.status == 0, whole.err
        add, batches = sample_files.FORMATS[kind].add, []

        def stop(self, *batch):
            batches.append(batch)
            if len(batches) == 3:
                raise KeyboardInterrupt
            add(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(sample_files.FORMATS[kind], "add", stop)
            stopped = draw("--num_steps", STEPS, "--format", kind, "--batch_size", 16)
        assert stopped.status == 130
        assert "the same command goes on" in stopped.err
        assert not record()["finished"]
        (part := Path("out", "000001.png.123.part")).write_bytes(b"half")
        done = draw("--num_steps", STEPS, "--format", kind, "--batch_size", 7)
        assert done.status == 0, done.err
        assert not part.exists()
        assert record()["calls"][-1]["images"] == NUM - 32
        for file in Path("whole").rglob("*"):
            if file.is_file() and file.suffix == ".png":
                found, images = (np.asarray(Image.open(path)) for path in (Path("out", *file.parts[1:]), file))
                assert_same(torch.from_numpy(found.copy()), torch.from_numpy(images.copy()))
        assert {path.name for path in Path("out").rglob("*")} == {path.name for path in Path("whole").rglob("*")}

    def test_killed_before_its_record_was_whole(self, draw):
        Path("out").mkdir()
        Path("out/sampling.json.123.part").write_text("{")
        done = draw("--num_steps", STEPS, "--num", 2)
        assert done.status == 0, done.err
        assert sorted(path.name for path in Path("out").iterdir()) == ["grid.png", "images", "sampling.json"]

    def test_what_is_finished_stays(self, draw):
        draw("--num_steps", STEPS)
        before = {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()}
        done = draw("--num_steps", STEPS)
        assert done.status == 0, done.err
        assert {path: path.stat().st_mtime_ns for path in Path("out/images").iterdir()} == before
        assert len(record()["calls"]) == 1

    @pytest.mark.parametrize(
        ("arguments", "difference"),
        [
            (["--seed", 1], "seed was 0 and is 1"),
            (["--num_steps", 4], "num_steps was 3 and is 4"),
            (["--num", 71], "num was 70 and is 71"),
            (["--format", "npz"], "format was png and is npz"),
            (["--weights", "raw"], "weights was ema and is raw"),
            (["--labels", "2"], "labels was balanced and is 2"),
            (["--guidance_scale", 2], "guidance_scale was 1.0 and is 2.0"),
        ],
    )
    def test_other_settings_are_refused(self, draw, arguments, difference):
        draw("--num_steps", STEPS)
        before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
        done = draw("--num_steps", STEPS, *arguments)
        assert done.status == 2
        assert difference in done.err
        assert done.err.count("\n") == 1
        assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before

    def test_other_weights_are_refused(self, command, draw, write_checkpoint):
        draw("--num_steps", STEPS)
        other = write_checkpoint(Path("other.ckpt"), ema=False)
        done = command("sample", "--ckpt", other, "--num", NUM, "--out", "out", "--num_steps", STEPS)
        assert done.status == 2
        assert "weights_digest was" in done.err

    @pytest.mark.slow
    def test_killed_at_any_time(self, draw, ckpt, expected):
        command = [sys.executable, "-m", "fm_stages", "sample", "--ckpt", str(ckpt), "--num", str(NUM), "--out", "out"]
        command += ["--num_steps", "200", "--batch_size", "8"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        for num in (1, 30):
            running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            while len(list(Path("out/images").glob("*.png"))) < num:
                time.sleep(0.02)
                assert running.poll() is None
            running.send_signal(signal.SIGKILL)
            running.wait()
        done = draw("--num_steps", 200)
        assert done.status == 0, done.err
        assert_same(pngs(), expected(num_steps=200))


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(draw, ckpt, launch, tmp_path):
    """Also the SDE's noise, and labels that are drawn."""
    arguments = ["--num_steps", "3", "--solver", "euler_maruyama", "--labels", "drawn", "--guidance_scale", "2"]
    assert draw(*arguments, out=tmp_path / "one").status == 0
    whole = ["sample", "--ckpt", str(ckpt), "--num", str(NUM), "--out", str(tmp_path / "two"), "--batch_size", "9"]
    (tmp_path / "arguments.json").write_text(json.dumps([*whole, *arguments]))
    launch(Path(__file__).with_name("run_on_ranks.py"), tmp_path, 2, "cpu")
    assert_same(pngs(tmp_path / "two"), pngs(tmp_path / "one").double())
    (call,) = record(tmp_path / "two")["calls"]
    assert (call["images"], call["ranks"]) == (NUM, 2)
    assert (tmp_path / "two/grid.png").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "final_layer.linear.bias first"), (3e38, "with these settings draws values that are not finite")],
)
def test_a_network_that_diverged_draws_no_files(command, write_checkpoint, value, message):
    path = write_checkpoint(Path("diverged.ckpt"))
    checkpoint = torch.load(path, weights_only=False)
    for name, weights in checkpoint["state_dict"].items():
        if name.endswith("final_layer.linear.bias"):
            weights.fill_(value)
    torch.save(checkpoint, path)
    done = command("sample", "--ckpt", path, "--num", 3, "--out", "out", "--num_steps", STEPS)
    assert done.status == 2
    assert "diverged.ckpt" in done.err
    assert message in done.err
    assert not list(Path("out").rglob("*.png"))


class TestMistakes:
    """Each costs one line and no folder."""

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--num", 0], "--num 0 must be 1 or more"),
            (["--batch_size", 0], "--batch_size 0 must be 1 or more"),
            (["--solver", "rk45"], "--solver rk45: there is no such solver; there are euler, heun"),
            (["--num_steps", 0], "num_steps=0"),
            (["--shift", 0], "a shift must be positive"),
            (["--solver", "dopri5", "--num_steps", 9], "dopri5 chooses its own steps"),
            (["--solver", "dopri5", "--tolerance", 0], "--tolerance 0.0 must lie in (0, 1)"),
            (["--tolerance", 1e-3], "only --solver dopri5 has one"),
            (["--diffusion", "sigma"], "only --solver euler_maruyama has one"),
            (["--solver", "euler_maruyama", "--diffusion", "sgima"], "there is no diffusion 'sgima'"),
            (["--guidance_interval", 0.1, 0.5], "--guidance_interval is for guidance"),
            (["--profile", "x.json"], "and here neither is asked of it: leave it out"),
            (["--guidance_scale", 2, "--guidance_interval", 0.5, 0.1], "two increasing times in [0, 1], got 0.5 0.1"),
            (["--guidance_scale", -2], "got -2.0"),
            (["--guidance_scale", 2, "--profile", "x.json"], "No such file"),
            (["--guidance_scale", 2, "--guidance_interval", 0.1, 0.5, "--num_steps", 2], "num_steps=2"),
            (["--labels", "10"], "there is no class 10, the network knows 0 to 9"),
            (["--guidance_scale", 2, "--labels", "null"], "--labels null gives none"),
            (["--labels", "cat"], "give balanced, drawn, null, a class, or classes"),
            (["--format", "jpg"], "jpg"),
            (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
            (["--ckpt", "missing.ckpt"], "no checkpoint at missing.ckpt"),
            (["--sed", 1], "--sed"),
        ],
    )
    def test_options(self, draw, arguments, complaint):
        done = draw(*arguments)
        assert done.status == 2
        assert complaint in done.err
        assert done.err.count("\n") == 1
        assert not Path("out").exists()

    def test_a_folder_of_something_else(self, draw):
        Path("out").mkdir()
        Path("out/thesis.tex").write_text("years")
        done = draw()
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "holds other files (thesis.tex, ...): give a new or an empty folder" in done.err
        assert [path.name for path in Path("out").iterdir()] == ["thesis.tex"]

    def test_half_written_files_of_something_else_stay(self, draw):
        """As a browser names a download."""
        Path("out").mkdir()
        Path("out/film.mkv.part").write_text("half")
        done = draw()
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "holds other files (film.mkv.part, ...)" in done.err
        assert [path.name for path in Path("out").iterdir()] == ["film.mkv.part"]

    def test_a_record_of_something_else(self, draw):
        Path("out").mkdir()
        Path("out/sampling.json").write_text("[]")
        done = draw()
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert "is not what this command writes" in done.err

    def test_a_profile_of_another_path(self, draw, profile_of):
        profile_of(path="CosinePath").save("profile.json")
        done = draw("--guidance_scale", 2, "--profile", "profile.json")
        assert done.status == 2
        assert "is of CosinePath, the network of LinearPath" in done.err

    @pytest.mark.parametrize(
        ("model", "arguments", "complaint"),
        [
            ({"label_dropout": 0.0}, ["--guidance_scale", 2], "--guidance_scale 2.0 needs a network that was trained"),
            ({"label_dropout": 0.0}, ["--labels", "null"], "trained without label dropout"),
            ({"label_dropout": 1.0}, ["--labels", "3"], "trained without labels"),
            ({"num_classes": 0}, ["--labels", "balanced"], "trained without labels"),
            ({"ema": False}, ["--weights", "ema"], "holds no ema weights, only raw ones"),
        ],
    )
    def test_what_the_network_cannot(self, command, model, arguments, complaint, write_checkpoint):
        path = write_checkpoint(Path("other.ckpt"), **model)
        done = command("sample", "--ckpt", path, "--num", 4, "--out", "out", *arguments)
        assert (done.status, done.err.count("\n")) == (2, 1)
        assert complaint in done.err

    def test_help(self, command):
        done = command("sample", "--help")
        assert done.status == 0
        assert "--guidance_interval LO HI" in done.out
