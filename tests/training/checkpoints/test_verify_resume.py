"""--verify-resume: says that a run can be resumed where it can, and what a checkpoint lacks where it cannot."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.training import Checkpoints, Continuity, MetricsTable, OracleMonitor
from fm_stages.training.checkpoints.preemption import Preempted, Preemption
from fm_stages.training.checkpoints.verify_resume import Trial, digest, verify_resume


class Forgetful(torch.nn.Module):
    """A network that knows how often it was asked, which no state_dict says."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.asked = network, 0

    def forward(self, x, t, y):
        self.asked += self.training
        return self.network(x, t, y) * (1 + 0.01 * self.asked)


class Decay(L.Callback):
    """Changes training by a number of its own."""

    def __init__(self, keep: bool) -> None:
        self.scale, self.keep = 1.0, keep

    def on_train_batch_start(self, trainer, *_) -> None:
        self.scale *= 0.9
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 * self.scale

    def state_dict(self) -> dict:
        return {"scale": self.scale} if self.keep else {}

    def load_state_dict(self, state_dict) -> None:
        self.scale = state_dict["scale"]


class Tally(L.Callback):
    """Counts, and loses count."""

    count = 0

    def on_train_batch_end(self, *_) -> None:
        self.count += 1

    def state_dict(self) -> dict:
        return {"count": self.count}


class Unkeyed(L.Callback):
    """Draws of a generator that begins anew with each start."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        batch["x1"] = batch["x1"] + 0.001 * torch.randn(batch["x1"].shape, generator=self.generator)


@pytest.fixture
def rehearse(make_module, make_network, make_data, make_trainer, tmp_path, monkeypatch):
    """The rehearsal of 4 steps, the first three in an epoch of their own, in two micro-batches each; what it tells.

    However it ends, the run's folder holds what it held before.
    """

    def run(
        *callbacks, network=None, num_steps=4, max_steps=-1, begun_from=None, monitor=True, told=None, **kwargs
    ) -> str:
        told = [] if told is None else told

        def build(folder: Path) -> Trial:
            made = [make() for make in callbacks]
            measured = [OracleMonitor(every_n_steps=1, window=3)] if monitor and Unkeyed not in callbacks else []
            checkpoints = Checkpoints(None, every_n_train_steps=3)
            settings = {
                "callbacks": [*made, *measured, checkpoints, Preemption(checkpoints), Continuity()],
                "enable_checkpointing": True,
                "default_root_dir": folder,
                "logger": MetricsTable(folder, name=""),
                "limit_val_batches": None,
                "val_check_interval": 3,
                "check_val_every_n_epoch": None,
            }
            trainer = make_trainer(max_steps, **{**settings, **kwargs})
            module = make_module(network() if network else None)
            return Trial(trainer, module, make_data(flip=True, micro_batch_size=10))

        monkeypatch.setattr("fm_stages.training.checkpoints.verify_resume.rank_zero_info", told.append)
        start = build(tmp_path / "run")
        torch.rand(1)
        before = torch.get_rng_state()
        weights = {name: x.clone() for name, x in start.module.state_dict().items()}
        mine = tmp_path / "run/verify_resume/mine.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("not the rehearsal's")
        try:
            verify_resume(build, start, num_steps, begun_from)
        finally:
            assert [file for file in (tmp_path / "run").rglob("*") if file.is_file()] == [mine]
            assert [folder.name for folder in (tmp_path / "run").iterdir()] == ["verify_resume"]
        assert all(torch.equal(x, weights[name]) for name, x in start.module.state_dict().items())
        assert start.trainer.global_step == 0
        assert torch.equal(torch.get_rng_state(), before)
        return told[-1]

    return run


def test_a_run_that_can_be_resumed(rehearse):
    assert "Resume verified: 4 steps from the checkpoint of step 4" in rehearse(lambda: Decay(keep=True))


def test_before_a_line_is_logged(rehearse):
    told = rehearse(lambda: Decay(keep=True), num_steps=2, log_every_n_steps=25, monitor=False, limit_val_batches=0)
    assert "Resume verified: 2 steps from the checkpoint of step 2" in told
    assert "; 0 lines of logged numbers" in told


class Signal(L.Callback):
    """One to this process, in the third step."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rehearsal_that_is_stopped_leaves_nothing(rehearse, monkeypatch, number):
    told: list[str] = []
    monkeypatch.setattr("fm_stages.training.checkpoints.preemption.rank_zero_info", told.append)
    with pytest.raises(Preempted):
        rehearse(lambda: Signal(number), told=told)
    assert told[-2:] == [
        f"\n{number.name}: stopped after step 3.",
        "Stopped in the rehearsal; nothing was begun.",
    ]


@pytest.mark.parametrize(
    ("planted", "first"),
    [
        ({"network": lambda: Forgetful(torch.nn.Identity())}, "step 5, micro-batch 1: the loss$"),
        ({"callbacks": [lambda: Decay(keep=False)]}, "step 6, micro-batch 1: the loss$"),
        ({"callbacks": [Tally]}, "callback/Tally/count$"),
        ({"callbacks": [Unkeyed]}, "step 5, micro-batch 1: the data$"),
    ],
    ids=["network", "learning rate", "callback", "data"],
)
def test_what_a_checkpoint_lacks_is_named(rehearse, make_network, planted, first):
    callbacks = planted.get("callbacks", [])
    network = (lambda: Forgetful(make_network())) if "network" in planted else None
    with pytest.raises(ValueError, match=f"4 steps from a checkpoint of step 4 .*differs: .*{first}"):
        rehearse(*callbacks, network=network)


def test_a_run_that_is_too_short(rehearse):
    with pytest.raises(ValueError, match="takes 8 steps from step 0, and the run ends at trainer.max_steps=7"):
        rehearse(max_steps=7)


def test_hashes_tell_bits():
    x = torch.tensor([0.0, 1.0])
    assert digest({"a": [x]}) == digest({"a": [x.clone()]})
    for other in (torch.tensor([-0.0, 1.0]), x[None], x.double(), torch.tensor([1.0, 0.0])):
        assert digest({"a": [x]}) != digest({"a": [other]})
    assert digest({"a": x}) != digest({"b": x})
    assert digest({"a": 0.1}) != digest({"a": 0.1 + 2e-17 + 1e-16})
    assert digest(torch.tensor([1.0]).bfloat16()) != digest(torch.tensor([2.0]).bfloat16())
