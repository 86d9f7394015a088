"""What a person hears of is a warning, and an alert of wandb; on rank 0 alone."""

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fm_stages.training.logs.alerts import alert


class FakeRun:
    def __init__(self) -> None:
        self.alerts = []

    def alert(self, **kwargs) -> None:
        self.alerts.append(kwargs)


class FakeWandbLogger(WandbLogger):
    def __init__(self) -> None:
        self._run = FakeRun()

    @property
    def experiment(self) -> FakeRun:
        return self._run

    def finalize(self, status) -> None:
        pass


class TestAlert:
    def test_is_a_warning_and_goes_to_each_wandb_logger(self, make_trainer, tmp_path):
        loggers = [FakeWandbLogger(), CSVLogger(tmp_path), FakeWandbLogger()]
        trainer = make_trainer(logger=loggers)
        with pytest.warns(UserWarning, match="Memorization: the loss rises"):
            alert(trainer, "Memorization", "the loss rises")
        for logger in (loggers[0], loggers[2]):
            (sent,) = logger.experiment.alerts
            assert sent["title"] == "Memorization"
            assert sent["text"] == "the loss rises"
            assert sent["level"] == "WARN"
            assert sent["wait_duration"] >= 600

    def test_without_loggers_it_is_a_warning(self, make_trainer):
        with pytest.warns(UserWarning, match="title: text"):
            alert(make_trainer(), "title", "text")

    def test_a_long_title_is_cut_to_what_wandb_takes(self, make_trainer):
        logger = FakeWandbLogger()
        with pytest.warns(UserWarning, match="x" * 100):
            alert(make_trainer(logger=logger), "x" * 100, "text")
        assert len(logger.experiment.alerts[0]["title"]) < 64

    @pytest.mark.filterwarnings("error")
    def test_other_ranks_are_silent(self, make_trainer, monkeypatch):
        logger = FakeWandbLogger()
        trainer = make_trainer(logger=logger)
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        alert(trainer, "title", "text")
        assert logger.experiment.alerts == []

    @pytest.mark.parametrize("mode", ["offline", "disabled"])
    def test_wandb_takes_it_without_a_network(self, make_trainer, tmp_path, monkeypatch, mode):
        monkeypatch.setenv("WANDB_MODE", mode)
        logger = WandbLogger(project="test", save_dir=str(tmp_path))
        with pytest.warns(UserWarning, match="title: text"):
            alert(make_trainer(logger=logger), "title", "text")
        logger.experiment.finish()
