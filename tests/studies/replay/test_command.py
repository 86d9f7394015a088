"""Replay: a network that breaks at a place that is known, found again from the flight record of its run."""

import json
import shutil
from pathlib import Path

import pytest

from fm_stages.training import allow_imports

DIGITS = Path(__file__).parents[3] / "configs/digits_dit.yaml"
RUN = Path("runs/digits_dit")
NETWORK = "--model.network.init_args"
TINY = [
    *(f"{NETWORK}.hidden_size=16", f"{NETWORK}.depth=2", f"{NETWORK}.num_heads=2", "--trainer.logger=false"),
    *("--trainer.max_steps=4", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"),
    *("--model.warmup_steps=0", "--samples.every_n_steps=0", "--data.init_args.batch_size=64"),
]
SAVED = ["--checkpoints.every_n_train_steps=1", "--checkpoints.monitor=null"]
BREAKS = '''
import torch
from fm_stages.networks import DiT


class Forward(torch.nn.Module):
    """NaN for three samples, once weights were trained for two steps."""

    calls = 0

    def forward(self, x):
        if self.training:
            Forward.calls += 1
        return torch.where(BAD.view(-1, 1, 1) & (Forward.calls > 2), torch.nan, x)


class Backward(torch.nn.Module):
    """Values are left alone, gradients are inf times 0."""

    def forward(self, x):
        return x + torch.sqrt(x * 0)


class BreaksForward(DiT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.blocks[1].mlp.add_module("broken", Forward())
        mlp = self.blocks[1].mlp
        mlp.register_forward_hook(lambda module, inputs, output: mlp.broken(output))


class BreaksBackward(DiT):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        mlp = self.blocks[0].mlp
        mlp.add_module("broken", Backward())
        mlp.register_forward_hook(lambda module, inputs, output: mlp.broken(output))


BAD = torch.arange(64).remainder(30) == 5
'''


@pytest.fixture
def fit(command, tmp_path, monkeypatch):
    """A run with a network of a file of its own, and its record."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    monkeypatch.syspath_prepend(tmp_path)
    allow_imports("breaks")

    def run(name: str, *options: str):
        network = f"--model.network={name}" if name else "--model.network=fm_stages.networks.DiT"
        done = command("fit", "--config", DIGITS, network, *TINY, "--guards.nonfinite=stop", *options)
        return done, next(iter(sorted(RUN.glob("flight/*"))), None)

    return run


class TestWhere:
    def test_in_the_backward_pass(self, fit, command):
        done, record = fit("breaks.BreaksBackward")
        assert done.status == 65
        assert record.name == "step_0000000"
        told = command("replay", "--record", record)
        assert told.status == 0, told.err
        assert "step 0 began with, from the record" in told.out
        assert "backward, gradient that leaves network.blocks.0.mlp.broken (Backward)" in told.out
        assert "recorded nan, replayed nan" in told.out

    def test_in_the_forward_pass_in_which_rows(self, fit, command):
        done, record = fit("breaks.BreaksForward")
        assert done.status == 65
        told = command("replay", "--record", record)
        assert "forward, output of network.blocks.1.mlp.broken (Forward), whose inputs are finite" in told.out
        assert "in rows 5, 35 of 64" in told.out


class TestSpike:
    """A weight that is far too large, from one step to the next, by a learning rate that is."""

    @pytest.fixture
    def run(self, fit, command):
        done, record = fit("", "--model.optimizer.init_args.lr=1e9", *SAVED)
        assert done.status == 65, done.err
        return record

    def test_the_same_numbers_from_the_record_alone(self, run, command):
        told = command("replay", "--record", run)
        rows = [line.split() for line in told.out.splitlines() if line[:7].strip().startswith("0.")]
        assert len(rows) == 10
        assert sum(int(row[3]) for row in rows) == 64
        assert all(len(row) == 6 and row[4] == row[5] for row in rows)  # recorded, replayed
        assert told.out.count("image ") == 5

    def test_other_weights(self, run, command):
        told = command("replay", "--record", run, "--ckpt", RUN / "checkpoints/last.ckpt")
        assert told.status == 0, told.err
        assert "last.ckpt, the step's own" in told.out
        for file in [*run.glob("*.safetensors")]:  # as of a large network with large batches
            file.unlink()
        again = command("replay", "--record", run)
        assert "checkpoints/last.ckpt, the step's own" in again.out
        assert again.out.splitlines()[2:] == told.out.splitlines()[2:]


class TestMistakes:
    def test_one_line_each(self, command, tmp_path):
        folder = tmp_path / "flight/step_0000001"
        folder.mkdir(parents=True)
        shown = command("replay", "--record", folder)
        assert (shown.status, shown.err.count("\n")) == (2, 1)
        assert "there is no record.json" in shown.err
        for text, message in (("{", "is not a flight record"), ("[]", "is not a flight record"), ("{}", "it lacks")):
            (folder / "record.json").write_text(text)
            shown = command("replay", "--record", folder)
            assert (shown.status, shown.err.count("\n")) == (2, 1)
            assert message in shown.err
            assert str(folder) in shown.err

    def test_a_record_without_weights_or_configuration(self, fit, command):
        _, record = fit("breaks.BreaksBackward")
        (record / "weights.safetensors").unlink()
        shown = command("replay", "--record", record)
        assert (shown.status, shown.err.count("\n")) == (2, 1)
        assert "name one with --ckpt" in shown.err
        text = json.loads((record / "record.json").read_text())
        copy = shutil.copytree(record, record.with_name("copy"))
        (copy / "weights.safetensors").write_bytes(b"")
        (copy / "record.json").write_text(json.dumps({**text, "config": None}))
        assert "carries no configuration" in command("replay", "--record", copy).err

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--guards.window=3", "guards: window=3 must be 20 steps or more"),
            ("--guards.nonfinite=ignore", "nonfinite"),
            ("--guards.max_skip=3", "max_skip"),
        ],
    )
    def test_bad_options_of_the_guards(self, command, option, message):
        shown = command("fit", "--config", DIGITS, *TINY, option)
        assert shown.status == 2
        assert message in shown.err
        assert shown.err.count("\n") == 1
        assert not Path("runs").exists()

    def test_rewind_without_checkpoints(self, command):
        shown = command(
            "fit", "--config", DIGITS, *TINY, "--guards.spike=rewind", "--trainer.enable_checkpointing=false"
        )
        assert (shown.status, shown.err.count("\n")) == (2, 1)
        assert "this run writes none" in shown.err
