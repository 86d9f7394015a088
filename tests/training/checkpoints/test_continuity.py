"""A run that is killed and goes on logs, writes and draws what one that was never stopped does: every number, once."""

import contextlib
import csv
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint

from fm_stages.networks import UNet
from fm_stages.training import (
    Checkpoints,
    Continuity,
    FlowMatching,
    GapDensity,
    Guards,
    MetricsTable,
    OracleMonitor,
    Preempted,
    Preemption,
    SampleGrid,
    StageAware,
    Throughput,
    read_checkpoint,
)

WALL_CLOCK = {"speed/images_per_sec", "speed/data_wait", "speed/memory_bytes", "oracle/share"}
"""Logged numbers that say how fast it went."""


def rows_of(folder: Path) -> list[dict[str, str]]:
    """What metrics.csv says, line by line, but for the clock."""
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as text:
        return [{k: v for k, v in row.items() if v and k not in WALL_CLOCK} for row in csv.DictReader(text)]


def files_of(folder: Path) -> dict[str, bytes]:
    """Tables and lines that a run leaves beside its metrics."""
    found = [file for file in folder.rglob("*") if file.suffix in (".csv", ".json", ".jsonl")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.name != "metrics.csv"}


class Killed(Exception):
    pass


class Kill(Checkpoint):
    """After a checkpoint of this step, or, where there is none, within it; nothing after it happens."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == self.step:
            trainer.loggers = []  # which would write what is left, as at the end of any exception
            raise Killed


class Signal(L.Callback):
    """Asks for an early end in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step, self.preemption = step, None

    def on_train_batch_start(self, trainer, *_) -> None:
        if trainer.global_step == self.step - 1:
            self.preemption._received = "SIGTERM"


@pytest.fixture
def fit(make_module, make_data, make_trainer, tmp_path):
    def run(folder: str, every_n_steps: int | None, *, ckpt_path=None, stop=None, max_steps=14, **module) -> L.Trainer:
        """Epochs of 3 steps, windows of 3, validation each 4, two micro-batches a step; everything that logs is on."""
        policy = GapDensity(warmup_steps=3, every_n_steps=3)
        checkpoints = Checkpoints(every_n_train_steps=every_n_steps)
        callbacks = [
            OracleMonitor(every_n_steps=1, window=3, num_bins=4, num_probe=16),
            StageAware([policy], gradients_every_n_steps=5),
            SampleGrid(every_n_steps=5, num_samples=3, num_steps=2, num_predictions=2),
            Throughput(every_n_steps=3),
            Guards(),
            checkpoints,
            preemption := Preemption(checkpoints),
            Continuity(),
            *([stop] if stop else []),
        ]
        if isinstance(stop, Signal):
            stop.preemption = preemption
        trainer = make_trainer(
            max_steps,
            callbacks=callbacks,
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
            logger=MetricsTable(tmp_path / folder, name=""),
            log_every_n_steps=2,
            check_val_every_n_epoch=None,
            val_check_interval=4,
            limit_val_batches=None,
        )
        data = make_data(flip=True, val_batch_size=12, micro_batch_size=10)
        with contextlib.suppress(Killed, Preempted):
            trainer.fit(make_module(**{"warmup_steps": 5, **module}), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


class TestEveryNumber:
    @pytest.mark.parametrize(
        ("every_n_steps", "stop"),
        [
            (5, Kill(7)),  # gone on from step 5, in the middle of an epoch, of a window, and between validations
            (5, Kill(5)),  # killed before the numbers of the checkpoint's own step are logged
            (4, Kill(8)),  # and before the validation that is due at it
            (None, Kill(11)),  # checkpoints at validations
            (3, Kill(13)),  # at the end of epochs, and of windows
            (3, Kill(3)),  # before anything says which checkpoint is best
            (None, Signal(4)),  # asked to stop at a step after which a validation is due
        ],
        ids=lambda value: f"{type(value).__name__} {value.step}" if hasattr(value, "step") else str(value),
    )
    def test_a_run_that_goes_on(self, fit, tmp_path, every_n_steps, stop):
        whole = fit("whole", every_n_steps)
        fit("parts", every_n_steps, stop=stop)
        resumed = fit("parts", every_n_steps, ckpt_path=tmp_path / "parts/checkpoints/last.ckpt")
        expected, found = rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts")
        assert len({key for row in expected for key in row}) > 50
        assert found == expected
        expected, found = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
        assert len(expected) > 10
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
        expected, found = (
            {f.name: read_checkpoint(f) for f in (tmp_path / run / "checkpoints").iterdir()}
            for run in ("whole", "parts")
        )
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name]["global_step"] != expected[name]["global_step"]] == []
        a, b = (trainer.lightning_module.state_dict() for trainer in (whole, resumed))
        assert all(torch.equal(a[name], b[name]) for name in a)


class Draws(L.Callback):
    """Draws of the generators that everybody's code shares."""

    def __init__(self) -> None:
        self.drawn: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer, *_) -> None:
        drawn = [random.random(), np.random.rand(), np.random.randn(), torch.rand(1).item()]  # noqa: NPY002
        self.drawn.setdefault(trainer.global_step, drawn)


class TestDraws:
    @pytest.fixture
    def train(self, make_data, make_trainer, tmp_path):
        def run(folder: str, max_steps: int, ckpt_path=None):
            L.seed_everything(1)
            network = UNet(
                4, 1, 3, channels=(8,), layers_per_block=1, attention_levels=(), head_size=8, norm_groups=4, dropout=0.3
            )
            callbacks = [draws := Draws(), Checkpoints(None, every_n_train_steps=3), Continuity()]
            options = {"enable_checkpointing": True, "default_root_dir": tmp_path / folder, "callbacks": callbacks}
            trainer = make_trainer(max_steps, **options)
            trainer.fit(FlowMatching(network), datamodule=make_data(), ckpt_path=ckpt_path)
            return trainer.lightning_module.state_dict(), draws.drawn

        return run

    def test_dropout_and_other_peoples_draws_go_on(self, train, tmp_path):
        weights, drawn = train("whole", 5)
        train("parts", 4)
        again, later = train("parts", 5, tmp_path / "parts/checkpoints/step_0000003.ckpt")
        assert list(later) == [3, 4]
        assert later == {step: drawn[step] for step in (3, 4)}
        assert all(torch.equal(x, again[name]) for name, x in weights.items())


class TestMetricsTable:
    def test_a_row_that_was_cut_short_goes(self, tmp_path):
        table = MetricsTable(tmp_path, name="")
        for step in range(3):
            table.log_metrics({"a": step / 3}, step)
        place = table.place()
        assert place == {"version": 0, "num_rows": 3}
        before = (tmp_path / "version_0/metrics.csv").read_bytes()
        table.log_metrics({"a": 1.0, "later": 2.0}, 3)
        table.save()
        with (tmp_path / "version_0/metrics.csv").open("ab") as file:
            file.write(b"0.25")
        again = MetricsTable(tmp_path, name="")
        again.go_on(place)
        assert (tmp_path / "version_0/metrics.csv").read_bytes() == before
        again.log_metrics({"b": 5.0}, 3)
        assert again.place() == {"version": 0, "num_rows": 4}
        assert (tmp_path / "version_0/metrics.csv").read_text().splitlines()[-1] == ",5.0,3"

    def test_after_a_full_disk_the_rows_are_whole(self, tmp_path, monkeypatch):
        """Half a row reached the file; what comes later follows on the last whole one, and nothing is lost or twice."""
        table = MetricsTable(tmp_path, name="")
        table.log_metrics({"a": 1.0}, 0)
        assert table.place()["num_rows"] == 1

        def full(writer, rows) -> None:
            writer.writer.writerow([0.5])
            raise OSError(28, "No space left on device")

        table.log_metrics({"a": 2.0}, 1)
        with monkeypatch.context() as patch:
            patch.setattr(csv.DictWriter, "writerows", full)
            with pytest.raises(OSError, match="No space"):
                table.save()
        table.log_metrics({"a": 3.0}, 2)
        assert table.place()["num_rows"] == 3
        assert (tmp_path / "version_0/metrics.csv").read_text() == "a,step\n1.0,0\n2.0,1\n3.0,2\n"

    def test_a_table_that_the_checkpoint_does_not_know_stays_as_it_is(self, fit, tmp_path):
        """Of a run that logged nothing for a while, or was begun by a version that kept no place."""
        fit("run", 5, max_steps=6)
        table = tmp_path / "run/version_0/metrics.csv"
        before, last = table.read_bytes(), tmp_path / "run/checkpoints/last.ckpt"
        checkpoint = torch.load(last)
        for continuity in ({**checkpoint["continuity"], "tables": []}, None):
            torch.save({**checkpoint, "continuity": continuity}, last)
            fit("run", 5, max_steps=8, ckpt_path=last)
            assert table.read_bytes() == before
        assert {folder.name for folder in (tmp_path / "run").glob("version_*")} == {f"version_{i}" for i in range(3)}

    def test_another_version_that_is_asked_for_is_begun(self, tmp_path):
        table = MetricsTable(tmp_path, name="")
        table.log_metrics({"a": 1.0}, 0)
        place = table.place()
        other = MetricsTable(tmp_path, name="", version="mine")
        other.go_on(place)
        other.log_metrics({"a": 2.0}, 1)
        assert other.place() == {"version": "mine", "num_rows": 1}
        assert (tmp_path / "version_0/metrics.csv").read_text() == "a,step\n1.0,0\n"

    def test_a_fresh_start_leaves_the_table_of_the_run_before(self, tmp_path):
        for version in range(2):
            table = MetricsTable(tmp_path, name="")
            table.log_metrics({"a": version}, 0)
            table.save()
            assert (tmp_path / f"version_{version}/metrics.csv").read_text() == f"a,step\n{version},0\n"

    def test_a_version_that_is_named_is_begun_anew(self, tmp_path):
        for value in range(2):
            table = MetricsTable(tmp_path, name="", version="")
            table.log_metrics({"a": value}, 0)
            table.save()
        assert (tmp_path / "metrics.csv").read_text() == "a,step\n1,0\n"

    def test_a_run_that_branches_off_has_a_table_of_its_own(self, fit, tmp_path):
        fit("whole", 5, max_steps=6)
        fit("other", 5, max_steps=8, ckpt_path=tmp_path / "whole/checkpoints/last.ckpt")
        rows = rows_of(tmp_path / "other")
        assert rows
        assert min(int(row["step"]) for row in rows) >= 6
