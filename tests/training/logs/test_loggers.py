"""Where numbers go, and that a run never waits for wandb."""

import socket
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.figure import Figure

from fm_stages.oracle import Curves
from fm_stages.training.logs import loggers


class TestWandbMode:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch, tmp_path):
        """No mode set, and a home without logins."""
        monkeypatch.setenv("WANDB_MODE", "offline")  # so that it is put back, whatever a test leaves
        monkeypatch.delenv("WANDB_MODE")
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("NETRC", raising=False)

    @pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
    def test_one_that_is_set_is_kept(self, monkeypatch, mode):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert loggers.choose_wandb_mode() == mode

    def test_without_a_login_offline_and_no_connection_is_tried(self, monkeypatch):
        monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("tried to connect"))
        assert loggers.choose_wandb_mode().startswith("offline (no login: `wandb login` once")
        assert loggers.os.environ["WANDB_MODE"] == "offline"

    @pytest.mark.parametrize("login", ["environment", "netrc"])
    def test_with_a_login_and_no_network_offline(self, monkeypatch, tmp_path, login):
        if login == "environment":
            monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        else:
            (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password " + "x" * 40)
            (tmp_path / ".netrc").chmod(0o600)
        asked = []

        def no_route(address, timeout):
            asked.append((address, timeout))
            raise OSError("no route to host")

        monkeypatch.setattr(socket, "create_connection", no_route)
        assert "api.wandb.ai cannot be reached; `wandb sync` sends the run later" in loggers.choose_wandb_mode()
        assert loggers.os.environ["WANDB_MODE"] == "offline"
        ((address, timeout),) = asked
        assert address == ("api.wandb.ai", 443)
        assert timeout <= 5

    def test_with_a_login_and_a_network_online(self, monkeypatch):
        class Connection:
            def close(self) -> None:
                pass

        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: Connection())
        assert loggers.choose_wandb_mode() == "online"
        assert "WANDB_MODE" not in loggers.os.environ


@pytest.mark.parametrize("arguments", [{}, {"anonymous": True}])
def test_wandb_starts_without_a_warning_that_the_user_did_not_cause(make_trainer, tmp_path, arguments):
    """Lightning names a setting that wandb has no longer; and wandb looks for git in the folder of the run."""
    logger = WandbLogger(save_dir=tmp_path / "runs/new", offline=True, **arguments)
    loggers.prepare_wandb(make_trainer(logger=logger))
    assert logger._wandb_init.get("anonymous", "none is given") == ("allow" if arguments else "none is given")
    assert (tmp_path / "runs/new").is_dir()


CURVES = Curves([0.0, 0.5, 1.0], [3, 1], {"gap": [0.25, 0.5]}, {"gap": [0.1, float("nan")]})


class TestTables:
    def test_curves_are_written_for_any_logger(self, make_trainer, tmp_path, read_csv):
        loggers.write_curves(make_trainer(default_root_dir=tmp_path / "run"), "oracle/gap_by_t", CURVES)
        table = read_csv(tmp_path / "run/oracle/gap_by_t_0000000.csv")
        assert list(table) == ["t_lo", "t_hi", "count", "gap", "gap_sem"]
        assert table["gap"] == [0.25, 0.5]
        assert table["gap_sem"] == pytest.approx([0.1, float("nan")], nan_ok=True)

    def test_a_figure_lies_beside_its_numbers(self, make_trainer, tmp_path, read_csv, real_figures):
        trainer = make_trainer(default_root_dir=tmp_path / "run")
        loggers.log_figure(trainer, "oracle/new", Figure(figsize=(1, 1)), (["step", "gap"], [[1, 0.5], [2, 0.25]]))
        assert (tmp_path / "run/oracle/new.png").read_bytes().startswith(b"\x89PNG")
        assert read_csv(tmp_path / "run/oracle/new.csv") == {"step": [1, 2], "gap": [0.5, 0.25]}

    def test_a_trainer_that_was_told_no_folder_has_one_for_each_run(self, make_trainer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trainer = make_trainer(default_root_dir=None, logger=CSVLogger(tmp_path, version=3))
        assert loggers.run_folder(trainer) == tmp_path / "lightning_logs/version_3"
        assert loggers.run_folder(make_trainer(default_root_dir=None, logger=False)) == tmp_path
        assert loggers.run_folder(make_trainer(default_root_dir="run", logger=CSVLogger("run"))) == Path("run")

    def test_the_working_folder_may_be_the_one_that_was_told(self, make_trainer, tmp_path, monkeypatch):
        """As fm-stages fit tells it: checkpoints and the run's id lie in it, and so do the figures."""
        monkeypatch.chdir(tmp_path)
        checkpoints = ModelCheckpoint(dirpath=tmp_path / "checkpoints")
        options = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True, "callbacks": [checkpoints]}
        assert loggers.run_folder(make_trainer(default_root_dir=tmp_path, **options)) == tmp_path

    def test_a_trial_run_writes_nothing(self, make_trainer, tmp_path):
        trainer = make_trainer(fast_dev_run=True, default_root_dir=tmp_path / "run")
        loggers.write_curves(trainer, "oracle/gap_by_t", CURVES)
        loggers.log_figure(trainer, "oracle/new", Figure(), (["step"], [[1]]))
        assert not (tmp_path / "run").exists()
