"""Files of checkpoints: what is damaged is neither put into place nor gone on from, and the one before it stays."""

import math
import os
import re
from collections import OrderedDict, defaultdict
from datetime import timedelta
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from fm_stages.training import Checkpoints, read_checkpoint
from fm_stages.training.checkpoints import files as checkpoint_files
from fm_stages.training.checkpoints.callback import NotSaved
from fm_stages.training.checkpoints.files import WholeFiles, check_content, check_sums, unreadable
from fm_stages.training.checkpoints.resume import find_last
from fm_stages.training.guards.rewinding import find_before

RUN = {"pytorch-lightning_version": "2", "loops": {}, "callbacks": {}, "optimizer_states": []}


def a_checkpoint(step: int = 0, **more) -> dict:
    weights = {"network.w": torch.full((1000,), float(step))}
    return {**RUN, "global_step": step, "state_dict": weights, **more}


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit, among the weights: neither the length nor what `torch.load` looks at tells of it."""
    content = bytearray(file.read_bytes())
    place = content.index(torch.load(file)["state_dict"]["network.w"].numpy().tobytes())
    content[place + 2001] ^= 4
    file.write_bytes(content)
    torch.load(file)


DAMAGES = {"cut": cut, "flip": flip, "empty": lambda file: file.write_bytes(b""), "missing": Path.unlink}


class TestReadBack:
    @pytest.fixture
    def last(self, tmp_path) -> Path:
        WholeFiles().save_checkpoint(a_checkpoint(1), tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    @pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
    def test_what_the_disk_damages_replaces_nothing(self, last, damage, monkeypatch):
        monkeypatch.setattr(checkpoint_files, "send_to_disk", DAMAGES[damage])
        with pytest.raises(OSError, match="damaged"):
            WholeFiles().save_checkpoint(a_checkpoint(2), last)
        assert read_checkpoint(last)["global_step"] == 1
        assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]

    @pytest.mark.parametrize(
        ("meant", "place"),
        [
            (a_checkpoint(2), "/"),
            (a_checkpoint(1, loops={"a": [1, 3]}), "/loops/a/1"),
            (a_checkpoint(1, loops={"a": [1, 2, 3]}), "/loops/a"),
            (
                {**a_checkpoint(1, loops={"a": [1, 2]}), "state_dict": {"network.w": torch.zeros(999)}},
                "/state_dict/network.w",
            ),
            (
                {**a_checkpoint(1, loops={"a": [1, 2]}), "state_dict": {"network.w": torch.ones(1000).half()}},
                "/state_dict/network.w",
            ),
            (a_checkpoint(1, loops={"a": [1, 2]}, state_dict={"network.v": torch.ones(1000)}), "/state_dict"),
        ],
    )
    def test_what_is_not_as_meant_is_named(self, tmp_path, meant, place):
        torch.save(a_checkpoint(1, loops={"a": [1, 2]}), tmp_path / "x.ckpt")
        with pytest.raises(OSError, match=f"{place}.* first"):
            check_content(tmp_path / "x.ckpt", meant)

    def test_nan_is_what_was_meant(self, tmp_path):
        checkpoint = a_checkpoint(1, callbacks={"best": float("nan")})
        WholeFiles().save_checkpoint(checkpoint, tmp_path / "x.ckpt")
        check_content(tmp_path / "x.ckpt", checkpoint)

    def test_a_state_that_no_run_could_read_is_named(self, last):
        with pytest.raises(ValueError, match=r"/callbacks/Mine/seen is a .*PosixPath: keep tensors, numbers"):
            WholeFiles().save_checkpoint(a_checkpoint(2, callbacks={"Mine": {"seen": Path("x")}}), last)
        assert read_checkpoint(last)["global_step"] == 1

    def test_a_file_that_was_damaged_later_is_refused_wherever_it_is_read(self, last):
        flip(last)
        with pytest.raises(ValueError, match=r"last\.ckpt cannot be used: it is damaged: .* checksum"):
            read_checkpoint(last)


class TestRun:
    """With the real callback: which files there are when a write fails, and how the run ends."""

    @pytest.fixture
    def fit(self, make_module, make_data, make_trainer, tmp_path):
        def run(max_steps, fail_at=(), **kwargs) -> dict[str, int]:
            class Failing(WholeFiles):
                def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
                    if checkpoint["global_step"] in fail_at:
                        raise OSError(28, os.strerror(28), str(path))
                    super().save_checkpoint(checkpoint, path)

            callbacks = [Checkpoints(monitor=None, every_n_train_steps=1)]
            trainer = make_trainer(
                max_steps,
                callbacks=callbacks,
                plugins=[Failing()],
                enable_checkpointing=True,
                default_root_dir=tmp_path,
            )
            try:
                trainer.fit(make_module(), datamodule=make_data())
            finally:
                self.steps = {
                    file.name: read_checkpoint(file)["global_step"] for file in (tmp_path / "checkpoints").iterdir()
                }
            return self.steps

        return run

    def test_an_older_best_goes_after_the_new_one_is_there(self, fit):
        assert fit(3) == {"step_0000003.ckpt": 3, "last.ckpt": 3}

    def test_a_full_disk_ends_the_run_and_leaves_what_was_there(self, fit, capsys):
        with pytest.raises(NotSaved) as end:
            fit(3, fail_at={3})
        assert end.value.code == 74
        assert self.steps == {"step_0000002.ckpt": 2, "last.ckpt": 2}

    def test_what_cannot_be_removed_is_left(self, fit, monkeypatch):
        def refuse(*_) -> None:
            raise PermissionError("read-only")

        monkeypatch.setattr(WholeFiles, "remove_checkpoint", refuse)
        with pytest.warns(UserWarning, match=r"step_0000001.ckpt could not be removed: read-only"):
            assert fit(2) == {"step_0000001.ckpt": 1, "step_0000002.ckpt": 2, "last.ckpt": 2}


class TestFindLast:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """Steps 3, 9 and 10 (whose names sort otherwise), last.ckpt of 11, weights alone of 12, and a part."""
        for step in (3, 9, 10):
            torch.save(a_checkpoint(step), tmp_path / f"step_{step}.ckpt")
        torch.save(a_checkpoint(11), tmp_path / "last.ckpt")
        weights = {
            key: value for key, value in a_checkpoint(12).items() if key not in ("optimizer_states", "callbacks")
        }
        torch.save(weights, tmp_path / "weights.ckpt")
        (tmp_path / "last.ckpt.77.part").write_bytes(b"not all of")
        return tmp_path

    @pytest.fixture
    def told(self, monkeypatch) -> list[str]:
        lines: list[str] = []
        monkeypatch.setattr("fm_stages.training.checkpoints.resume.rank_zero_info", lines.append)
        return lines

    def test_last_where_it_is_whole(self, folder, told):
        assert find_last(str(folder)) == str(folder / "last.ckpt")
        assert not told

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_the_newest_where_it_is_not(self, folder, told, damage):
        DAMAGES[damage](folder / "last.ckpt")
        flip(folder / "step_10.ckpt")
        assert find_last(str(folder)) == str(folder / "step_9.ckpt")
        (line,) = told
        assert "step_9.ckpt, of step 9, and not from last.ckpt: it is" in line
        assert "step_10.ckpt: it is damaged" in line
        assert "weights.ckpt: it holds no callbacks to go on with" in line

    def test_weights_alone_are_no_run_under_any_name(self, folder, told):
        (folder / "weights.ckpt").replace(folder / "last.ckpt")
        assert find_last(str(folder)) == str(folder / "step_10.ckpt")

    def test_nothing_yet(self, tmp_path, told):
        assert find_last(str(tmp_path / "nowhere")) is None
        assert "the run starts at step 0" in told[0]

    def test_nothing_whole_is_not_a_fresh_start(self, folder):
        for file in folder.glob("*.ckpt"):
            cut(file)
        with pytest.raises(ValueError, match=r"no checkpoint in .* can be gone on from \(last.ckpt: it is cut short"):
            find_last(str(folder))

    def test_the_way_back_is_whole_as_well(self, folder):
        assert find_before(folder, 10) == folder / "step_10.ckpt"
        flip(folder / "step_10.ckpt")
        assert find_before(folder, 10) == folder / "step_9.ckpt"
        check_sums(folder / "step_9.ckpt")
        assert find_before(folder, 2) is None


class Registered:
    """Whose text holds its address, and which its owner lets torch read."""


HARMLESS = {
    "set": {"b", "a", 1.5, math.nan},
    "registered": Registered(),
    "ordered": OrderedDict(x=1),
    "shape": torch.Size([2]),
    "kind": torch.float16,
}

UNREADABLE = {
    "numpy.float64": np.float64(1),
    "numpy.ndarray": np.zeros(2),
    "datetime.timedelta": timedelta(seconds=1),
    "collections.defaultdict": defaultdict(list, a=[1]),
    "pathlib.*Path": Path("x"),
}


def test_what_torch_reads_is_harmless(tmp_path):
    with torch.serialization.safe_globals([Registered]):
        meant = a_checkpoint(1, callbacks=HARMLESS)
        assert not list(unreadable(meant))
        WholeFiles().save_checkpoint(meant, tmp_path / "x.ckpt")
        for name, value in (("set", {"b", "a", 1.5, 2.0}), ("registered", 1), ("kind", None)):
            with pytest.raises(OSError, match=f"/callbacks/{name} first"):
                check_content(tmp_path / "x.ckpt", a_checkpoint(1, callbacks={**HARMLESS, name: value}))
    assert list(unreadable(HARMLESS)) == [
        f"/registered is a {__name__}.Registered: keep tensors, numbers, text, lists and dicts in a state"
    ]


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_torch_does_not_read_is_named(kind):
    (line,) = unreadable({"a": [1, {"b": UNREADABLE[kind]}]})
    assert re.match(f"/a/1/b is a {kind}: keep", line)


def test_checksums_are_written_whatever_is_set(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        WholeFiles().save_checkpoint(a_checkpoint(1), tmp_path / "x.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "x.ckpt")["global_step"] == 1


@pytest.mark.parametrize("place", ["callback", "module", "data"])
def test_a_state_that_cannot_be_read_ends_the_run_before_its_first_step(
    make_module, make_data, make_trainer, recorder, place
):
    class Mine(L.Callback):
        def state_dict(self) -> dict:
            return {"file": Path("x") if place == "callback" else 1}

    module, data = make_module(), make_data()
    if place == "module":
        module.save_hyperparameters({"rate": np.float64(1)})
    if place == "data":
        data.save_hyperparameters({"root": Path("x")})
    callbacks = [Mine(), recorder, Checkpoints(monitor=None, every_n_train_steps=1)]
    names = {"callback": "/callbacks/.*Mine.*/file", "module": "/hyper_parameters/rate"}
    with pytest.raises(ValueError, match=f"{names.get(place, '/datamodule_hyper_parameters/root')} is a "):
        make_trainer(3, callbacks=callbacks, enable_checkpointing=True).fit(module, datamodule=data)
    assert not recorder.steps


@pytest.mark.parametrize("interval", [2, 4])
def test_without_a_validation_its_interval_is_that_of_checkpoints(
    make_module, make_data, make_trainer, monkeypatch, interval
):
    written: list[int] = []
    told: list[str] = []
    monkeypatch.setattr("fm_stages.training.checkpoints.callback.rank_zero_info", told.append)
    monkeypatch.setattr(Checkpoints, "write_last", lambda self, trainer, wait=True: written.append(trainer.global_step))
    settings = {"enable_checkpointing": True, "val_check_interval": interval, "check_val_every_n_epoch": None}
    trainer = make_trainer(5, callbacks=[Checkpoints()], accumulate_grad_batches=2, **settings)
    trainer.fit(make_module(), datamodule=make_data())
    assert written == [*range(interval // 2, 5, interval // 2), 5]
    assert f"last.ckpt is written every {interval // 2} steps, of val_check_interval" in told[0]
