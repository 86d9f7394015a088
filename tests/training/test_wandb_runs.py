"""The id of a run at wandb: kept with the run, and not that of another one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import WandbLogger

from fm_stages.training.wandb_runs import FILE, choose_run, keep_run


@pytest.fixture
def start(tmp_path):
    def run(goes_on: bool, **arguments) -> str:
        logger = WandbLogger(save_dir=tmp_path, **arguments)
        trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=[logger])
        choose_run(trainer, goes_on)
        keep_run(trainer)
        assert logger._wandb_init["resume"] == "allow"
        assert logger._wandb_init["id"] == logger.version
        return logger.version

    return run


def test_a_run_that_goes_on_keeps_its_id(start):
    first = start(goes_on=False)
    assert start(goes_on=True) == first
    assert start(goes_on=False) != first


def test_an_id_that_is_given_wins(start, tmp_path):
    first = start(goes_on=False)
    assert start(goes_on=True, id="mine") == "mine"
    assert start(goes_on=True) == "mine" != first
    assert (tmp_path / FILE).read_text() == "mine\n"


def test_an_older_run_that_has_none_gets_one(start):
    assert len(start(goes_on=True)) == 8


def test_nothing_is_written_without_wandb(tmp_path):
    trainer = SimpleNamespace(default_root_dir=tmp_path, loggers=[])
    choose_run(trainer, goes_on=False)
    keep_run(trainer)
    assert not list(Path(tmp_path).iterdir())
