"""Pre-emption: a signal to any rank ends the run after a whole step, and what goes on is the run that was not ended."""

import itertools
import os
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.training import Checkpoints, Preempted, Preemption, read_checkpoint
from fm_stages.training.checkpoints import preemption
from fm_stages.training.checkpoints.continuity import Continuity

STEPS = 5
LAST = Path("checkpoints/last.ckpt")


class Signal(L.Callback):
    """A signal to this process, before one micro-batch."""

    def __init__(self, number: signal.Signals, micro_batch: int) -> None:
        self.number, self.micro_batch = number, micro_batch

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.micro_batch:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def fit(make_module, make_data, make_trainer):
    """Two micro-batches a step, three steps an epoch."""

    def run(
        folder: str, *callbacks: L.Callback, ckpt_path: Path | None = None, every: int | None = None, **kwargs
    ) -> dict[str, torch.Tensor]:
        checkpoints = Checkpoints(monitor=None, every_n_train_steps=every)
        callbacks = (*callbacks, Preemption(checkpoints), checkpoints)
        settings = {"default_root_dir": folder, "enable_checkpointing": True, "accumulate_grad_batches": 2, **kwargs}
        module = make_module(warmup_steps=3, ema_decay=0.9)
        make_trainer(STEPS, callbacks=list(callbacks), **settings).fit(module, make_data(), ckpt_path=ckpt_path)
        return module.state_dict()

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("micro_batch", "step"), [(1, 1), (4, 2), (5, 3)]
)  # the epoch's first, a second, its last step
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(fit, number, micro_batch, step):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(Preempted) as stop:
        fit("parts", Signal(number, micro_batch))
    assert stop.value.code == 75
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert read_checkpoint("parts" / LAST)["global_step"] == step
    assert Path("parts/preempted.txt").read_text().startswith(f"Stopped after step {step};")
    parts, whole = fit("parts", ckpt_path="parts" / LAST), fit("whole")
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
    assert not Path("parts/preempted.txt").exists()


class InValidation(Signal):
    """A signal in the middle of the validation after step 2, whatever it is for."""

    def on_train_batch_start(self, *_) -> None:
        pass

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if (trainer.global_step, batch_idx) == (2, 0) and not trainer.sanity_checking:
            os.kill(os.getpid(), self.number)


class Validations(L.Callback):
    """Which batches were validated, and what was found."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []
        self.losses: dict[int, float] = {}

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.batches.append((trainer.global_step, batch_idx))

    def on_validation_end(self, trainer, pl_module) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


@pytest.mark.parametrize("every_n_train_steps", [None, 2])
def test_a_validation_is_left_and_done_again(fit, every_n_train_steps):
    settings = {"limit_val_batches": 3, "val_check_interval": 4, "check_val_every_n_epoch": None}
    before, after, whole = Validations(), Validations(), Validations()
    with pytest.raises(Preempted):
        fit("parts", InValidation(signal.SIGTERM, 0), before, Continuity(), every=every_n_train_steps, **settings)
    assert before.batches == [(2, 0)]
    assert read_checkpoint("parts" / LAST)["global_step"] == 2
    parts = fit("parts", after, Continuity(), ckpt_path="parts" / LAST, **settings)
    assert all(torch.equal(x, parts[name]) for name, x in fit("whole", whole, **settings).items())
    assert after.batches == whole.batches == [(step, i) for step in (2, 4) for i in range(2)]
    assert after.losses == whole.losses


class TestInterrupt:
    """Ctrl-C."""

    def test_acts_as_a_signal_of_the_scheduler_but_for_the_status(self, fit, capfd, monkeypatch):
        monkeypatch.setattr(preemption, "SAME_SEC", 100.0)  # however slow the machine is
        with pytest.raises(Preempted) as stop:
            fit("run", Signal(signal.SIGINT, 3), Signal(signal.SIGINT, 3))  # and torchrun's at once
        assert stop.value.code == 130
        assert read_checkpoint("run" / LAST)["global_step"] == 2
        assert capfd.readouterr().err.count("Ctrl-C: the run ends after this step, with a checkpoint.") == 1
        assert Path("run/preempted.txt").exists()

    def test_a_second_one_ends_at_once(self, fit, monkeypatch):
        class Ended(BaseException):
            pass

        def leave(status: int) -> None:
            raise Ended(status)

        monkeypatch.setattr(preemption, "SAME_SEC", -1.0)
        monkeypatch.setattr(preemption.os, "_exit", leave)
        with pytest.raises(Ended, match="130"):
            fit("run", Signal(signal.SIGINT, 3), Signal(signal.SIGINT, 4))
        assert not Path("run/checkpoints/last.ckpt").exists()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
    def test_before_training_there_is_nothing_to_save(self, fit, number, status):
        class Early(L.Callback):
            def on_sanity_check_end(self, *_) -> None:
                os.kill(os.getpid(), number)

        with pytest.raises(Preempted) as stop:
            fit("run", Early(), limit_val_batches=1, num_sanity_val_steps=1)
        assert stop.value.code == status
        assert not Path("run/checkpoints").exists()


def test_clocks_that_jump_do_not_matter(fit, monkeypatch):
    """Hours forth and back at each question, for whatever asks for the time of day."""
    real, calls = time.time, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + 36_000 * (-1) ** next(calls))
        jumping = fit("jumping")
    assert all(torch.equal(x, jumping[name]) for name, x in fit("steady").items())


def test_the_checkpoint_holds_what_other_callbacks_counted_in_its_step(fit):
    class Counter(L.Callback):
        steps = 0

        def on_train_batch_end(self, *_) -> None:
            self.steps += 1

        def state_dict(self) -> dict:
            return {"steps": self.steps}

    with pytest.raises(Preempted):
        fit("run", Signal(signal.SIGTERM, 3), Counter())
    (counted,) = (x for name, x in read_checkpoint("run" / LAST)["callbacks"].items() if "Counter" in name)
    assert counted == {"steps": 4}


def test_in_the_last_step_the_run_ends_as_it_would(fit):
    fit("run", Signal(signal.SIGTERM, 2 * STEPS))
    assert read_checkpoint("run" / LAST)["global_step"] == STEPS
    assert not Path("run/preempted.txt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_trial_run_stops_writes_nothing_and_promises_nothing(fit, capfd, number):
    with pytest.raises(Preempted):
        fit("run", Signal(number, 1), fast_dev_run=3, accumulate_grad_batches=1)
    assert not Path("run").exists()
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Ctrl-C")]
    promised = "Ctrl-C: the rehearsal ends after this step, without a checkpoint. Once more: at once."
    assert told == [promised] * (number == signal.SIGINT)


def test_two_ranks(launch, tmp_path):
    """Rank 1 alone gets the signal, after the first micro-batch of step 3."""
    ranks = launch(Path(__file__).with_name("preempted_ranks.py"), tmp_path, 2, "cpu")
    for seen in ranks:
        assert (seen["status"], seen["step"], seen["waiting"]) == (75, 3, True)
        assert all(torch.equal(x, seen["parts"][name]) for name, x in ranks[0]["whole"].items())
        assert "(rank 0 none of step 0, rank 1 last.ckpt of step 4)" in seen["different checkpoints"]
        assert seen["one device"] == 2
    assert not (tmp_path / "parts/preempted.txt").exists()
