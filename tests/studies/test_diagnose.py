"""What the command of a checkpoint leaves: numbers and pictures of both weights, for the same draws."""

from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from jsonargparse import Namespace

from fm_stages import plots
from fm_stages.oracle import Curves

diagnosing = import_module("fm_stages.studies.diagnose")  # the package's face has a function of that name


def test_both_weights_have_their_pictures(command, write_checkpoint, random_network, tmp_path, monkeypatch):
    made: list[tuple] = []
    make = plots.prediction_strips
    monkeypatch.setattr(plots, "prediction_strips", lambda *args: made.append(args) or make(*args))
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    done = command("diagnose", "--ckpt", checkpoint, "--num_samples", "64")
    assert done.status == 0, done.err
    for weights in ("raw", "ema"):
        files = {path.name for path in Path("run/diagnose", weights).iterdir()}
        assert files == {"training.csv", "held_out.csv", "curves.json", "gap_by_t.png", "predictions.png"}
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


def test_a_null_label_that_was_never_trained_is_told(command, tmp_path, monkeypatch):
    """Gaps that say: with label better than the linear model, without it worse; and the other way round."""
    asked = []

    def measured(train: float, module, network, data, num, seed, profile, progress, label_dropout):
        asked.append((num, label_dropout))
        gap = 3.0 if label_dropout == 1 else train
        return Curves([0, 0.5, 1.0], [9, 9], {"gap": [gap] * 2, "wiener": [1.0] * 2}, {"gap": [0.25] * 2}), None, None

    options = Namespace(num_samples=100, seed=0)
    profile = SimpleNamespace(boundary=0.5)
    for train, told in ((0.25, True), (2.0, False)):
        monkeypatch.setattr(diagnosing, "diagnose", partial(measured, train))
        text = diagnosing._by_label(SimpleNamespace(network=None), None, profile, options)
        assert f"with its own label     gap {train:.4f} ± 0.2500" in text
        assert "without label (null)   gap 3.0000 ± 0.2500, -200% closed" in text
        assert ("never trained" in text) == told
    assert asked == [(100, 0.0), (100, 1.0)] * 2


def test_one_kind_of_weights_can_be_asked_for(command, write_checkpoint, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run/checkpoints/last.ckpt", ema=False)
    done = command("diagnose", "--ckpt", checkpoint, "--num_samples", "32", "--weights", "raw", "--out", "out")
    assert done.status == 0, done.err
    assert "with its own label" in done.out
    assert [path.name for path in Path("out").iterdir()] == ["raw"]
    done = command("diagnose", "--ckpt", checkpoint, "--weights", "ema")
    assert (done.status, "--weights ema" in done.err) == (2, True), done.err
