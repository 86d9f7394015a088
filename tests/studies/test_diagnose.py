"""What the command of a checkpoint leaves: numbers and pictures of both weights, for the same draws."""

from pathlib import Path

import numpy as np
import torch

from fm_stages import plots


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
