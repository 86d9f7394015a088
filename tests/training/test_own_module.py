"""Two processes in one launch: the monitor beside a module of one's own, and the package's run beside one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from fm_stages.flow import CosinePath
from fm_stages.oracle import StageProfile

HERE = Path(__file__).parent
WINDOW = 8


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder that two ranks left: both ended well."""
    folder = tmp_path_factory.mktemp("two_ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "two_ranks.py"), str(folder)],
        cwd=folder,
        env={**{k: v for k, v in os.environ.items() if k != "PL_GLOBAL_SEED"}, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def ranks_of(folder: Path) -> list[SimpleNamespace]:
    return [SimpleNamespace(**torch.load(folder / f"rank{rank}.pt")) for rank in range(2)]


@pytest.fixture(scope="module")
def own(launched) -> list[SimpleNamespace]:
    return ranks_of(launched / "own")


@pytest.fixture(scope="module")
def data():
    data = load("own_module").OwnData()
    data.setup()
    return data


@pytest.fixture(scope="module", params=[0, 1], ids=["first window", "second window"])
def window(request, own, data, by_definition, binned, read_csv, launched):
    """Step of the window, its table, and the same of all samples that both ranks trained on, by definition."""
    step = (request.param + 1) * WINDOW
    table = read_csv(launched / f"own/oracle/gap_by_t_{step:07d}.csv")
    batches = [outputs for rank in own for outputs in rank.steps[step - WINDOW : step]]
    samples = [by_definition(data.images, data.labels, CosinePath(), outputs) for outputs in batches]
    return step, table, binned(samples, [*table["t_lo"], 1.0])


@pytest.fixture(scope="module")
def logged(launched, read_csv):
    table = read_csv(launched / "own/metrics.csv")

    def at(name: str, step: int) -> float:
        (value,) = (x for x, s in zip(table[name], table["step"], strict=True) if s == step and x == x)
        return value

    return at


@pytest.fixture(scope="module")
def pair(launched):
    return ranks_of(launched / "flow_matching")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[SimpleNamespace, Path]:
    """What one process leaves."""
    folder = tmp_path_factory.mktemp("one_rank")
    load("two_ranks").flow_matching(folder, "auto", 1)
    return SimpleNamespace(**torch.load(folder / "rank0.pt")), folder


class TestOwnModule:
    def test_ranks_trained_on_different_images_and_noise(self, own):
        for a, b in zip(own[0].steps, own[1].steps, strict=True):
            assert (a["x1"][:, None] != b["x1"][None]).flatten(2).any(2).all()
            assert not torch.equal(a["x0"], b["x0"])
            assert a["prediction"].dtype == torch.bfloat16  # as the module returns it

    def test_table_is_that_of_both_ranks_samples(self, window):
        _, table, expected = window
        assert table["count"] == [len(expected.of("t", k)) for k in range(18)]
        assert sum(table["count"]) == 2 * WINDOW * 32
        for name in ("regular", "gap", "floor", "residual", "identity", "top1", "ess", "zero", "wiener"):
            means = [expected.of(name, k).mean() if n else np.nan for k, n in enumerate(table["count"])]
            assert table[name] == pytest.approx(means, rel=2e-4, abs=1e-5, nan_ok=True), name

    def test_scalars_are_those_of_both_ranks_samples(self, window, logged, own):
        step, _, expected = window
        boundary = StageProfile.from_json(own[0].profile).boundary
        for name in ("regular", "gap", "floor", "top1", "ess"):
            assert logged(f"oracle/{name}", step) == pytest.approx(expected.average(name), rel=1e-4)
        navigation, refinement = expected.average("gap", 0, boundary), expected.average("gap", boundary, 1)
        assert logged("oracle/gap_navigation", step) == pytest.approx(navigation, rel=1e-4)
        assert logged("oracle/gap_refinement", step) == pytest.approx(refinement, rel=1e-4)
        closed = 1 - navigation / expected.average("wiener", 0, boundary)
        assert logged("oracle/closed", step) == pytest.approx(closed, rel=1e-3)
        assert logged("oracle/identity_z", step) == pytest.approx(expected.z_score(), abs=0.01)

    def test_identity_holds(self, window, logged):
        step, _, expected = window
        assert abs(logged("oracle/identity_z", step)) < 4
        regular, parts = expected.samples["regular"], expected.samples["gap"] + expected.samples["floor"]
        assert regular.mean() == pytest.approx(parts.mean(), rel=0.1)

    def test_ranks_agree(self, own):
        assert own[0].profile == own[1].profile
        assert str(own[0].table) == str(own[1].table)
        assert all(torch.equal(own[0].weights[name], x) for name, x in own[1].weights.items())

    def test_label_dropout_is_that_of_both_ranks_first_batch(self, own):
        share = torch.cat([rank.steps[0]["labels"] == -1 for rank in own]).float().mean().item()
        assert 0 < share < 0.5
        assert StageProfile.from_json(own[0].profile).label_dropout == pytest.approx(share)

    def test_the_training_step_is_ten_lines(self):
        """With the two lines that make the monitor and hand it over: what the README quotes."""
        source = (HERE / "own_module.py").read_text().split("def training_step")[1].split("def configure")[0]
        assert len([line for line in source.splitlines() if line.strip()]) <= 8


class TestFlowMatching:
    def test_same_draws(self, pair, alone):
        one, _ = alone
        for whole, *parts in zip(one.steps, *(rank.steps for rank in pair), strict=True):
            for name in ("x0", "x1", "x_t", "t", "labels", "index"):
                assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), name

    def test_same_losses(self, pair, alone):
        one, _ = alone
        two = [[outputs["loss"].item() for outputs in rank.steps] for rank in pair]
        assert np.mean(two, 0) == pytest.approx([outputs["loss"].item() for outputs in one.steps], rel=1e-5)

    def test_same_weights_on_both_ranks_and_as_in_one_process(self, pair, alone):
        one, _ = alone
        assert any(name.startswith("network_ema.") for name in one.weights)
        for name, weights in one.weights.items():
            assert torch.equal(pair[0].weights[name], pair[1].weights[name]), name
            torch.testing.assert_close(pair[0].weights[name], weights, rtol=1e-3, atol=1e-4)

    def test_same_logged_numbers(self, launched, alone, read_csv):
        two, one = (read_csv(folder / "metrics.csv") for folder in (launched / "flow_matching", alone[1]))
        assert {"train/loss", "val/loss_ema", "oracle/gap", "oracle_val/gap_navigation_ema"} <= one.keys()
        assert two.keys() == one.keys()
        for name in one:
            if not name.startswith("speed/") and name != "oracle/share":
                assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4, nan_ok=True), name

    def test_same_tables_and_pictures(self, launched, alone):
        folders = launched / "flow_matching", alone[1]
        two, one = ({file.relative_to(folder) for file in folder.rglob("*.*")} for folder in folders)
        assert two == one | {Path("rank1.pt")}
        files = [folder / "oracle/gap_by_t_0000006.csv" for folder in folders]
        tables = [np.genfromtxt(file, delimiter=",", skip_header=1) for file in files]
        np.testing.assert_allclose(*tables, rtol=5e-3, atol=1e-4)

    def test_what_two_ranks_saved_goes_on_in_one_process(self, launched, alone, tmp_path):
        half_way = launched / "flow_matching/checkpoints/step_0000003.ckpt"
        load("two_ranks").flow_matching(tmp_path, "auto", 1, ckpt_path=half_way)
        resumed = torch.load(tmp_path / "rank0.pt")
        losses = [[outputs["loss"].item() for outputs in steps] for steps in (resumed["steps"], alone[0].steps[3:])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        # a window of one step before the checkpoint, by both ranks, and one after it
        files = [folder / "oracle/gap_by_t_0000004.csv" for folder in (tmp_path, alone[1])]
        tables = [np.genfromtxt(file, delimiter=",", skip_header=1) for file in files]
        np.testing.assert_allclose(*tables, rtol=5e-3, atol=1e-4)

    def test_two_ranks_go_on_where_two_ranks_stopped_to_the_last_bit(self, launched, pair):
        for rank, whole in zip(ranks_of(launched / "resumed"), pair, strict=True):
            assert all(torch.equal(rank.weights[name], weights) for name, weights in whole.weights.items())
            assert repr(rank.table) == repr(whole.table)
        for name in (
            "oracle/gap_by_t_0000004",
            "oracle/gap_over_steps",
            "memorization/regular_by_t",
            "memorization/regular_by_stage",
        ):
            files = [launched / folder / f"{name}.csv" for folder in ("resumed", "flow_matching")]
            assert files[0].read_text() == files[1].read_text(), name

    def test_other_callbacks_see_what_a_validation_found(self, pair, alone, read_csv):
        logged = read_csv(alone[1] / "metrics.csv")
        for name, values in logged.items():
            if name.startswith(("oracle_val/", "oracle_train/", "memorization/")):
                (value,) = [x for x, step in zip(values, logged["step"], strict=True) if step == 6 and x == x]
                for rank in pair:
                    assert rank.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
