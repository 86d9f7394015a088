"""The command line, in this process: what a run leaves, and that a mistake costs one line and no folder."""

import contextlib
import io
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import fm_stages
from fm_stages import cli
from fm_stages.networks import DiT
from fm_stages.training import CONFIG_KEY, network_weights, read_checkpoint

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = CONFIGS / "digits_dit.yaml"
NETWORK = "--model.network.init_args"
TINY = [
    *(f"{NETWORK}.hidden_size=16", f"{NETWORK}.depth=1", f"{NETWORK}.num_heads=2"),
    *("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"),
    *("--trainer.log_every_n_steps=1", "--model.warmup_steps=0", "--model.ema_decay=0.9"),
    *("--monitor.every_n_steps=1", "--monitor.window=2", "--samples.num_samples=10", "--samples.num_steps=2"),
    *("--throughput.every_n_steps=2", "--data.init_args.batch_size=64"),
]
RUN = Path("runs/digits_dit")
LAST = RUN / "checkpoints/last.ckpt"
SPLITS, STAGES = ("oracle_val", "oracle_train"), ("navigation", "refinement")
FIGURES = ("oracle/gap_by_t", "oracle/gap_over_steps", "memorization/regular_by_stage", "memorization/regular_by_t")
NAMES = {
    *("train/loss", "train/learning_rate", "val/loss", "val/loss_ema"),
    *(f"oracle/{name}" for name in ("regular", "gap", "floor", "gap_navigation", "gap_refinement", "closed")),
    *(f"oracle/{name}" for name in ("top1", "ess", "gap_sem", "identity_z", "coverage", "share")),
    *(f"oracle_val/{name}{s}" for name in ("regular", "gap_navigation") for s in ("", "_ema")),
    *(f"{split}/regular_{stage}{s}" for split in SPLITS for stage in STAGES for s in ("", "_ema")),
    *(f"memorization/excess_{stage}{e}{s}" for stage in STAGES for e in ("", "_sem") for s in ("", "_ema")),
    *("memorization/best_step", "memorization/best_step_ema", "oracle_train/regular", "oracle_train/regular_ema"),
    *(f"stages/{name}" for name in ("boundary", "navigation_end", "refinement_complete")),
    *(f"speed/{name}" for name in ("images_per_sec", "data_wait", "memory_bytes")),
}
"""What the table of docs/how-to/metrics.md promises, in every logger; tests/docs holds the table to it."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """Four steps on the digits with a tiny network, for tests that only look at what such a run left."""
    folder = tmp_path_factory.mktemp("trained")
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(sys, "argv", ["fm-stages", "fit", "--config", str(DIGITS), *TINY, "--trainer.logger=CSVLogger"])
        cli.main()
    return SimpleNamespace(folder=folder, run=folder / RUN, last=folder / LAST, out=out.getvalue())


@pytest.fixture
def fit(command):
    """Fits the digits with a tiny network and a CSV file of its numbers, 4 steps unless told otherwise."""

    def run(*arguments) -> SimpleNamespace:
        done = command("fit", "--config", DIGITS, *TINY, "--trainer.logger=CSVLogger", *arguments)
        assert done.status == 0, done.err
        return done

    return run


@pytest.fixture
def quick_figures(monkeypatch) -> None:
    monkeypatch.setattr("fm_stages.plots.save", lambda figure, path: path)


def metrics(folder: Path = RUN) -> list[dict[str, float]]:
    """One dict of what was logged for each line of the newest metrics.csv."""
    file = max(folder.rglob("metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    head, *rows = [line.split(",") for line in file.read_text().splitlines()]
    return [{name: float(x) for name, x in zip(head, row, strict=True) if x} for row in rows]


def config_of(folder: Path = RUN) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


class TestCommands:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_help_lists_the_commands(self, command, arguments):
        done = command(*arguments)
        assert done.status == 0
        assert fm_stages.__version__ in done.out
        assert all(f"\n  {name} " in done.out for name in cli.COMMANDS)

    def test_version(self, command):
        assert command("--version").out.strip() == fm_stages.__version__

    def test_an_unknown_command_names_those_there_are(self, command):
        done = command("trian")
        assert done.status == 2
        assert done.err == f"fm-stages: no command 'trian'; there are {', '.join(cli.COMMANDS)}\n"

    def test_help_of_fit_names_our_own_sections(self, command):
        done = command("fit", "--help")
        assert done.status == 0
        for option in ("--model.ema_decay", "--monitor.every_n_steps", "--samples.num_samples", "--init-from"):
            assert option in done.out
        assert "DataModule standardizes" not in done.out  # Lightning's words, cut off in the middle of a sentence


class TestFit:
    def test_leaves_numbers_tables_figures_samples_checkpoints_and_its_configuration(self, trained):
        found = {str(file.relative_to(trained.run)) for file in trained.run.rglob("*") if file.is_file()}
        assert found == {
            "config.yaml",
            "run_id.txt",
            *(f"checkpoints/{name}.ckpt" for name in ("last", "step_0000004")),
            *(f"oracle/gap_by_t{end}" for end in ("_0000002.csv", "_0000004.csv")),
            *(f"oracle_val/gap_by_t{s}_000000{step}.csv" for s in ("", "_ema") for step in (2, 4)),
            *(f"{name}.{end}" for name in FIGURES for end in ("png", "csv")),
            *(f"samples/{name}_0000004.{end}" for name in ("raw", "ema") for end in ("png", "json")),
            *(f"samples/predictions_0000004.{end}" for end in ("png", "csv")),
            *(f"version_0/{name}" for name in ("metrics.csv", "hparams.yaml")),
        }
        assert [path.name for path in trained.folder.iterdir()] == ["runs"]
        assert {name for line in metrics(trained.run) for name in line} >= NAMES
        assert "navigation t < 0." in trained.out
        for name in ("training, navigation", "held-out, refinement", "held-out EMA, all t"):
            assert name in trained.out
        assert "Figures and tables: runs/digits_dit" in trained.out

    def test_nested_fields_can_be_set(self, fit, quick_figures):
        fit(
            *("--model.timesteps.class_path=fm_stages.flow.ShiftedTimesteps", "--model.timesteps.init_args.shift=2"),
            *("--model.target.class_path=fm_stages.training.HybridTarget", "--model.target.init_args.boundary=0.31"),
            *("--model.path=CosinePath", "--model.optimizer.init_args.lr=0.002", "--data.init_args.flip=true"),
            *("--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"),
        )
        config = config_of()
        assert config["model"]["timesteps"]["init_args"]["shift"] == 2
        assert config["model"]["target"]["init_args"] == {"boundary": 0.31}
        assert config["model"]["path"]["class_path"] == "fm_stages.flow.CosinePath"
        assert config["model"]["optimizer"]["init_args"]["lr"] == 0.002
        values = {name: x for line in metrics() for name, x in line.items()}
        assert values["stages/shift"] == 2
        assert values["train/learning_rate"] == pytest.approx(0.002)
        assert read_checkpoint(LAST)["state_dict"]["network.x_embedder.proj.weight"].shape[0] == 16

    def test_a_later_file_lies_on_an_earlier_one(self, fit, quick_figures):
        Path("more.yaml").write_text("model:\n  label_dropout: 0.25\ntrainer:\n  max_steps: 1\n")
        done = fit("--config", "more.yaml")
        assert done.status == 0
        assert config_of()["model"]["label_dropout"] == 0.25
        assert config_of()["trainer"]["max_steps"] == 1
        assert config_of()["trainer"]["gradient_clip_val"] == 1.0  # of base.yaml

    def test_ones_own_network_by_class_path(self, command, quick_figures, tmp_path, monkeypatch):
        (tmp_path / "my_networks.py").write_text(
            "import torch\n"
            "class Scale(torch.nn.Module):\n"
            "    def __init__(self, start: float) -> None:\n"
            "        super().__init__()\n"
            "        self.scale = torch.nn.Parameter(torch.tensor(start))\n"
            "    def forward(self, x, t, y):\n"
            "        return self.scale * x\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        Path("own.yaml").write_text("data: fm_stages.data.Digits\nmodel:\n  network: my_networks.Scale\n")
        arguments = [x for x in TINY if not x.startswith(NETWORK)]
        arguments = ["fit", "--config=own.yaml", *arguments, f"{NETWORK}.start=0.5", "--trainer.logger=CSVLogger"]
        refused = command(*arguments)
        assert refused.status == 2
        assert "own.yaml: model.network: my_networks.Scale is not imported: " in refused.err
        assert "if you trust that, add --allow-import my_networks" in refused.err
        done = command(*arguments, "--allow-import", "my_networks")
        assert done.status == 0, done.err
        weights = network_weights(read_checkpoint("runs/default/checkpoints/last.ckpt"), ema=False)
        assert list(weights) == ["scale"]
        assert weights["scale"] != 0.5

    def test_the_configuration_that_a_run_saved_makes_a_run_of_its_own(self, trained, command, quick_figures):
        """With another folder everything goes there: the first run's checkpoints are not written over."""
        before = {file: file.read_bytes() for file in trained.run.rglob("*") if file.is_file()}
        done = command("fit", "--config", trained.run / "config.yaml", "--trainer.default_root_dir=again")
        assert done.status == 0, done.err
        assert {file: file.read_bytes() for file in trained.run.rglob("*") if file.is_file()} == before
        assert [path.name for path in Path().iterdir()] == ["again"]
        assert {path.name for path in Path("again").iterdir()} == {path.name for path in trained.run.iterdir()}

    def test_without_a_logger_and_without_checkpoints(self, fit, quick_figures):
        fit("--trainer.logger=false", "--trainer.enable_checkpointing=false")
        assert not list(RUN.rglob("*.ckpt"))
        assert (RUN / "oracle/gap_by_t_0000004.csv").is_file()

    def test_a_trial_run_writes_over_nothing(self, trained, fit):
        before = {file: file.read_bytes() for file in trained.run.rglob("*") if file.is_file()}
        fit("--trainer.fast_dev_run=true", f"--trainer.default_root_dir={trained.run}")
        assert {file: file.read_bytes() for file in trained.run.rglob("*") if file.is_file()} == before

    def test_same_seed_same_numbers(self, trained, fit):
        fit()
        skip = ("speed/", "oracle/share")
        runs = [
            [{name: x for name, x in line.items() if not name.startswith(skip)} for line in metrics(run)]
            for run in (trained.run, RUN)
        ]
        assert runs[0] == runs[1]


class TestCheckpoints:
    def test_carry_the_configuration_as_text(self, trained):
        assert yaml.safe_load(read_checkpoint(trained.last)[CONFIG_KEY]) == config_of(trained.run)

    def test_a_stopped_run_goes_on(self, trained, fit, quick_figures, monkeypatch):
        """Two steps, then two more, leave the weights of four; last.ckpt is held against its checksums once."""
        fit("--trainer.max_steps=2")
        read, testzip = [], zipfile.ZipFile.testzip
        monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda file: read.append(file.filename) or testzip(file))
        done = fit("--ckpt_path=last")
        assert [Path(file).name for file in read].count(LAST.name) == 1
        whole, parts = read_checkpoint(trained.last), read_checkpoint(LAST)
        assert parts["global_step"] == 4
        assert all(torch.equal(x, parts["state_dict"][name]) for name, x in whole["state_dict"].items())
        assert [line["step"] for line in metrics() if "train/loss" in line] == [0, 1, 2, 3]
        assert "training, navigation" in done.out

    def test_a_state_that_lightning_cannot_read_is_blamed_on_the_file(self, trained, command, tmp_path):
        checkpoint = torch.load(trained.last, weights_only=True)
        checkpoint["loops"]["fit_loop"]["epoch_progress"] = 7
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        done = command("fit", "--config", DIGITS, *TINY, "--trainer.logger=false", "--ckpt_path=damaged.ckpt")
        assert done.status == 2
        assert "damaged.ckpt holds a state that cannot be gone on from (" in done.err.splitlines()[-1]
        assert "Traceback" not in done.err

    def test_a_job_that_is_started_again(self, fit, command, trained, quick_figures, monkeypatch, caplog):
        """One command each time: it begins with weights from elsewhere, is stopped, and goes on with its own."""
        again = (f"--init-from={trained.last}", "--ckpt_path=last")
        with monkeypatch.context() as patch:
            stop = lambda module, *_: os.kill(os.getpid(), signal.SIGUSR1)  # noqa: E731
            patch.setattr("fm_stages.training.FlowMatching.on_train_batch_start", stop)
            first = command("fit", "--config", DIGITS, *TINY, "--trainer.logger=CSVLogger", *again)
        assert first.status == 75
        assert "last.ckpt yet: the run starts at step 0" in caplog.text
        assert f"Started from the EMA weights of {trained.last}" in caplog.text
        assert "SIGUSR1: stopped after step 1." in caplog.text
        caplog.clear()
        fit(*again)
        assert "Started from" not in caplog.text
        assert read_checkpoint(LAST)["global_step"] == 4
        assert [x["step"] for x in metrics() if "train/loss" in x] == [0, 1, 2, 3]
        assert not (RUN / "version_1").exists()

    def test_validate_measures_the_checkpoint(self, trained, command, quick_figures):
        (logged,) = (line for line in metrics(trained.run) if "val/loss" in line and line["step"] >= 3)
        done = command(
            "validate", "--config", DIGITS, *TINY, "--trainer.logger=CSVLogger", f"--ckpt_path={trained.last}"
        )
        assert done.status == 0, done.err
        again = {name: x for line in metrics() for name, x in line.items()}
        for name in ("val/loss", "val/loss_ema"):
            assert again[name] == pytest.approx(logged[name], rel=1e-6)
        assert again.keys() >= {name for name in NAMES if name.startswith("oracle_val/")}
        assert "held-out EMA, navigation" in done.out
        assert (RUN / "oracle_val/gap_by_t_0000004.csv").is_file()


class TestInitFrom:
    FROZEN = ("--model.optimizer.init_args.lr=0", "--trainer.max_steps=1", "--trainer.default_root_dir=new")

    def assert_started_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Both the raw and the averaged weights of the new run."""
        new = read_checkpoint("new/checkpoints/last.ckpt")
        assert new["global_step"] == 1
        for ema in (False, True):
            for name, x in network_weights(new, ema).items():
                torch.testing.assert_close(x, weights[name], rtol=0, atol=1e-7)

    @pytest.fixture
    def said(self, monkeypatch) -> list[str]:
        """What is told of where the weights are from, beside the line on the batch."""
        lines = []
        monkeypatch.setattr(
            "fm_stages.training.config.rank_zero_info",
            lambda x: lines.append(x) if "images per step" not in x else None,
        )
        return lines

    def test_the_averaged_weights_and_nothing_else(self, trained, fit, quick_figures, said):
        fit(f"--init-from={trained.last}", *self.FROZEN)
        assert said == [f"Started from the EMA weights of {trained.last}."]
        self.assert_started_from(network_weights(read_checkpoint(trained.last), ema=True))

    def test_raw_weights_where_there_are_no_others(self, trained, fit, quick_figures, said):
        checkpoint = read_checkpoint(trained.last)
        for name in [name for name in checkpoint["state_dict"] if name.startswith("network_ema.")]:
            del checkpoint["state_dict"][name]
        torch.save(checkpoint, "raw.ckpt")
        fit("--init-from=raw.ckpt", *self.FROZEN)
        assert said == ["Started from the raw weights of raw.ckpt."]
        self.assert_started_from(network_weights(checkpoint, ema=False))

    def test_weights_that_fit_but_may_be_another_function_are_told(self, trained, fit, quick_figures, said):
        """Heads share the shapes of their weights."""
        fit(f"--init-from={trained.last}", f"{NETWORK}.num_heads=4", "--model.path=CosinePath", *self.FROZEN)
        (line,) = said
        assert line.startswith(f"Started from the EMA weights of {trained.last}. Careful")
        assert "num_heads 2 there, 4 here" in line
        assert "LinearPath there, fm_stages.flow.CosinePath here" in line

    def test_another_number_of_classes(self, trained, fit, quick_figures):
        fit(f"--init-from={trained.last}", f"{NETWORK}.num_classes=12", *self.FROZEN)
        weights = network_weights(read_checkpoint("new/checkpoints/last.ckpt"), ema=False)
        assert len(weights["y_embedder.embedding_table.weight"]) == 13

    def test_another_width_is_refused(self, trained, command, tmp_path):
        arguments = [*TINY, "--trainer.logger=CSVLogger", f"--init-from={trained.last}", f"{NETWORK}.hidden_size=32"]
        done = command("fit", "--config", DIGITS, *arguments)
        assert_refused(done, r"last\.ckpt does not fit the network", tmp_path, set())


class TestWandb:
    @pytest.fixture(autouse=True)
    def _patient(self, monkeypatch):
        """However long wandb's service takes to start on a busy machine."""
        for limit in ("ONE_CALL_SEC", "PATIENCE_SEC", "FINISH_SEC"):
            monkeypatch.setattr(f"fm_stages.training.logs.patience.{limit}", 240.0)

    def test_offline_run_holds_config_numbers_table_figure_and_samples(self, command, tmp_path):
        """Read back with wandb's own tool."""
        done = command("fit", "--config", DIGITS, *TINY)
        assert done.status == 0, done.err
        file, run = logged_run(tmp_path)
        assert file.is_relative_to(tmp_path / RUN)
        summary = run["summary"]
        assert run["project"] == "fm-stages"
        assert run["config"]["model"]["network"]["init_args"]["hidden_size"] == 16
        assert run["config"]["monitor"] == {**run["config"]["monitor"], "every_n_steps": 1, "window": 2}
        assert summary.keys() >= NAMES
        assert all(math.isfinite(summary[name]) for name in NAMES)
        assert summary["trainer/global_step"] == 4
        for name in ("oracle/gap_by_t", "oracle_val/gap_by_t", "oracle_val/gap_by_t_ema"):
            assert summary[name]["_type"] == "table-file"
            assert summary[name]["nrows"] == 18
        for name in (*(f"{name}_figure" for name in FIGURES), "samples/raw", "samples/ema", "samples/predictions"):
            assert summary[name]["_type"] == "images/separated"
        table = json.loads((file.parent / "files" / summary["oracle/gap_by_t"]["path"]).read_text())
        rows = (RUN / "oracle/gap_by_t_0000004.csv").read_text().splitlines()
        assert table["columns"] == rows[0].split(",")
        for line, row in zip(rows[1:], table["data"], strict=True):
            values = [math.nan if x in (None, "NaN") else float(x) for x in row]
            assert values == pytest.approx([float(x) for x in line.split(",")], rel=1e-6, nan_ok=True)
        assert [path.name for path in tmp_path.iterdir()] == ["runs"]

    def test_a_run_that_goes_on_is_one_run(self, command):
        """Offline each start is a folder of its own: the ids are the same, and the steps join."""
        import wandb

        started = []
        for steps, more in ((4, []), (6, ["--ckpt_path=last"])):
            done = command(
                "fit", "--config", DIGITS, *TINY, "--samples.num_samples=0", f"--trainer.max_steps={steps}", *more
            )
            assert done.status == 0, done.err
            wandb.finish()
            (new,) = {*RUN.glob("wandb/offline-run-*")} - {*started}
            started.append(new)
        (run_id,) = {folder.name.split("-")[-1] for folder in started}
        assert run_id == (RUN / "run_id.txt").read_text().strip()
        seen = [logged_steps(folder, "train/loss") for folder in started]
        assert seen == [[0, 1, 2, 3], [4, 5]]

    def test_workspace_shows_only_what_a_run_logs(self, command, tmp_path):
        """All of it, of a run whose density of t is steered and whose gradients are measured."""
        policy = [{"class_path": "ShiftToBoundary", "init_args": {"warmup_steps": 2, "every_n_steps": 2}}]
        steering = [f"--steering.policies={json.dumps(policy)}", "--steering.gradients_every_n_steps=2"]
        done = command("fit", "--config", DIGITS, *TINY, *steering)
        assert done.status == 0, done.err
        shown = runpy.run_path(str(DIGITS.parent / "wandb_workspace.py"))
        logged = logged_run(tmp_path)[1]["summary"].keys()
        assert shown["names"]() <= logged
        assert {name for name in logged if name.startswith("memorization/")} <= shown["names"]()
        assert set(shown["LINES"]) | set(shown["PICTURES"]) == set(shown["SECTIONS"])
        for name in ("stages/density", "stages/gradient_variance"):  # beside each figure its numbers
            assert (RUN / f"{name}.png").is_file()
            assert len((RUN / f"{name}.csv").read_text().splitlines()) > 6


def logged_steps(folder: Path, name: str) -> list[int]:
    """The steps of a number, as wandb's own tool reads them back."""
    (file,) = folder.glob("*.wandb")
    tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    read = subprocess.run(tool, capture_output=True, text=True, timeout=240)
    if read.returncode and "No such command" in read.stderr:
        pytest.skip("this wandb cannot read a run back")
    items = [line.get("history", {}).get("item", {}) for line in map(json.loads, read.stdout.splitlines())]
    return [item["trainer/global_step"] for item in items if name in item]


def logged_run(folder: Path) -> tuple[Path, dict]:
    """The run file in a folder, and what wandb's own tool reads back from it."""
    import wandb

    wandb.finish()
    (file,) = folder.rglob("*.wandb")
    tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    read = subprocess.run(tool, capture_output=True, text=True, timeout=240)
    if read.returncode and "No such command" in read.stderr:
        pytest.skip("this wandb cannot read a run back")
    return file, json.loads(read.stdout)


def overlay(change: dict[str, str]) -> str:
    """The digits' configuration with pieces of its text replaced."""
    text = DIGITS.read_text()
    for old, new in change.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


OTHER_DATA = [f"--config={CONFIGS / 'fashion_mnist_dit.yaml'}", "--data.init_args.data_dir=nowhere"]
MISTAKES = {
    # the configuration file
    "top-level key": ("file", overlay({"monitor:": "modle:\n  seed: 1\nmonitor:"}), "modle"),
    "misspelt section": ("file", overlay({"model:": "modle:"}), "modle"),
    "nested key": ("file", overlay({"warmup_steps": "warmup_step"}), "model.warmup_step"),
    "key of a class": ("file", overlay({"hidden_size": "hiden_size"}), "hiden_size"),
    "key of a callback": ("file", overlay({"every_n_steps: 20": "every_n_step: 20"}), "monitor.every_n_step"),
    "malformed": ("file", "model: [1, 2\n  x: }", "mistake.yaml: .*line 2"),
    "tabs": ("file", "model:\n\tseed: 1", "mistake.yaml: .*line 2"),
    "a list": ("file", "- 1\n- 2\n", "mistake.yaml"),
    "empty": ("file", "", "mistake.yaml"),
    "not text": ("file", b"\x7fELF\xff\xfe", "mistake.yaml"),
    "missing": ("arguments", ["--config=nowhere.yaml"], "nowhere.yaml"),
    "a folder": ("arguments", ["--config=."], "not a file"),
    # the command line
    "no configuration": ("alone", [], "no network is named: choose one with --model.network DiT"),
    "no data": ("alone", ["--model.network=torch.nn.Identity"], "no data is named: choose some with --data"),
    "abbreviation": ("arguments", ["--trainer.max_step=4"], "trainer.max_step"),
    "unknown option": ("arguments", ["--modle.seed=4"], "modle.seed"),
    "a checkpoint that may run code": ("arguments", ["--weights_only=false"], "would run whatever code a checkpoint"),
    "unknown word": ("arguments", ["hello"], "hello"),
    "no value": ("arguments", ["--trainer.max_steps"], "trainer.max_steps.* expected one argument"),
    "words for a number": ("arguments", ["--trainer.max_steps=many"], "trainer.max_steps.*many"),
    # classes
    "unknown class": ("arguments", ["--model.network=fm_stages.networks.DiTT"], "DiTT"),
    "unknown package": ("arguments", ["--model.network=nowhere.Net"], "nowhere"),
    "class of another kind": ("arguments", ["--model.path=fm_stages.networks.DiT"], "fm_stages.networks.DiT"),
    "unknown data": ("arguments", ["--data=fm_stages.data.MNIST"], "MNIST"),
    "unknown logger": ("arguments", ["--trainer.logger=CSVLoger"], "CSVLoger"),
    # the network
    "patches that do not divide": ("arguments", [f"{NETWORK}.patch_size=3"], "input_size=8 .* patch_size=3: choose"),
    "patches of nothing": ("arguments", [f"{NETWORK}.patch_size=0"], "patch_size=0"),
    "heads that do not divide": ("arguments", [f"{NETWORK}.num_heads=3"], "hidden_size=16 .* num_heads=3"),
    "no heads": ("arguments", [f"{NETWORK}.num_heads=0"], "num_heads=0"),
    "negative width": ("arguments", [f"{NETWORK}.hidden_size=-16"], "hidden_size=-16"),
    "negative depth": ("arguments", [f"{NETWORK}.depth=-1"], "depth=-1"),
    "other images": ("arguments", [f"{NETWORK}.input_size=16"], r"\(1, 8, 8\) .* \(1, 16, 16\): set its"),
    "other channels": ("arguments", [f"{NETWORK}.in_channels=3"], r"\(1, 8, 8\) .* \(3, 8, 8\): set its"),
    "too few classes": ("arguments", [f"{NETWORK}.num_classes=4"], "10 classes, the network 4: set its num_classes"),
    "no classes": ("arguments", [f"{NETWORK}.num_classes=0"], "10 classes, the network 0: set its num_classes"),
    # training
    "negative rate": ("arguments", ["--model.optimizer.init_args.lr=-1"], "learning rate: -1"),
    "unknown optimizer": ("arguments", ["--model.optimizer=torch.optim.Adamm"], "Adamm"),
    "shift of zero": (
        "arguments",
        ["--model.timesteps=fm_stages.flow.ShiftedTimesteps", "--model.timesteps.init_args.shift=0"],
        "a shift must be positive .* got 0",
    ),
    "shift without a value": ("arguments", ["--model.timesteps=fm_stages.flow.ShiftedTimesteps"], "required: shift"),
    "spread of zero": (
        "arguments",
        ["--model.timesteps=fm_stages.flow.LogitNormalTimesteps", "--model.timesteps.init_args.std=0"],
        "must be positive and finite, got 0",
    ),
    "boundary of two": (
        "arguments",
        ["--model.target=fm_stages.training.HybridTarget", "--model.target.init_args.boundary=2"],
        r"a time in \[0, 1\], got 2",
    ),
    "dropout of two": ("arguments", ["--model.label_dropout=2"], r"label_dropout must lie in \[0, 1\], got 2"),
    "decay above one": ("arguments", ["--model.ema_decay=1.5"], r"ema_decay must lie in \[0, 1\], got 1.5"),
    "negative warm-up": ("arguments", ["--model.warmup_steps=-1"], "warmup_steps must be 0 or more, got -1"),
    "monitor never": ("arguments", ["--monitor.every_n_steps=0"], "every_n_steps=0"),
    "no samples": ("arguments", ["--samples.num_samples=-1"], "num_samples=-1"),
    "guidance without a null class": (
        "arguments",
        ["--samples.guidance_scale=3", "--model.label_dropout=0"],
        "guidance_scale=3 needs .* set the module's label_dropout to 0.1, or guidance_scale to 1",
    ),
    # the data
    "missing data": ("arguments", OTHER_DATA, "no readable FashionMNIST files in .*nowhere .*FM_STAGES_DATA"),
    "no batch": ("arguments", ["--data.init_args.batch_size=0"], "batch_size=0"),
    "batch beyond the data": ("arguments", ["--data.init_args.batch_size=9999"], "batch_size=9999 .* 1438"),
    "batch that does not divide": (
        "arguments",
        ["--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=3"],
        "batch_size=64 .* 1 ranks times 3 accumulated micro-batches: 63 and 66 do",
    ),
    "micro-batches of nothing": ("arguments", ["--data.init_args.micro_batch_size=0"], "micro_batch_size=0 must be 1"),
    "two accumulations": (
        "arguments",
        ["--trainer.accumulate_grad_batches=3", "--data.init_args.micro_batch_size=32"],
        "accumulate_grad_batches=3 is given, and micro_batch_size=32, from which 2 follows: leave one of them out",
    ),
    "batches repeated": ("arguments", ["--trainer.overfit_batches=2"], "overfit_batches=2 .* use limit_train_batches"),
    # the Trainer
    "half weights": ("arguments", ["--trainer.precision=bf16-true"], "bf16-true would round .* use bf16-mixed"),
    "no such accelerator": ("arguments", ["--trainer.accelerator=gpuu"], "gpuu"),
    "negative steps": ("arguments", ["--trainer.max_steps=-5"], "-5"),
    "negative seed": ("arguments", ["--seed_everything=-3"], "-3"),
    "validation never": ("arguments", ["--trainer.val_check_interval=0"], "val_check_interval"),
    "a rehearsal of less than nothing": ("arguments", ["--verify-resume=-3"], "verify_resume.*-3"),
    "validation inside a step": (
        "arguments",
        ["--trainer.accumulate_grad_batches=3"],
        "val_check_interval=.* counts micro-batches where accumulate_grad_batches=3",
    ),
    # checkpoints
    "missing checkpoint": ("arguments", ["--ckpt_path=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    "missing weights": ("arguments", ["--init-from=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
    "foreign checkpoint": (
        "arguments",
        ["--ckpt_path=foreign.ckpt"],
        "foreign.ckpt is not a checkpoint that can be read",
    ),
    "foreign weights": ("arguments", ["--init-from=foreign.ckpt"], "foreign.ckpt is not a checkpoint that can be read"),
    "someone's weights": ("arguments", ["--ckpt_path=other.ckpt"], "other.ckpt is not a checkpoint of fm-stages"),
    "bare weights": ("arguments", ["--ckpt_path=bare.ckpt"], "bare.ckpt"),
    "two checkpoints": ("arguments", ["--init-from=other.ckpt", "--ckpt_path=best"], "give one of them"),
}


def assert_refused(done: SimpleNamespace, message: str, folder: Path, files: set[Path]) -> None:
    """Status 2, one line that says what, nothing left behind."""
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("fm-stages: ")
    assert done.err.count("\n") == 1
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err
    assert set(folder.rglob("*")) == files


class TestMistakes:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        Path(tmp_path / "foreign.ckpt").write_bytes(b"\x7fELF of another kind")
        torch.save({"model": {}}, tmp_path / "other.ckpt")
        torch.save({"state_dict": {"network.a": torch.zeros(1)}}, tmp_path / "bare.ckpt")
        return tmp_path

    @pytest.mark.parametrize("name", MISTAKES)
    def test_cost_one_line_and_no_folder(self, command, folder, name):
        kind, given, message = MISTAKES[name]
        arguments = ["--config", DIGITS, *TINY]
        if kind == "file":
            (folder / "mistake.yaml").write_bytes(given if isinstance(given, bytes) else given.encode())
            arguments = ["--config", "mistake.yaml"]
        elif kind == "alone":
            arguments = given
        else:
            arguments += given
        files = set(folder.rglob("*"))
        assert_refused(command("fit", *arguments, "--trainer.logger=CSVLogger"), message, folder, files)

    def test_with_the_default_logger_no_run_begins(self, command, folder):
        files = set(folder.rglob("*"))
        done = command("fit", "--config", DIGITS, *TINY, f"{NETWORK}.input_size=16")
        assert_refused(done, "set its in_channels and input_size", folder, files)

    @pytest.mark.parametrize("way", ["fit", "validate"])
    def test_a_checkpoint_of_another_width(self, trained, command, folder, way):
        files = set(folder.rglob("*"))
        arguments = [*TINY, "--trainer.logger=CSVLogger", f"--ckpt_path={trained.last}", f"{NETWORK}.hidden_size=32"]
        assert_refused(command(way, "--config", DIGITS, *arguments), r"last\.ckpt does not fit", folder, files)

    @pytest.mark.parametrize("config", [["--config", "mistake.yaml"], ["--config=mistake.yaml"]])
    def test_a_misspelt_section_that_the_command_line_completes(self, command, folder, config):
        """The parser would complain of the network, which is where the rest of the section is missed first."""
        (folder / "mistake.yaml").write_text(overlay({"model:": "modle:"}))
        files = set(folder.rglob("*"))
        done = command("fit", *config, *TINY, "--trainer.logger=CSVLogger")
        assert_refused(done, "modle", folder, files)

    @pytest.mark.parametrize("ckpt_path", [None, "last", "best"])
    def test_validate_of_no_checkpoint(self, command, folder, ckpt_path):
        """Random weights would be measured, and nobody told."""
        files = set(folder.rglob("*"))
        arguments = [*TINY, "--trainer.logger=CSVLogger", *([f"--ckpt_path={ckpt_path}"] if ckpt_path else [])]
        assert_refused(command("validate", "--config", DIGITS, *arguments), "ckpt_path", folder, files)

    def test_init_from_is_not_for_validate(self, command, folder):
        files = set(folder.rglob("*"))
        done = command("validate", "--config", DIGITS, *TINY, "--init-from=other.ckpt")
        assert_refused(done, "--init-from is for fit", folder, files)

    def test_a_name_of_the_file_comes_first(self, command, folder):
        done = command("fit", "--config", DIGITS, *TINY, f"{NETWORK}.patch_size=3")
        assert done.err.startswith(f"fm-stages: {DIGITS}: input_size=8")

    def test_a_defect_keeps_its_traceback(self, fit, monkeypatch, quick_figures):
        """What is not the person's fault must not look like it."""

        def broken(self, x, t, y):
            raise ValueError("a defect")

        monkeypatch.setattr(DiT, "forward", broken)
        with pytest.raises(ValueError, match="a defect"):
            fit()

    def test_a_defect_in_a_class_of_ones_own_keeps_its_traceback(self, command, folder, monkeypatch):
        """Its line number is what helps: `fm-stages: own.yaml: 'width'` would not."""
        broken = "import torch\nclass Net(torch.nn.Linear):\n    def __init__(self) -> None:\n        {}['width']\n"
        (folder / "broken_networks.py").write_text(broken)
        (folder / "own.yaml").write_text("data: fm_stages.data.Digits\nmodel:\n  network: broken_networks.Net\n")
        monkeypatch.syspath_prepend(folder)
        with pytest.raises(KeyError, match="width"):
            command("fit", "--config", "own.yaml", "--trainer.logger=false", "--allow-import=broken_networks")

    def test_in_a_process_of_its_own(self, tmp_path):
        command = [sys.executable, "-m", "fm_stages", "fit", "--config", str(DIGITS), "--trainer.max_step", "4"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1] == f"fm-stages: {DIGITS}: unrecognized arguments: --trainer.max_step 4"
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_reader_of_the_output_who_leaves_ends_it_quietly(tmp_path):
    """As ``fm-stages ... | head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fm_stages", "--help"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
