"""Checkpoints are written while training goes on: they hold what their step left, and no file goes before its heir."""

import threading
from collections import OrderedDict
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.training import Checkpoints, read_checkpoint
from fm_stages.training.checkpoints.background import Writer, copied
from fm_stages.training.checkpoints.callback import NotSaved
from fm_stages.training.checkpoints.files import WholeFiles

TIMEOUT_SEC = 200


class Slow(WholeFiles):
    """Begins to write a step's file when it is told to."""

    def __init__(self, step: int, failure: bool = False) -> None:
        self.step, self.failure, self.go = step, failure, threading.Event()

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        if checkpoint["global_step"] == self.step:
            assert self.go.wait(TIMEOUT_SEC)
            if self.failure:
                raise OSError("the disk is full")
        super().save_checkpoint(checkpoint, path)


class Watch(L.Callback):
    """Looks at the folder at each step; lets the slow file go at one of them."""

    def __init__(self, files: Slow, release_at: int) -> None:
        self.files, self.release_at = files, release_at
        self.seen: dict[int, set[str]] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        step = trainer.global_step
        self.seen[step] = {file.name for file in Path("checkpoints").glob("*.ckpt")}
        self.weights[step] = {name: x.clone() for name, x in pl_module.state_dict().items()}
        if step == self.release_at:
            self.files.go.set()


@pytest.fixture
def fit(make_module, make_data, make_trainer):
    def run(files: Slow, watch: Watch, max_steps: int = 8) -> None:
        callbacks = [watch, Checkpoints(monitor=None, every_n_train_steps=2)]
        trainer = make_trainer(max_steps, callbacks=callbacks, enable_checkpointing=True, plugins=[files])
        trainer.fit(make_module(), datamodule=make_data())

    return run


def test_training_goes_on_and_the_older_file_stays(fit):
    files = Slow(step=6)
    watch = Watch(files, release_at=8)
    fit(files, watch)
    assert watch.seen[7] == watch.seen[8] == {"step_0000004.ckpt", "last.ckpt"}
    assert {file.name for file in Path("checkpoints").iterdir()} == {"step_0000008.ckpt", "last.ckpt"}


def test_what_is_written_is_of_its_step(fit):
    files = Slow(step=6)
    watch = Watch(files, release_at=7)
    fit(files, watch, max_steps=7)
    found = read_checkpoint("checkpoints/step_0000006.ckpt")
    assert found["global_step"] == 6
    assert all(torch.equal(x, watch.weights[6][name]) for name, x in found["state_dict"].items())
    assert any(not torch.equal(x, watch.weights[7][name]) for name, x in found["state_dict"].items())


def test_a_failure_ends_the_run_and_nothing_goes(fit):
    files = Slow(step=6, failure=True)
    watch = Watch(files, release_at=7)
    with pytest.raises(NotSaved):
        fit(files, watch, max_steps=60)
    assert max(watch.seen) < 60
    steps = {file.name: read_checkpoint(file)["global_step"] for file in Path("checkpoints").iterdir()}
    assert steps == {"step_0000004.ckpt": 4, "last.ckpt": 4}


def test_a_failure_at_the_end_is_no_success(fit):
    files = Slow(step=8, failure=True)
    files.go.set()
    with pytest.raises(NotSaved):
        fit(files, Watch(files, release_at=0), max_steps=8)


def test_an_exception_waits(fit):
    class Break(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            if trainer.global_step == 3:
                threading.Timer(0.2, self.files.go.set).start()
                raise RuntimeError("broken")

    files = Slow(step=2)
    with pytest.raises(RuntimeError, match="broken"):
        fit(files, Break(files, release_at=0))
    assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 2


def test_whoever_waits_finds_the_file(make_module, make_data, make_trainer):
    files = Slow(step=3)

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if trainer.global_step == 3:
                threading.Timer(0.2, files.go.set).start()
                checkpoints.write_last(trainer)
                assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 3

    callbacks = [Ask(), checkpoints := Checkpoints(monitor=None, every_n_train_steps=50)]
    trainer = make_trainer(4, callbacks=callbacks, enable_checkpointing=True, plugins=[files])
    trainer.fit(make_module(), datamodule=make_data())


class TestWriter:
    def test_in_order_and_nothing_after_a_failure(self, tmp_path):
        done: list[str] = []

        class Files(WholeFiles):
            def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
                if "bad" in path:
                    raise OSError("no")
                done.append(path)

            def remove_checkpoint(self, path) -> None:
                done.append(f"-{path}")

        writer = Writer(Files())
        writer.write({}, "a")
        writer.write({}, "b")
        writer.remove("a")
        writer.write({}, "bad")
        writer.remove("b")
        writer.wait()
        assert not writer.busy
        assert done == ["a", "b", "-a"]
        assert writer.failure == "bad was not saved: no"

    def test_a_copy_shares_nothing(self):
        tree = {"a": OrderedDict(w=torch.ones(2)), "b": [torch.zeros(1), {"c": [1]}], "d": (1, torch.ones(1)), "e": {1}}
        tree["a"]._metadata = {"": {"version": 1}}
        other = copied(tree)
        tree["a"]["w"].add_(1)
        tree["b"][1]["c"].append(2)
        tree["e"].add(2)
        assert other["a"]["w"].tolist() == [1.0, 1.0]
        assert other["a"]._metadata == {"": {"version": 1}}
        assert other["b"][1] == {"c": [1]}
        assert type(other["d"]) is tuple
        assert other["e"] == {1}
