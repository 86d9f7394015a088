"""The command: paired runs, one probe for all of them, resuming, refusing, and a report that says what was found.

Runs are made in this process, by what stands in for `subprocess.Popen`; the slow tests start real ones.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from fm_stages import cli
from fm_stages.flow import sample
from fm_stages.oracle import StageProfile
from fm_stages.studies import load_run
from fm_stages.studies.compare import runs as compare_runs
from fm_stages.studies.compare.command import compare_command
from fm_stages.studies.compare.measure import METRICS, PROGRESS, pixel_mmd
from fm_stages.studies.compare.runs import alone
from fm_stages.studies.diagnose.measure import diagnose
from fm_stages.training import FlowMatching, network_weights, read_checkpoint

BASE = {
    "model": {
        "network": {
            "class_path": "fm_stages.networks.DiT",
            "init_args": {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 1}
            | {"num_heads": 2, "num_classes": 10},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "ema_decay": 0.5,
    },
    "data": {"class_path": "fm_stages.data.Digits", "init_args": {"batch_size": 64}},
    "monitor": {"every_n_steps": 2, "window": 1},
    "samples": {"every_n_steps": 0, "num_samples": 10, "num_steps": 1},
    "trainer": {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1, "logger": "CSVLogger"}
    | {"enable_progress_bar": False},
}
ARMS = """
regular: {}
oracle: {model: {target: {class_path: fm_stages.training.OracleTarget}}}
"""
QUICK = ("--num_probe=256", "--num_samples=40", "--solver_steps=4", "--milestones=2")


class InProcess:
    """Stands in for a process that trains: runs ``fm-stages`` here."""

    commands: list[list[str]] = []
    stop_at: int | None = None
    """Steps after which a run is cut off, as by a kill."""

    def __init__(self, command, stdout, env, **_) -> None:
        self.commands.append(command)
        extra = [] if self.stop_at is None else [f"--trainer.max_steps={self.stop_at}"]
        self.returncode = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["fm-stages", *command[3:], *extra])
            for name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_NAME"):
                patch.setenv(name, env[name])
            patch.setattr("fm_stages.plots.save", lambda figure, path: path)
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
                try:
                    cli.main()
                except SystemExit as end:
                    self.returncode = end.code or 0
        if self.stop_at is not None:
            self.returncode = -9

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(compare_runs, "Popen", InProcess)
    monkeypatch.setattr(InProcess, "commands", [])
    return InProcess


def write_inputs(arms: str = ARMS, **changes) -> None:
    Path("base.yaml").write_text(yaml.safe_dump({**BASE, **changes}))
    Path("arms.yaml").write_text(arms)


def result(arm: str, seed: int, out: str | Path = "out") -> dict:
    return json.loads(Path(out, arm, f"seed_{seed}", "result.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """Two arms with two seeds, for tests that only look; and what the runs saw."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(compare_runs, "Popen", InProcess)
        seen: dict[str, list] = {}
        step = FlowMatching.training_step

        def spied(self, batch, batch_idx):
            key = str(Path(self.trainer.default_root_dir))
            if key not in seen:
                seen[key] = [{"weights": {k: v.clone() for k, v in self.network.state_dict().items()}}]
            outputs = step(self, batch, batch_idx)
            seen[key].append({k: outputs[k].clone() for k in ("x0", "x1", "t", "labels", "index")})
            return outputs

        patch.setattr(FlowMatching, "training_step", spied)
        write_inputs()
        compare_command(["--config=base.yaml", "--arms=arms.yaml", "--seeds=2", "--out=out", *QUICK])
        torch.save(seen, "seen.pt")
    return folder


@pytest.fixture
def measured(compared, tmp_path) -> None:
    """The stages of the data, which a comparison in this folder finds measured."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/profile.json").write_bytes((compared / "out/profile.json").read_bytes())


@pytest.fixture
def copied(compared, tmp_path, monkeypatch, in_process) -> Path:
    """The same, to go on with in an empty folder."""
    import shutil

    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestPairing:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_arms_of_a_seed_start_alike_and_see_the_same_to_the_last_bit(self, compared, seed):
        seen = torch.load(compared / "seen.pt")
        regular, oracle = (seen[f"out/{arm}/seed_{seed}"] for arm in ("regular", "oracle"))
        assert len(regular) == len(oracle) == 5  # the weights and four steps
        for ours, theirs in zip(regular, oracle, strict=True):
            ours, theirs = (part.get("weights", part) for part in (ours, theirs))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_seeds_differ_in_all_of_it(self, compared):
        seen = torch.load(compared / "seen.pt")
        zero, one = (seen[f"out/regular/seed_{seed}"] for seed in (0, 1))
        weights = "blocks.0.attn.qkv.weight"
        assert not torch.equal(zero[0]["weights"][weights], one[0]["weights"][weights])
        for name in ("x0", "x1", "t"):
            assert not torch.equal(zero[1][name], one[1][name])

    def test_the_arms_end_with_other_weights(self, compared):
        ends = [read_checkpoint(compared / f"out/{arm}/seed_0/checkpoints/last.ckpt") for arm in ("regular", "oracle")]
        weights = [network_weights(end, ema=False)["x_embedder.proj.weight"] for end in ends]
        assert not torch.equal(*weights)


class TestMeasurement:
    def test_the_probe_is_the_same_for_all_runs(self, compared):
        """The floor depends on inputs, noise and times alone, so it tells one probe from another."""
        runs = [result(arm, seed, compared / "out") for arm in ("regular", "oracle") for seed in (0, 1)]
        parts = [run["weights"][weights] for run in runs for weights in ("raw", "ema")]
        assert len({part["floor"] for part in parts}) == 1
        assert len({str(part["curves"]["train"]["mean"]["zero"]) for part in parts}) == 1
        assert len({str(part["curves"]["held_out"]["count"]) for part in parts}) == 1
        assert len({part["gap"] for part in parts}) == len(parts)

    def test_numbers_are_those_of_diagnose_with_the_bases_data(self, compared):
        file = compared / "out/oracle/seed_1/checkpoints/last.ckpt"
        checkpoint, module, data = load_run(file)
        data.seed = 0  # the base's: the order of the images decides which are measured
        profile = StageProfile.load(compared / "out/profile.json")
        for weights, ema in (("raw", False), ("ema", True)):
            module.network.load_state_dict(network_weights(checkpoint, ema))
            train, held_out, _ = diagnose(module, module.network, data, 256, 0, profile)
            found = result("oracle", 1, compared / "out")["weights"][weights]
            b = profile.boundary
            for name, expected in {
                "gap": train.average("gap"),
                "gap_navigation": train.average("gap", 0, b),
                "gap_refinement": train.average("gap", b, 1),
                "regular": train.average("regular"),
                "held_out_regular": held_out.average("regular"),
                "held_out_gap_navigation": held_out.average("gap", 0, b),
            }.items():
                assert found[name] == pytest.approx(expected, rel=1e-6), name
        # the samples: 40 images of the classes of the held-out images that they are compared with
        from fm_stages.flow import keyed_generator

        held_out_set = data.val_dataloader().dataset
        chosen = torch.randperm(len(held_out_set), generator=keyed_generator("pixel mmd", 0))[:40]
        real, labels = held_out_set.rows(chosen)
        module.network.eval()
        value, error = pixel_mmd(real, sample(module.network, labels, (1, 8, 8), 0, 4))
        assert (found["pixel_mmd"], found["pixel_mmd_sem"]) == pytest.approx((value, error), rel=1e-5)

    def test_milestones_are_measured_as_the_end_is(self, compared, command, in_process):
        """The last of them is the end; one on the way is what a run of so many steps ends with."""
        found = result("oracle", 0, compared / "out")
        assert [stone["step"] for stone in found["milestones"]] == [2, 4]
        assert {name: found["weights"]["ema"][name] for name in PROGRESS}.items() <= found["milestones"][-1].items()
        assert not (compared / "out/oracle/seed_0/milestones").exists()
        write_inputs(trainer=BASE["trainer"] | {"max_steps": 2})
        call = ["compare", "--config=base.yaml", "--arms=arms.yaml", "--seeds=1", "--out=half", *QUICK]
        assert command(*call, "--run=oracle/0").status == 0
        half = result("oracle", 0, "half")
        assert half["steps"] == 2
        assert half["milestones"][-1] == pytest.approx(found["milestones"][0])

    def test_raw_weights_have_no_samples_where_there_are_averaged_ones(self, compared):
        assert "pixel_mmd" not in result("regular", 0, compared / "out")["weights"]["raw"]


class TestReport:
    def test_files(self, compared):
        names = {path.name for path in (compared / "out").iterdir() if path.is_file()}
        reports = {"report.md", "report.json", "gap_by_t.png", "differences.png", "progress.png"}
        assert names == {*reports, "profile.json", "comparison.yaml"}
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in (compared / "out").glob("*.png"))

    def test_differences_are_those_of_scipys_paired_test(self, compared):
        report = json.loads((compared / "out/report.json").read_text())
        for weights in ("raw", "ema"):
            for metric in METRICS:
                if (weights, metric) == ("raw", "pixel_mmd"):
                    continue
                values = {
                    arm: [result(arm, seed, compared / "out")["weights"][weights][metric] for seed in (0, 1)]
                    for arm in ("regular", "oracle")
                }
                found = report["differences"][weights]["oracle"][metric]
                interval = stats.ttest_rel(values["oracle"], values["regular"]).confidence_interval(0.95)
                assert found["mean"] == pytest.approx(np.mean(values["oracle"]) - np.mean(values["regular"]))
                assert (found["low"], found["high"]) == pytest.approx(tuple(interval))
                spread = np.std(np.subtract(values["oracle"], values["regular"]), ddof=1) / np.sqrt(2)
                # quantiles of t with one degree of freedom, which is the Cauchy distribution: tan(pi (p - 1/2))
                assert found["smallest"] == pytest.approx((np.tan(0.475 * np.pi) + np.tan(0.3 * np.pi)) * spread)
                assert report["means"][weights]["oracle"][metric] == pytest.approx(np.mean(values["oracle"]))

    def test_curves_over_t_are_paired_by_seed(self, compared):
        report = json.loads((compared / "out/report.json").read_text())
        gaps = {
            arm: [
                np.array(result(arm, seed, compared / "out")["weights"]["ema"]["curves"]["train"]["mean"]["gap"], float)
                for seed in (0, 1)
            ]
            for arm in ("regular", "oracle")
        }
        ratios = np.array(gaps["oracle"]) / np.array(gaps["regular"]) - 1
        found = report["gap_by_t"]["oracle"]
        np.testing.assert_allclose(np.array(found["relative"], float), ratios.mean(0))
        np.testing.assert_allclose(np.array(found["relative_sem"], float), np.abs(ratios[0] - ratios[1]) / 2)

    def test_text_says_what_was_compared_and_how(self, compared):
        text = (compared / "out/report.md").read_text()
        report = json.loads((compared / "out/report.json").read_text())
        for part in (
            *("# out: 2 arms, 2 seeds", "Reference: `regular`", "Finished: 4 of 4 runs", "averaged weights (EMA)"),
            *("pixel MMD (not FID)", "95 % interval", "--config base.yaml --arms arms.yaml --seeds 2 --out out"),
            *("Seeds 0, 1;", "CPU cores", "--num_probe 256", "![Gap over t](gap_by_t.png)"),
        ):
            assert part in text
        rows = [line for line in text.splitlines() if line.startswith("| oracle | gap, navigation |")]
        pair = report["differences"]["ema"]["oracle"]["gap_navigation"]
        assert len(rows) == 1
        assert float(rows[0].split("|")[3]) == pytest.approx(pair["mean"], rel=0.01)
        assert ("*" in rows[0]) == (pair["low"] > 0 or pair["high"] < 0)

    def test_wandb_holds_a_summary_run_in_the_group(self, copied):
        """Read back with wandb's own tool."""
        base = yaml.safe_load(Path("base.yaml").read_text())
        wandb_logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "own"}}
        base["trainer"]["logger"] = wandb_logger
        known = yaml.safe_load(Path("out/comparison.yaml").read_text())
        Path("out/report.json").unlink()
        Path("base.yaml").write_text(yaml.safe_dump(base))
        for arm in known["arms"].values():  # the runs that are there stand for runs with wandb
            arm["trainer"]["logger"] = None
        Path("out/comparison.yaml").unlink()
        for file in Path("out").rglob("result.json"):
            file.unlink()
        compare_command(["--config=base.yaml", "--arms=arms.yaml", "--seeds=1", "--out=out", *QUICK])
        files = [file for file in Path("out").rglob("*.wandb") if file.is_relative_to("out/wandb")]
        assert len(files) == 1
        tool = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(files[0])]
        read = subprocess.run(tool, capture_output=True, text=True, timeout=240)
        if read.returncode and "No such command" in read.stderr:
            pytest.skip("this wandb cannot read a run back")
        run = json.loads(read.stdout)
        means = json.loads(Path("out/report.json").read_text())["means"]["ema"]
        assert run["project"] == "own"
        assert run["summary"]["oracle/gap_navigation"] == pytest.approx(means["oracle"]["gap_navigation"])
        assert run["summary"]["comparison/differences"]["nrows"] == len(METRICS) + 1
        for name in ("gap_by_t", "differences", "progress"):
            assert run["summary"][f"comparison/{name}_figure"]["_type"] == "image-file"


class TestGoingOn:
    CALL = ("compare", "--config=base.yaml", "--arms=arms.yaml", "--out=out", *QUICK)

    def test_finished_runs_are_not_done_again_and_seeds_can_be_added(self, copied, command):
        before = {arm: result(arm, 1) for arm in ("regular", "oracle")}
        assert command(*self.CALL, "--seeds=2").status == 0
        assert InProcess.commands == []
        assert {arm: result(arm, 1) for arm in before} == before
        assert command(*self.CALL, "--seeds=3").status == 0
        assert [re.search(r"(\w+)/seed_(\d)", " ".join(c)).groups() for c in InProcess.commands] == [
            *(("regular", "2"), ("oracle", "2"))
        ]
        assert "Finished: 6 of 6 runs" in Path("out/report.md").read_text()

    @pytest.mark.parametrize(
        ("base", "arms", "arguments", "message"),
        [
            (
                {"model": BASE["model"] | {"ema_decay": 0.6}},
                ARMS,
                (),
                r"regular had model.ema_decay=0.5, now it is 0.6",
            ),
            ({}, ARMS.replace("OracleTarget", "ConditionalTarget"), (), "oracle had model.target.class_path="),
            ({}, ARMS, ("--num_samples=60",), "probe had num_samples=40, now it is 60"),
        ],
        ids=["base", "arm", "probe"],
    )
    def test_what_has_changed_is_refused(self, copied, command, base, arms, arguments, message):
        write_inputs(arms, **base)
        done = command(*self.CALL, "--seeds=2", *arguments)
        assert done.status == 2
        assert re.search(message, done.err), done.err
        assert "give another folder with --out" in done.err
        assert InProcess.commands == []

    def test_what_has_not_been_trained_may_be_corrected(self, command, in_process, measured):
        broken = "broken: {trainer: {max_time: never}}\n"
        write_inputs(ARMS + broken)
        assert command(*self.CALL, "--seeds=1", "--dry-run").status == 0
        assert command(*self.CALL, "--seeds=1", "--num_samples=60", "--run=broken/0").status == 1
        write_inputs(ARMS + broken.replace("never", "{minutes: 10}"))
        in_process.commands.clear()
        assert command(*self.CALL, "--seeds=1", "--run=broken/0").status == 0
        assert len(in_process.commands) == 1
        write_inputs(ARMS + broken.replace("never", "{minutes: 20}"))
        assert "had trainer.max_time=" in command(*self.CALL, "--seeds=1", "--run=broken/0").err

    def test_an_interrupted_run_goes_on_and_ends_where_it_would_have(
        self, compared, command, in_process, measured, monkeypatch
    ):
        write_inputs()
        monkeypatch.setattr(in_process, "stop_at", 2)
        stopped = command(*self.CALL, "--seeds=1", "--run=oracle/0")
        assert stopped.status == 1
        assert "run oracle/0 failed: exit status -9" in stopped.err
        assert not list(Path("out").rglob("result.json"))
        monkeypatch.setattr(in_process, "stop_at", None)
        in_process.commands.clear()
        assert command(*self.CALL, "--seeds=1", "--run=oracle/0").status == 0
        ((*_, last),) = in_process.commands
        assert "--ckpt_path=out/" in last
        whole, parts = result("oracle", 0, compared / "out"), result("oracle", 0)
        assert parts["weights"] == whole["weights"]
        assert parts["milestones"] == whole["milestones"]

    def test_a_run_that_was_trained_but_not_measured_is_only_measured(self, copied, command):
        before = result("oracle", 1)
        Path("out/oracle/seed_1/result.json").unlink()
        assert command(*self.CALL, "--seeds=2").status == 0
        assert InProcess.commands == []
        # the weights along the way went when they had been measured
        assert result("oracle", 1) == before | {"milestones": before["milestones"][-1:]}

    def test_a_broken_arm_leaves_the_others_alone(self, copied, command):
        """Of those one is finished, and one, whose turn comes after it, trained and not yet measured."""
        write_inputs("regular: {}\nbroken: {trainer: {max_time: never}}\n" + ARMS.replace("regular: {}\n", ""))
        Path("out/oracle/seed_0/result.json").unlink()
        done = command(*self.CALL, "--seeds=1")
        assert done.status == 1
        assert re.search(r"run broken/0 failed: exit status 2: .*never.* \(log: out/broken/seed_0/log.txt\)", done.err)
        text = Path("out/report.md").read_text()
        assert "Finished: 2 of 3 runs" in text
        assert "- **Missing**: broken/0: exit status 2" in text
        assert "no interval and no test" in text  # one seed
        report = json.loads(Path("out/report.json").read_text())
        assert list(report["missing"]) == ["broken/0"]
        assert report["differences"]["ema"]["oracle"]["gap"]["low"] is None

    def test_a_timer_of_the_users_own_is_the_one_that_counts(self, command, in_process, measured):
        own = {"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"interval": "step"}}
        write_inputs(trainer=BASE["trainer"] | {"callbacks": [own]})
        assert command(*self.CALL, "--seeds=1", "--run=oracle/0").status == 0
        assert result("oracle", 0)["train_sec"] > 0

    def test_a_run_that_another_process_trains_is_waited_for(self, tmp_path):
        run = type("Run", (), {"folder": tmp_path})()
        order, held, waits = [], threading.Event(), threading.Event()

        def hold() -> None:
            with alone(run):
                held.set()
                waits.wait()
                order.append("first")

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        with alone(run, waits.set):
            order.append("second")
        thread.join()
        assert order == ["first", "second"]


class TestCluster:
    CALL = TestGoingOn.CALL

    def test_a_dry_run_prints_commands_that_do_what_the_whole_would(self, command, in_process, measured):
        write_inputs()
        done = command(*self.CALL, "--seeds=2", "--dry-run")
        assert done.status == 0, done.err
        assert in_process.commands == []
        lines = [line.split() for line in done.out.splitlines() if line.startswith("fm-stages compare")]
        runs = [line[-1] for line in lines if "--run" in line]
        assert runs == ["regular/0", "oracle/0", "regular/1", "oracle/1"]
        assert "#SBATCH --array=0-3" in done.out
        sweep = yaml.safe_load(Path("out/sweep.yaml").read_text())
        assert sweep["parameters"] == {"run": {"values": runs}}
        assert sweep["command"][:3] == ["${env}", "fm-stages", "compare"]
        assert [word for word in sweep["command"][1:-1]] == lines[0][:-2]
        one = command(*lines[1][1:])
        assert one.status == 0, one.err
        assert [path.parent for path in Path("out").rglob("result.json")] == [Path("out/oracle/seed_0")]
        assert not Path("out/report.md").exists()
        assert lines[-1][-1] == "--report"
        last = command(*lines[-1][1:])
        assert last.status == 0
        assert "- **Missing**: regular/0, regular/1, oracle/1: not run yet" in Path("out/report.md").read_text()
        assert len(in_process.commands) == 1


MISTAKES = {
    "no seeds": (["--seeds=0"], "--seeds 0 must be 1 or more"),
    "no such arms": (["--seeds=1", "--arms=nowhere.yaml"], "--arms nowhere.yaml: there is no such file"),
    "no such run": (["--seeds=1", "--run=oracle/1"], "--run oracle/1: the runs are regular/0, oracle/0"),
    "no such reference": (["--seeds=1", "--reference=other"], "--reference other: the arms are regular, oracle"),
    "no milestones": (["--seeds=1", "--milestones=0"], "--milestones 0 must be 1 or more"),
    "few samples": (["--seeds=1", "--num_samples=3"], "--num_samples 3 must be 20 or more"),
    "misspelt": (["--seeds=1", "--sedes=2"], "sedes"),
    "base": (["--seeds=1", "--config=nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, command, in_process, profile_of, monkeypatch):
    write_inputs()
    monkeypatch.setattr("fm_stages.studies.compare.command.measure_stages", lambda *_: profile_of(boundary=0.5))
    arguments, message = MISTAKES[name]
    done = command("compare", "--config=base.yaml", "--arms=arms.yaml", "--out=out", *arguments)
    assert done.status == 2
    assert re.search(message, done.err), done.err
    assert done.err.count("\n") == 1
    assert in_process.commands == []


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on(tmp_path, monkeypatch):
    """Real processes; the one that trains lives on and is waited for."""
    monkeypatch.chdir(tmp_path)
    write_inputs(trainer=BASE["trainer"] | {"max_steps": 40})
    call = [sys.executable, "-m", "fm_stages", *TestGoingOn.CALL, "--seeds=1"]
    first = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not Path("out/regular/seed_0/checkpoints/last.ckpt").is_file():
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.wait()
    again = subprocess.run(call, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert result("regular", 0)["steps"] == result("oracle", 0)["steps"] == 40
    assert "Finished: 2 of 2 runs" in Path("out/report.md").read_text()
    assert Path("out/regular/seed_0/log.txt").read_text().count(f"$ {sys.executable}") == 2
    assert os.listdir("out/oracle/seed_0/checkpoints")
