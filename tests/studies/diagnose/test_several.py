"""Several checkpoints on the same draws: the numbers of each, paired differences, and what cannot be compared."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fm_stages.oracle import Curves, Oracle, timestep_bins
from fm_stages.studies.diagnose.comparison import CheckpointComparison, CheckpointCurves
from fm_stages.studies.diagnose.measure import probe
from fm_stages.studies.diagnose.several import compare_checkpoints, load_checkpoints

NUM = 96


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, write_checkpoint):
    """The same network three times: as it is, again, and with other weights."""
    folder = tmp_path_factory.mktemp("several")
    return {
        "one": str(write_checkpoint(folder / "a/checkpoints/last.ckpt", seeds=(1, 2))),
        "again": str(write_checkpoint(folder / "b/checkpoints/last.ckpt", seeds=(1, 2))),
        "other": str(write_checkpoint(folder / "c/checkpoints/last.ckpt", seeds=(3, 4))),
    }


@pytest.fixture(scope="module")
def compared(checkpoints):
    trained = load_checkpoints(checkpoints, "raw")
    data = trained["one"].data
    data.setup()
    return compare_checkpoints(trained, checkpoints, data, NUM, seed=5, progress=False), trained, data


def test_gap_and_change_by_stage_are_those_of_a_float64_softmax(compared):
    found, trained, data = compared
    edges, b = timestep_bins(boundary=found.profile.boundary), found.profile.boundary
    x, labels = data.bank().rows(torch.arange(data.num_train)).double().flatten(1), None
    every = data.bank().labels_of(torch.arange(data.num_train))
    gaps: dict[str, list] = {name: [] for name in trained}
    times = []
    for seen in probe(trained["one"].module, data, "training", NUM, 5, "cpu", progress=False):
        t, x_t = seen["t"].double()[:, None], seen["x_t"].double().flatten(1)
        distance = (x_t[:, None] - t[..., None] * x).square().sum(2) / (2 * (1 - t) ** 2)
        labels = seen["labels"][:, None]
        distance = distance.masked_fill((labels != -1) & (labels != every), torch.inf)
        mean = torch.softmax(-distance, 1) @ x
        best = (mean - x_t) / (1 - t)
        times.append(seen["t"].double())
        for name, one in trained.items():
            with torch.no_grad():
                v = one.network(seen["x_t"], seen["t"], seen["labels"]).double().flatten(1)
            gaps[name].append((v - best).square().mean(1))
    t = torch.cat(times)
    late = t < 0.98  # beyond it the formula above loses its digits
    place = torch.bucketize(t, torch.tensor(edges[1:-1], dtype=torch.float64), right=True)
    last = int(place[late].max())
    for name in trained:
        gap, first = torch.cat(gaps[name]), torch.cat(gaps["one"])
        curves = found.checkpoints[name].train
        for k in range(last):
            inside = place == k
            if inside.any():
                assert curves.mean["gap"][k] == pytest.approx(gap[inside].mean().item(), rel=2e-4)
                change = (gap - first)[inside].mean().item()
                assert curves.mean["gap_change"][k] == pytest.approx(change, rel=1e-3, abs=1e-6)
    width = [max(0.0, min(hi, b) - lo) for lo, hi in zip(edges, edges[1:], strict=False)]
    means = found.checkpoints["other"].train.mean["gap"]
    there = [(w, m) for w, m in zip(width, means, strict=True) if w and m == m]
    row = next(r for r in found.rows() if r["name"] == "other" and r["stage"] == "navigation")
    assert row["gap"] == pytest.approx(sum(w * m for w, m in there) / sum(w for w, _ in there))
    assert row["num_weights"] == sum(p.numel() for p in trained["other"].network.parameters())


def test_the_same_weights_differ_by_nothing_and_others_by_something(compared):
    found = compared[0]
    for stage in ("navigation", "refinement", "all t"):
        again, other = (
            next(r for r in found.rows() if r["name"] == name and r["stage"] == stage) for name in ("again", "other")
        )
        assert again["gap_change"] == again["held_out_regular_change"] == again["gap_change_share_sem"] == 0
        assert other["gap_change"] != 0
    assert "no difference between the stages" in found.sentences()[0]


def test_the_oracle_is_asked_once_for_all_networks(compared, checkpoints, monkeypatch):
    _, trained, data = compared
    asked = []
    target = Oracle.target
    monkeypatch.setattr(Oracle, "target", lambda self, *args: asked.append(len(args[2])) or target(self, *args))
    compare_checkpoints(trained, checkpoints, data, NUM, seed=5, progress=False)
    assert sum(asked) == NUM


def test_the_command_writes_table_json_csv_and_figure(command, checkpoints):
    words = [f"{name}={file}" for name, file in checkpoints.items()]
    done = command("diagnose", *(w for word in words for w in ("--ckpt", word)), "--num_samples", NUM, "--out", "out")
    assert done.status == 0, done.err
    assert {path.name for path in Path("out").iterdir()} == {
        "checkpoints.json", "checkpoints.csv", "gap_by_t.csv", "gap_by_t.png",
    }  # fmt: skip
    rows = list(csv.DictReader(Path("out/checkpoints.csv").read_text().splitlines()))
    assert [(row["name"], row["stage"]) for row in rows[:4]] == [
        ("one", "navigation"), ("one", "refinement"), ("one", "all t"), ("again", "navigation"),
    ]  # fmt: skip
    plain = json.loads(Path("out/checkpoints.json").read_text())
    assert [row["weights"] for row in plain["stages"]] == ["ema"] * 9
    shown = next(row for row in plain["stages"] if row["name"] == "other" and row["stage"] == "refinement")
    assert f"{shown['gap']:.4f} ({shown['gap_change_share']:+.1%} ±" in done.out


def test_what_cannot_be_compared_is_refused_by_name(command, checkpoints, write_checkpoint, tmp_path):
    other = write_checkpoint(tmp_path / "x/checkpoints/last.ckpt", label_dropout=0.5)
    for words, said in (
        ((f"a={checkpoints['one']}", f"b={other}"), "differ in label_dropout: 0.1 and 0.5"),
        ((f"a={checkpoints['one']}", f"a={other}"), "a checkpoint called a already"),
        ((checkpoints["one"], "missing.ckpt"), "missing.ckpt"),
    ):
        done = command("diagnose", *(w for word in words for w in ("--ckpt", word)))
        assert (done.status, said in done.err, done.err.count("\n")) == (2, True, 1), done.err
    done = command("diagnose", "--ckpt", checkpoints["one"], "--num_samples", 0)
    assert (done.status, "--num_samples 0" in done.err) == (2, True)


def test_paths_of_one_kind_with_other_numbers_are_not_the_same(write_checkpoint, tmp_path):
    files = {
        str(top): str(
            write_checkpoint(
                tmp_path / str(top) / "x.ckpt",
                path={"class_path": "fm_stages.flow.VPPath", "init_args": {"beta_max": top}},
            )
        )
        for top in (10.0, 20.0)
    }
    with pytest.raises(ValueError, match="differ in path"):
        load_checkpoints(files)


def made(early: float, late: float, sem: float = 0.01) -> CheckpointComparison:
    """A checkpoint whose gap changes by so much in each stage against the first, whose gap is 1."""

    def one(*changes: float) -> CheckpointCurves:
        mean = {"gap": [1.0 + change for change in changes], "gap_change": list(changes)}
        curves = Curves([0.0, 0.5, 1.0], [9, 9], mean, {name: [sem] * 2 for name in mean})
        return CheckpointCurves("file", "ema", 1, 10, curves, curves)

    return CheckpointComparison({"one": one(0.0, 0.0), "other": one(early, late)}, SimpleNamespace(boundary=0.5), 9, 0)


@pytest.mark.parametrize(
    ("early", "late", "said"),
    [
        (-0.5, -0.1, "more in navigation, as a share of what was there; 17% of the change over all t is in refinement"),
        (0.1, 0.5, "more in refinement, as a share of what was there; 83% of the change over all t is in refinement"),
        (-0.3, 0.29, "the stages go opposite ways."),
        (-0.3, -0.29, "no difference between the stages can be told from noise; 49% of"),
        (0.001, 0.001, "no difference between the stages can be told from noise."),
    ],
)
def test_the_sentence_says_what_the_differences_show(early, late, said):
    (sentence,) = made(early, late).sentences()
    assert said in sentence
    assert f"by {early:+.1%} ± 1.0% in navigation and by {late:+.1%} ± 1.0% in refinement" in sentence


def test_one_draw_has_no_errors_and_shows_nothing():
    (sentence,) = made(-0.5, -0.1, math.nan).sentences()
    assert sentence.endswith("no difference between the stages can be told from noise.")
