"""Loggers that fail or hang: training waits for a while, goes on, and says at the end what was lost."""

import os
import threading
import time

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from fm_stages.training.logs import patience
from fm_stages.training.logs.alerts import alert
from fm_stages.training.logs.patience import Silent, finish_loggers, make_patient


class Broken(CSVLogger):
    """Raises, or waits, where it is told to."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.error: Exception | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.seen: list[int] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.may_go_on.wait()
        if self.error is not None:
            raise self.error
        self.seen.append(step)

    @property
    def experiment(self):
        if self.error is not None:
            raise self.error
        return super().experiment


@pytest.fixture
def logger(tmp_path) -> Broken:
    broken = Broken(tmp_path)
    make_patient(broken)
    return broken


def test_a_logger_that_works_is_what_it_was(logger, recwarn, caplog):
    assert isinstance(logger, Broken)
    for step in range(5):
        logger.log_metrics({"a": 1.0}, step)
    assert logger.seen == list(range(5))  # each was waited for
    assert type(logger.experiment).__name__ == "ExperimentWriter"
    make_patient(logger)  # a second time is none
    finish_loggers([logger], 0)
    assert not recwarn.list
    assert caplog.text == ""


def test_one_warning_and_at_the_end_how_many_were_lost(logger, recwarn, caplog):
    logger.log_metrics({}, 0)
    logger.error = OSError(28, "No space left on device")
    logger.log_metrics({}, 1)
    logger.log_metrics({}, 2)
    assert isinstance(logger.experiment, Silent)
    logger.experiment.log({"a": 1})
    logger.experiment["a"] = 1
    (only,) = recwarn.list
    assert str(only.message).startswith("Broken.log_metrics failed (OSError: [Errno 28] No space left on device).")
    logger.error = None
    logger.log_metrics({}, 3)
    assert logger.seen == [0, 3]
    finish_loggers([logger], 0)
    assert "Broken: 5 of 8 calls were lost (the first, log_metrics: OSError" in caplog.text


def test_one_that_hangs_is_waited_for_once_and_loses_nothing_if_it_comes_back(logger, recwarn, caplog, monkeypatch):
    monkeypatch.setattr(patience, "ONE_CALL_SEC", 0.2)
    monkeypatch.setattr(patience, "QUICK_SEC", 0.1)
    logger.may_go_on.clear()
    logger.log_metrics({}, 0)
    left_sec = logger.patience.left_sec
    assert left_sec < patience.PATIENCE_SEC
    for step in range(1, 50):
        logger.log_metrics({}, step)
    assert logger.patience.left_sec == left_sec
    assert [str(w.message)[:41] for w in recwarn.list] == ["Broken.log_metrics did not end within 0 s"]
    logger.may_go_on.set()
    finish_loggers([logger], 0)
    assert logger.seen == list(range(50))
    assert caplog.text == ""


def test_the_patience_of_a_run_comes_to_an_end(logger, monkeypatch, recwarn):
    """A logger that is slow each time, but never hangs, is not waited for all the time."""
    monkeypatch.setattr(patience, "QUICK_SEC", 0.1)
    monkeypatch.setattr(logger.patience, "left_sec", 0.3)
    while not recwarn.list:
        logger.patience.call("save", lambda: time.sleep(0.15))
    assert logger.patience.left_sec < 0.15


def test_one_that_hangs_for_ever_does_not_keep_the_run_from_ending(logger, caplog, monkeypatch):
    for limit in ("ONE_CALL_SEC", "QUICK_SEC", "FINISH_SEC"):
        monkeypatch.setattr(patience, limit, 0.1)
    logger.may_go_on.clear()
    with pytest.warns(UserWarning, match="did not end within"):
        logger.log_metrics({}, 0)
    logger.log_metrics({}, 1)
    finish_loggers([logger], 0)
    assert "Broken: 3 of 3 calls were lost (teardown did not end within 0 s)" in caplog.text
    logger.may_go_on.set()


def test_wandb_whose_service_is_killed(tmp_path, make_trainer, recwarn, caplog, monkeypatch):
    """The real service process, between two steps."""
    for limit in ("PATIENCE_SEC", "ONE_CALL_SEC", "FINISH_SEC"):
        monkeypatch.setattr(patience, limit, 240.0)  # what a service takes to start on a busy machine
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    make_patient(logger)
    assert isinstance(logger, WandbLogger)
    trainer = make_trainer(logger=logger)
    before = children()
    logger.log_metrics({"a": 1.0}, 0)
    (service,) = [pid for pid in children() - before if "wandb-core" in command_of(pid)]
    os.kill(service, 9)
    for step in range(1, 100):
        logger.log_metrics({"a": 1.0}, step)
        time.sleep(0.001)
    alert(trainer, "title", "text")
    assert [str(w.message)[:31] for w in recwarn.list] == ["WandbLogger.log_metrics failed ", "title: text"]
    finish_loggers([logger], 0)
    assert "calls were lost (the first, log_metrics: Connection" in caplog.text


def children() -> set[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        own = set(map(int, file.read().split()))
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/children") as file:
            own |= set(map(int, file.read().split()))
    return own


def command_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()
