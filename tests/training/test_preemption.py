"""Pre-emption: a signal to any rank ends the run after a whole step, and what goes on is the run that was not ended."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.training import Checkpoints, Preempted, Preemption, read_checkpoint

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

    def run(folder: str, *callbacks: L.Callback, ckpt_path: Path | None = None, **kwargs) -> dict[str, torch.Tensor]:
        checkpoints = Checkpoints(monitor=None)
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


def test_a_trial_run_stops_and_writes_nothing(fit):
    with pytest.raises(Preempted):
        fit("run", Signal(signal.SIGTERM, 1), fast_dev_run=3, accumulate_grad_batches=1)
    assert not Path("run").exists()


def test_two_ranks(launch, tmp_path):
    """Rank 1 alone gets the signal, after the first micro-batch of step 3."""
    ranks = launch(Path(__file__).with_name("preempted_ranks.py"), tmp_path, 2, "cpu")
    for seen in ranks:
        assert (seen["status"], seen["step"], seen["waiting"]) == (75, 3, True)
        assert all(torch.equal(x, seen["parts"][name]) for name, x in ranks[0]["whole"].items())
        assert "(rank 0 none of step 0, rank 1 last.ckpt of step 4)" in seen["different checkpoints"]
        assert seen["one device"] == 2
    assert not (tmp_path / "parts/preempted.txt").exists()
