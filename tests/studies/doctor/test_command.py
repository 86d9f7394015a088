"""The doctor as a command: its lines for sound runs and planted faults, its statuses, and that it leaves no trace."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fm_stages.studies.doctor import command as doctor_module
from fm_stages.studies.doctor import oracle as doctor_oracle
from fm_stages.studies.doctor.machine import checkpoint_bytes
from fm_stages.studies.doctor.run import plan_run, planned_ranks
from fm_stages.training import CONFIG_KEY
from tests.data import latent_folders

DIGITS = Path(__file__).parents[3] / "configs/digits_dit.yaml"
NETWORK = "--model.network.init_args"
TINY = [f"{NETWORK}.hidden_size=16", f"{NETWORK}.depth=1", f"{NETWORK}.num_heads=2"]
HERE = "tests.studies.planted"
CHECKS = {
    *("scale", "channels", "duplicate rows", "constant images", "classes", "null class", "bank", "path"),
    *("stages", "identity", "cost of oracle", "noise", "batch", "times", "forward"),
    *("learning rate", "sampled weights", "intervals", "memory", "disk", "output folder", "logger"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    """Few queries; what is measured with them is tested elsewhere."""
    monkeypatch.setattr(doctor_oracle, "NUM_QUERIES", 16)
    monkeypatch.setattr(doctor_oracle, "NUM_TIMES", 4)


@pytest.fixture
def planted(tmp_path) -> Path:
    """The configuration of a sound run on planted data."""
    config = {
        "model": {
            "network": {"class_path": f"{HERE}.Straight", "init_args": {}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"class_path": f"{HERE}.Patterns", "init_args": {"batch_size": 24}},
        "trainer": {"max_steps": 2000, "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger"}},
    }
    file = tmp_path / "planted.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture
def diagnosed(command, planted):
    """Runs the command on that configuration with overrides; its status, and its lines by name."""

    def run(*arguments) -> tuple[int, dict[str, dict[str, str]]]:
        done = command("doctor", "--config", planted, "--json=report.json", *arguments)
        assert done.status in (0, 1), done.err
        lines = json.loads(Path("report.json").read_text())["lines"]
        assert all(line["level"] in done.out and line["name"] in done.out for line in lines)
        return done.status, {line["name"]: line for line in lines}

    return run


def save_weights(file: Path, **values: float) -> Path:
    values = {"sign": 1.0, "backwards": 0.0, "constant": 0.0, **values}
    state = {f"network.{name}": torch.tensor(value) for name, value in values.items()}
    torch.save({"state_dict": state, "global_step": 3, CONFIG_KEY: "{}"}, file)
    return file


def test_the_demo_is_sound_and_nothing_is_left(command, tmp_path):
    done = command("doctor", "--config", DIGITS, *TINY, "--json", "report.json")
    assert done.status == 0, done.out
    report = json.loads(Path("report.json").read_text())
    assert {line["name"] for line in report["lines"]} == CHECKS
    assert report["level"] == "green", done.out
    assert all((line["level"] == "green") == (not line["remedy"]) for line in report["lines"])
    assert f"{len(CHECKS)} green, 0 yellow, 0 red" in done.out
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_sound_planted_run_is_green(diagnosed):
    status, lines = diagnosed()
    assert status == 0
    assert {line["level"] for line in lines.values()} == {"green"}, lines
    assert "root mean square" in lines["forward"]["found"]


FAULTS = {
    "scale": (["Unscaled"], "scale", "red", "normalisation channels"),
    "copies": (["Copied"], "duplicate rows", "red", "30 of 240 rows"),
    "class": (["WithoutOneClass"], "classes", "red", "No row has label 1"),
    "dropout 0": ([None, "--model.label_dropout=0"], "null class", "yellow", "never trained"),
    "ranks": (["SameForAllRanks", "--trainer.devices=2"], "noise", "red", "Ranks or steps see the same noise"),
    "augmented": (["Augmented"], "bank", "red", "24 of 24 rows of the first training batch are not in the bank"),
    "augmented, by its loss": (["Augmented"], "identity", "red", "another augmentation"),
    "rounded": (["Rounded"], "bank", "yellow", "not bit for bit"),
    "path": ([None, f"--model.path={HERE}.OtherWay"], "path", "red", "turn the path's time round"),
    "slope": ([None, f"--model.path={HERE}.WrongSlope"], "path", "red", "not the derivatives"),
    "one t": ([None, f"--model.timesteps={HERE}.OneTime"], "times", "red", "All draws are at one t"),
    "icdf": ([None, f"--model.timesteps={HERE}.NotItsInverse"], "times", "red", "its own cdf|sampler's own cdf"),
    "t below 0": ([None, f"--model.timesteps={HERE}.Negative"], "times", "red", "must lie in"),
    "part of t": (
        [None, "--model.timesteps=TruncatedTimesteps", "--model.timesteps.low=0.5", "--model.timesteps.high=1"],
        *("times", "yellow", "Bins without a draw"),
    ),
    "few navigate": (
        [None, "--model.timesteps=LogitNormalTimesteps", "--model.timesteps.mean=3"],
        *("times", "yellow", "Few draws navigate"),
    ),
    "few refine": (
        [None, "--model.timesteps=LogitNormalTimesteps", "--model.timesteps.mean=-4"],
        *("times", "yellow", "Few draws refine"),
    ),
    "shape": ([None, f"--model.network={HERE}.OneChannel"], "forward", "red", "shape of the images"),
    "not finite": ([None, f"--model.network={HERE}.Diverged"], "forward", "red", "not finite"),
    "no null row": ([None, f"--model.network={HERE}.WithoutNull"], "forward", "red", "IndexError"),
    "large start": ([None, "--model.network.sign=1000"], "forward", "yellow", "far out"),
    "short": ([None, "--trainer.max_steps=5"], "batch", "yellow", "before it has seen every image"),
    "left over": ([None, "--data.batch_size=150"], "batch", "yellow", "90 images"),
    "one image": ([None, "--trainer.devices=24"], "batch", "yellow", "one image at a time"),
    "warm-up": ([None, "--model.warmup_steps=2000"], "learning rate", "red", "never reaches"),
    "long warm-up": ([None, "--model.warmup_steps=600"], "learning rate", "yellow", "Much of the run"),
    "no end": ([None, "--trainer.max_steps=-1"], "learning rate", "yellow", "Nothing ends this run"),
    "no rate": ([None, "--model.optimizer.lr=0"], "learning rate", "red", "Nothing is learned"),
    "no average": ([None, "--model.ema_decay=0"], "sampled weights", "yellow", "0.999"),
    "no validation": ([None, "--trainer.val_check_interval=3000"], "intervals", "red", "saved before"),
    "saved by itself": (
        [None, "--trainer.val_check_interval=3000", "--checkpoints.every_n_train_steps=100"],
        *("intervals", "yellow", "never measured"),
    ),
    "not saved": ([None, "--trainer.enable_checkpointing=false"], "intervals", "red", "Nothing is saved"),
    "no curve": ([None, "--monitor.every_n_steps=1000"], "intervals", "yellow", "No oracle curve"),
    "folder is a file": ([None, "--trainer.default_root_dir=planted.yaml/run"], "output folder", "red", "no folder"),
    "no logger": ([None, "--trainer.logger=false"], "logger", "yellow", "nowhere but in CSV"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(diagnosed, fault):
    (data, *arguments), name, level, words = FAULTS[fault]
    status, lines = diagnosed(*arguments, *([f"--data={HERE}.{data}"] if data else []))
    line = lines[name]
    text = line["found"] + line["remedy"]
    assert line["level"] == level, text
    assert any(part in text for part in words.split("|")), text
    assert status == any(each["level"] == "red" for each in lines.values())


@pytest.mark.parametrize(
    ("weights", "level", "words"),
    [
        ({}, "green", "cosine"),
        ({"sign": -1.0}, "red", "from data to noise"),
        ({"backwards": 1.0}, "red", "give it 1 - t"),
        ({"sign": -1.0, "backwards": 1.0}, "red", "fm-stages import"),
        ({"sign": 0.0}, "yellow", "No better than a network that says 0"),
        ({"constant": 1.0, "sign": -1.0}, "yellow", "hardly look at t"),
    ],
    ids=["sound", "sign", "time", "both", "untrained", "without t"],
)
def test_the_direction_of_trained_weights(diagnosed, tmp_path, weights, level, words):
    status, lines = diagnosed("--ckpt", save_weights(tmp_path / "w.ckpt", **weights))
    line = lines["direction"]
    assert line["level"] == level, line
    assert words in line["found"] + line["remedy"]
    assert status == (level == "red")
    assert "raw weights of" in lines["forward"]["found"]


def test_ranks_of_the_job_are_planned_for(diagnosed):
    status, lines = diagnosed("--trainer.devices=3", "--trainer.num_nodes=2", "--data.micro_batch_size=2")
    assert status == 0
    assert "24 images per step = 6 ranks x 2 x 2 accumulated" in lines["batch"]["found"]
    assert "48 noise images of 6 ranks x 2 micro-batches x 2 steps: no repeated" in lines["noise"]["found"]
    assert "held-out images from step 1000" in lines["intervals"]["found"]
    assert "on each of 6 ranks" in lines["cost of oracle"]["found"]


@pytest.mark.parametrize(("devices", "ranks"), [(2, 2), ("4", 4), ("0,1,3", 3), ("1,", 1), ([0, 1], 2), ("auto", 1)])
def test_devices_in_all_of_their_forms(devices, ranks):
    trainer = SimpleNamespace(devices=devices, num_nodes=3, accelerator="cpu")
    assert planned_ranks(SimpleNamespace(trainer=trainer)) == 3 * ranks


def test_yellow_is_red_under_strict(command, planted):
    arguments = ("doctor", "--config", planted, "--model.ema_decay=0")
    assert command(*arguments).status == 0
    assert command(*arguments, "--strict").status == 1


def test_a_profile_spares_the_measurement(command, planted, monkeypatch):
    run = plan_run(["--config", str(planted)])
    doctor_oracle.measure_roughly(run).save("profile.json")
    monkeypatch.setattr(doctor_module, "measure_roughly", lambda run: pytest.fail("measured"))
    done = command("doctor", "--config", planted, "--profile=profile.json")
    assert done.status == 0, done.err
    assert "read from profile.json" in done.out


def test_a_run_that_is_there_would_be_written_over(command, planted, diagnosed, tmp_path):
    arguments = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--samples.num_samples=0"]
    done = command("fit", "--config", planted, *arguments, "--trainer.enable_progress_bar=false")
    assert done.status == 0, done.err
    folder = Path("runs/default")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    _, lines = diagnosed()
    assert lines["output folder"]["level"] == "yellow"
    assert "write over" in lines["output folder"]["remedy"]
    _, lines = diagnosed("--ckpt_path=last")
    assert lines["output folder"]["level"] == "green"
    assert "direction" in lines
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_checkpoint_is_as_large_as_foretold(command):
    arguments = [*TINY, f"{NETWORK}.hidden_size=96", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    arguments += ["--samples.num_samples=0", "--samples.num_predictions=0", "--trainer.logger=false"]
    done = command("fit", "--config", DIGITS, *arguments, "--trainer.enable_progress_bar=false")
    assert done.status == 0, done.err
    written = Path("runs/digits_dit/checkpoints/last.ckpt").stat().st_size
    foretold = checkpoint_bytes(plan_run(["--config", str(DIGITS), *arguments]).module)
    assert foretold < written < 1.02 * foretold + 60_000


def test_a_bank_that_fits_no_process_leaves_the_other_lines(diagnosed, monkeypatch):
    def refuse(self):
        raise MemoryError("the bank of 240 rows needs more")

    monkeypatch.setattr("fm_stages.data.TrainingData.bank", refuse)
    _, lines = diagnosed()
    assert lines["bank"]["level"] == "yellow"
    assert {"noise", "times", "forward", "disk"} <= set(lines)


@pytest.mark.parametrize(("multiplier", "level"), [(0.1, "green"), (0.01, "red"), (6.0, "red")])
def test_rows_that_are_distributions(command, planted, tmp_path, multiplier, level):
    for split, num in (("train", 60), ("val", 12)):
        latent_folders.write_indexed(tmp_path / split, ("mean", "std"), num)
    data = {"data_dir": "train", "val_dir": "val", "normalisation": "none", "multiplier": multiplier, "batch_size": 24}
    arguments = {**data, "vae": "none", "flip": False}
    overlay = {"data": {"class_path": "fm_stages.data.Latents", "init_args": arguments}}
    Path("latents.yaml").write_text(yaml.safe_dump(overlay))
    done = command("doctor", "--config", planted, "--config=latents.yaml", "--json=report.json")
    assert done.status in (0, 1), done.err
    lines = {line["name"]: line for line in json.loads(Path("report.json").read_text())["lines"]}
    assert "rows are distributions" in lines["scale"]["found"]
    assert lines["scale"]["level"] == level, done.out
    assert {lines[name]["level"] for name in ("bank", "identity", "noise", "forward", "memory")} == {"green"}


def test_an_interruption_ends_with_one_line(command, planted, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor_module, "check_labels", interrupt)
    done = command("doctor", "--config", planted)
    assert done.status == 130
    assert done.err.strip().endswith("fm-stages: interrupted")


MISTAKES = {
    "option": (["--modle.ema_decay=0"], "modle"),
    "batch": (["--trainer.devices=7"], "do not divide into 7 ranks"),
    "json": (["--json=nowhere/x.json"], "--json x.json: there is no folder"),
    "json is a folder": (["--json=."], "is a folder"),
    "devices": (["--trainer.devices=nonsense"], "--trainer.devices nonsense"),
    "no device": (["--trainer.devices=0"], "give 1 or more"),
    "no checkpoint": (["--ckpt=none.ckpt"], "no checkpoint at none.ckpt"),
    "no profile": (["--profile=none.json"], "none.json"),
    "foreign weights": (["--ckpt=other.ckpt"], "other.ckpt does not fit the network"),
    "guidance": (["--model.label_dropout=0", "--samples.guidance_scale=3"], "the null class is never trained"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_fit_refuses_is_refused_in_one_line(command, planted, name):
    torch.save({"state_dict": {"network.other": torch.zeros(1)}}, "other.ckpt")
    arguments, words = MISTAKES[name]
    done = command("doctor", "--config", planted, *arguments)
    assert done.status == 2
    assert words in done.err
    assert done.err.rstrip("\n").splitlines()[-1].startswith("fm-stages: ")
    assert "Traceback" not in done.err
    assert "green" not in done.out


def test_several_processes_are_refused(command, planted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = command("doctor", "--config", planted)
    assert done.status == 2
    assert "--trainer.num_nodes" in done.err


def test_help_says_what_the_statuses_mean(command):
    done = command("doctor", "--help")
    assert done.status == 0
    assert "0 without a red line" in done.out
    assert all(len(line) <= 110 for line in done.out.splitlines())
