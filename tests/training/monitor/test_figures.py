"""When the monitor draws, and that each figure lies beside its numbers."""

import csv
from pathlib import Path

import pytest

from fm_stages import plots
from fm_stages.training import OracleMonitor
from fm_stages.training.monitor import figures

VALIDATED = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}
NAMES = {"oracle/gap_by_t", "oracle/gap_over_steps", "memorization/regular_by_stage", "memorization/regular_by_t"}


@pytest.fixture
def drawn(monkeypatch) -> list[str]:
    """What was written as PNG, in order."""
    seen = []
    monkeypatch.setattr(plots, "save", lambda figure, path: seen.append(f"{path.parent.name}/{path.stem}") or path)
    return seen


def rows_of(name: str) -> list[dict[str, str]]:
    with Path(f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_at_the_first_window_and_at_the_end_whatever_it_costs(make_module, make_data, make_trainer, drawn, monkeypatch):
    monkeypatch.setattr(figures, "SHARE", 1e-9)
    make_trainer(8, callbacks=[OracleMonitor(1, 2)], **VALIDATED).fit(make_module(), datamodule=make_data())
    assert drawn[0] == "oracle/gap_by_t"
    assert set(drawn[1:]) == NAMES
    assert len(drawn) == 5


def test_each_time_where_it_costs_nothing(make_module, make_data, make_trainer, drawn, monkeypatch):
    monkeypatch.setattr(figures, "SHARE", 1e9)
    make_trainer(8, callbacks=[OracleMonitor(1, 2)], **VALIDATED).fit(make_module(), datamodule=make_data())
    # at 4 windows and 4 validations; at the end there is nothing new
    assert drawn.count("oracle/gap_by_t") == 8
    assert drawn.count("memorization/regular_by_stage") == 5


def test_numbers_beside_figures(make_module, make_data, make_trainer, drawn):
    monitor = OracleMonitor(1, 2)
    make_trainer(6, callbacks=[monitor], **VALIDATED).fit(make_module(), datamodule=make_data())
    assert {str(file.with_suffix("")) for file in Path().rglob("*.csv")} >= NAMES
    newest = rows_of("oracle/gap_by_t")
    assert [float(row["gap"]) for row in newest] == pytest.approx(monitor.train.mean["gap"], nan_ok=True)
    held_out = [float(row["held_out_regular"]) for row in newest]
    assert held_out == pytest.approx(monitor.held_out[""].mean["regular"], nan_ok=True)
    assert [float(row["step"]) for row in rows_of("oracle/gap_over_steps")[::18]] == [2, 4, 6]
    last = rows_of("memorization/regular_by_stage")[-1]
    boundary = monitor.profile.boundary
    assert float(last["refinement_train_ema"]) == monitor.probe["_ema"].average("regular", boundary, 1)
    assert float(last["navigation_held_out"]) == monitor.held_out[""].average("regular", 0, boundary)
    by_t = rows_of("memorization/regular_by_t")
    assert len(by_t) == 3 * 18
    assert [int(row["train_count"]) for row in by_t[-18:]] == monitor.probe[""].count


def test_without_averaged_weights_or_a_probe(make_module, make_data, make_trainer, drawn):
    monitor = OracleMonitor(1, 2, num_probe=0)
    make_trainer(4, callbacks=[monitor], **VALIDATED).fit(make_module(ema_decay=0.0), datamodule=make_data())
    assert set(drawn) == NAMES - {"memorization/regular_by_t"}
    assert [name for name in rows_of("memorization/regular_by_stage")[0] if "train" in name or "ema" in name] == []


def test_a_trial_draws_and_writes_nothing(make_module, make_data, make_trainer, drawn, tmp_path):
    trainer = make_trainer(callbacks=[OracleMonitor(1, 1)], fast_dev_run=2, limit_val_batches=None)
    trainer.fit(make_module(), datamodule=make_data())
    assert drawn == []
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_resumed_run_goes_on_with_the_same_numbers(make_module, make_data, make_trainer, drawn):
    def run(steps: int, ckpt_path: str | None = None):
        trainer = make_trainer(steps, callbacks=[OracleMonitor(1, 2)], **VALIDATED)
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path=ckpt_path)
        return trainer

    run(5).save_checkpoint("a.ckpt")
    run(8)
    whole = {name: Path(f"{name}.csv").read_text() for name in NAMES}
    for name in NAMES:
        Path(f"{name}.csv").unlink()
    run(8, "a.ckpt")
    assert {name: Path(f"{name}.csv").read_text() for name in NAMES} == whole


def test_an_older_checkpoint_has_no_history(make_module, make_data, make_trainer, drawn):
    monitor = OracleMonitor(1, 2)
    make_trainer(4, callbacks=[monitor], **VALIDATED).fit(make_module(), datamodule=make_data())
    state = monitor.state_dict()
    other = OracleMonitor(1, 2)
    other.restore({name: state[name] for name in ("train", "held_out", "logged_step")})
    assert other.windows.steps == other.validations.steps == []
    assert other.logged_step == 4
