"""What the command of a checkpoint leaves: numbers and pictures of both weights, for the same draws."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from jsonargparse import Namespace

from fm_stages import plots
from fm_stages.oracle import Curves
from fm_stages.studies.diagnose import command as diagnosing


def test_both_weights_have_their_pictures(command, write_checkpoint, random_network, tmp_path, monkeypatch):
    made: list[tuple] = []
    make = plots.prediction_strips
    monkeypatch.setattr(plots, "prediction_strips", lambda *args: made.append(args) or make(*args))
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    done = command("diagnose", "--ckpt", checkpoint, "--num_samples", "64")
    assert done.status == 0, done.err
    for weights in ("raw", "ema"):
        files = {path.name for path in Path("run/diagnose", weights).iterdir()}
        assert files == {
            "training.csv",
            "held_out.csv",
            "curves.json",
            "gap_by_t.png",
            "predictions.png",
            "predictions.csv",
        }
    raw, ema = made
    for i in (0, 1, 4):  # x_t, the oracle's, x_1
        assert np.array_equal(raw[i], ema[i])
    for arguments, name, seed in ((raw, "raw", 1), (ema, "EMA", 2)):
        x_t, _, predicted, _, _, labels, t, title, _ = arguments
        assert "step 7" in title
        assert list(predicted) == [name]
        label = torch.tensor([int(labels[0].removeprefix("class "))])
        for column, time in enumerate(t):
            x = torch.from_numpy(x_t[0, column])[None, None]
            with torch.no_grad():
                v = random_network(seed)(x, torch.tensor([time]), label)
            np.testing.assert_allclose(predicted[name][0, column], (x + (1 - time) * v)[0, 0], atol=1e-4)


def test_a_null_label_that_was_never_trained_is_told(command, write_checkpoint, tmp_path):
    """By the size of its weights: without label a network can be far from its oracle for other reasons."""
    file = write_checkpoint(tmp_path / "run/checkpoints/last.ckpt", ema=False)
    checkpoint = torch.load(file, weights_only=True)
    table = checkpoint["state_dict"]["network.y_embedder.embedding_table.weight"]
    for size, told in ((0.3, False), (0.02, True)):
        table[-1] *= size / table[-1].square().mean().sqrt()
        torch.save(checkpoint, file)
        done = command("diagnose", "--ckpt", file, "--num_samples", "64")
        assert done.status == 0, done.err
        assert "with its own label     gap" in done.out
        assert "without label (null)   gap" in done.out
        assert ("it was never trained" in done.out) == told


def test_gaps_with_and_without_label_are_those_of_such_inputs(monkeypatch):
    asked = []

    def measured(module, network, data, num, seed, profile, progress, label_dropout):
        asked.append((num, label_dropout))
        gap = 3.0 if label_dropout == 1 else 0.25
        return Curves([0, 0.5, 1.0], [9, 9], {"gap": [gap] * 2, "wiener": [1.0] * 2}, {"gap": [0.25] * 2}), None, None

    monkeypatch.setattr(diagnosing, "diagnose", measured)
    module, profile = SimpleNamespace(network=torch.nn.Identity()), SimpleNamespace(boundary=0.5)
    text = diagnosing._by_label(module, None, profile, Namespace(num_samples=100, seed=0))
    assert "with its own label     gap 0.2500 ± 0.2500, 75% closed" in text
    assert "without label (null)   gap 3.0000 ± 0.2500, -200% closed" in text
    assert asked == [(100, 0.0), (100, 1.0)]


def test_one_kind_of_weights_can_be_asked_for(command, write_checkpoint, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints/last.ckpt", ema=False)
    done = command("diagnose", "--ckpt", checkpoint, "--num_samples", "32", "--weights", "raw", "--out", "out")
    assert done.status == 0, done.err
    assert "with its own label" in done.out
    assert [path.name for path in Path("out").iterdir()] == ["raw"]
    done = command("diagnose", "--ckpt", checkpoint, "--weights", "ema")
    assert (done.status, "--weights ema" in done.err) == (2, True), done.err
