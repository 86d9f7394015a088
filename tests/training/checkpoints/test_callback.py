"""Checkpoints: a run that was stopped goes on to the last bit, and a file holds weights but no training set."""

import contextlib
import errno
import os
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.data import Digits
from fm_stages.flow import LogitNormalTimesteps
from fm_stages.networks import DiT
from fm_stages.training import (
    Checkpoints,
    HybridTarget,
    OracleMonitor,
    OracleTarget,
    init_from,
    network_weights,
    read_checkpoint,
)
from fm_stages.training.checkpoints.weights import LABEL_TABLE


def tensors(tree, name="") -> dict[str, torch.Tensor]:
    """Every tensor inside nested dicts and lists, by its place."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {k: x for key, value in items for k, x in tensors(value, f"{name}/{key}").items()}


def assert_same_bits(a, b) -> None:
    a, b = tensors(a), tensors(b)
    assert a
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


class TestResume:
    @pytest.mark.parametrize("accumulation", [1, 2])
    @pytest.mark.parametrize("target", [None, HybridTarget(0.4)])
    def test_two_and_two_steps_are_four(self, make_module, make_data, make_trainer, recorder, accumulation, target):
        """Stopped inside an epoch (of three steps), gone on into the next one, with a fresh start of everything."""

        def run(folder, max_steps, ckpt_path=None):
            module = make_module(target=target, timesteps=LogitNormalTimesteps(), label_dropout=0.3, warmup_steps=3)
            trainer = make_trainer(
                max_steps,
                accumulate_grad_batches=accumulation,
                gradient_clip_val=0.5,
                enable_checkpointing=True,
                default_root_dir=folder,
                callbacks=[Checkpoints(monitor=None, every_n_train_steps=2), OracleMonitor(1, 1), recorder],
            )
            trainer.fit(module, datamodule=make_data(flip=True), ckpt_path=ckpt_path)
            return trainer

        whole = run("whole", 4)
        losses = recorder.losses
        recorder.steps.clear()
        run("parts", 2)
        resumed = run("parts", 4, ckpt_path="parts/checkpoints/last.ckpt")
        assert resumed.global_step == 4
        assert recorder.losses == losses
        assert_same_bits(resumed.lightning_module.state_dict(), whole.lightning_module.state_dict())
        assert_same_bits(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
        a, b = (torch.load(f"{run}/checkpoints/last.ckpt") for run in ("whole", "parts"))
        assert_same_bits(a, b)
        for part in ("global_step", "lr_schedulers", "Patterns"):  # the last is the place in the data
            assert a[part] == b[part]

    def test_raw_and_averaged_weights_keep_their_names(self, make_module, make_data, make_trainer):
        module = make_module()
        callbacks = [Checkpoints(monitor=None, every_n_train_steps=3)]
        make_trainer(3, enable_checkpointing=True, callbacks=callbacks).fit(module, datamodule=make_data())
        checkpoint = read_checkpoint("checkpoints/last.ckpt")
        assert_same_bits(network_weights(checkpoint, ema=False), module.network.state_dict())
        assert_same_bits(network_weights(checkpoint, ema=True), module.network_ema.state_dict())
        assert any(
            (a != b).any() for a, b in zip(module.network.parameters(), module.network_ema.parameters(), strict=True)
        )


class Killed(Exception):
    pass


class HeldOutLosses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.values.append(trainer.callback_metrics["val/loss"].item())


class TestFiles:
    @pytest.fixture
    def rising(self, make_module, make_data, make_trainer, tmp_path):
        """Trains upwards, so that the held-out loss is best at step 2, as where a run memorizes; validates each 2."""

        def fit(max_steps, *callbacks) -> dict[str, int]:
            module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), ema_decay=0.0)
            validate = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}
            kwargs = {"enable_checkpointing": True, "default_root_dir": tmp_path / "run", **validate}
            trainer = make_trainer(
                max_steps, callbacks=[*callbacks, Checkpoints(), losses := HeldOutLosses()], **kwargs
            )
            with contextlib.suppress(Killed):
                trainer.fit(module, datamodule=make_data())
            assert losses.values == sorted(losses.values)
            return {
                file.name: read_checkpoint(file)["global_step"] for file in (tmp_path / "run/checkpoints").iterdir()
            }

        return fit

    def test_best_and_last(self, rising):
        assert rising(7) == {"step_0000002.ckpt": 2, "last.ckpt": 7}

    def test_a_run_that_is_killed_loses_no_more_than_since_the_last_validation(self, rising):
        class Kill(L.Callback):
            def on_train_batch_start(self, trainer, *args) -> None:
                if trainer.global_step == 5:
                    raise Killed

        assert rising(7, Kill()) == {"step_0000002.ckpt": 2, "last.ckpt": 4}

    @pytest.mark.parametrize("monitor", [None, "val/loss"])
    def test_every_n_steps_is_every_n_whole_steps(self, make_module, make_data, make_trainer, monitor):
        """Also before the first validation, at the end of an epoch (of 3 steps), and with accumulated gradients."""

        class Saved(L.Callback):
            def __init__(self) -> None:
                self.at: list[tuple[int, int]] = []

            def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
                done = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
                self.at.append((checkpoint["global_step"], done))

        # of micro-batches, as Lightning counts them: 5 steps
        validate = {"limit_val_batches": None, "val_check_interval": 10, "check_val_every_n_epoch": None}
        callbacks = [saved := Saved(), Checkpoints(monitor, every_n_train_steps=3, save_top_k=-1)]
        trainer = make_trainer(
            12, callbacks=callbacks, accumulate_grad_batches=2, enable_checkpointing=True, **validate
        )
        trainer.fit(make_module(), datamodule=make_data())
        assert all(done == 2 * step for step, done in saved.at)
        best = [5, 10] if monitor else [3, 6, 9, 12]
        assert {step for step, _ in saved.at} == {3, 6, 9, 12, *best}
        files = {f"step_{step:07d}.ckpt" for step in best}
        assert {file.name for file in Path("checkpoints").iterdir()} == {"last.ckpt", *files}

    def test_the_last_file_comes_after_what_other_callbacks_write_at_the_end(
        self, make_module, make_data, make_trainer
    ):
        class Writes(L.Callback):
            def on_train_end(self, trainer, pl_module) -> None:
                trainer.checkpoint_callback.settle(trainer)  # with the file of step 3
                assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 3
                raise Killed

        def fit(*callbacks) -> None:
            callbacks = [*callbacks, Checkpoints(every_n_train_steps=3)]
            trainer = make_trainer(6, callbacks=callbacks, enable_checkpointing=True)
            with contextlib.suppress(Killed):
                trainer.fit(make_module(), datamodule=make_data())

        fit(Writes())
        assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 3
        fit()
        assert read_checkpoint("checkpoints/last.ckpt")["global_step"] == 6

    def test_what_a_killed_run_was_writing_goes_and_nothing_else(self, rising, tmp_path):
        folder = tmp_path / "run"
        for name in (
            "a.csv.9000123.part",
            "oracle/b.csv.9000099.part",
            "checkpoints/last.ckpt.9000007.part",
            "film.part",
            "film.001.part",
            "others/a.csv.123.part",
            "x.1.parts",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("not all of")
        with contextlib.suppress(NotADirectoryError, ValueError):
            rising(1)
        assert sorted(file.name for file in folder.rglob("*.part*")) == [
            "a.csv.123.part",
            "film.001.part",
            "film.part",
            "x.1.parts",
        ]

    def test_the_last_one_is_whole_until_the_next_one_is(self, rising, tmp_path, monkeypatch):
        folder = tmp_path / "run/checkpoints"
        rising(3)
        before = (folder / "last.ckpt").read_bytes()
        os.link(folder / "last.ckpt", tmp_path / "the same file")
        (folder / "last.ckpt.9000123.part").write_bytes(b"of a run that was killed")

        def another_file_system(*_):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "rename", another_file_system)  # as where $TMPDIR is not where the run is
        assert rising(5) == {"step_0000002.ckpt": 2, "last.ckpt": 5}
        assert (tmp_path / "the same file").read_bytes() == before

    def test_a_folder_that_is_given_is_kept(self, make_module, make_data, make_trainer, tmp_path):
        callbacks = [Checkpoints(monitor=None, every_n_train_steps=1, dirpath=str(tmp_path / "elsewhere"))]
        make_trainer(1, enable_checkpointing=True, callbacks=callbacks).fit(make_module(), datamodule=make_data())
        assert (tmp_path / "elsewhere/last.ckpt").is_file()
        assert not Path("checkpoints").exists()

    @pytest.fixture
    def with_oracle(self, make_module, make_trainer):
        """A run whose target, monitor and data all hold the bank of 2 x 1438 rows."""
        torch.manual_seed(0)
        module = make_module(DiT(8, 4, 1, 8, 1, 2, 10), target=OracleTarget())
        data = Digits(batch_size=32, flip=True)
        callbacks = [Checkpoints(monitor=None, every_n_train_steps=2), OracleMonitor(1, 1)]
        trainer = make_trainer(2, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, datamodule=data)
        return module, data, Path("checkpoints/last.ckpt")

    def test_no_bank_in_the_file(self, with_oracle):
        module, data, file = with_oracle
        checkpoint = torch.load(file, weights_only=True)
        assert set(checkpoint["state_dict"]) == set(module.state_dict())
        assert all(name.startswith(("network.", "network_ema.")) for name in checkpoint["state_dict"])
        assert not [
            name for name, x in tensors(checkpoint).items() if {1438, 2876} & {*x.shape} or x.numel() >= 1438 * 64
        ]
        weights = 4 * sum(p.numel() for p in module.parameters())  # raw and averaged; Adam keeps as much again
        assert file.stat().st_size < 2 * weights + 70_000 < data.bank().num_bytes

    def test_nothing_in_the_file_needs_unpickling(self, with_oracle):
        checkpoint = torch.load(with_oracle[2], weights_only=True)
        assert checkpoint["global_step"] == 2
        assert read_checkpoint(with_oracle[2]).keys() == checkpoint.keys()


class TestReading:
    def test_a_missing_file_is_named(self):
        with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere/last\.ckpt"):
            read_checkpoint("nowhere/last.ckpt")

    @pytest.mark.parametrize("content", [b"", b"\x7fELF what is this", b"PK\x03\x04 a zip cut short"])
    def test_foreign_and_damaged_files(self, content):
        Path("x.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.ckpt is not a checkpoint that can be read") as caught:
            read_checkpoint("x.ckpt")
        assert "weights_only` set to `False" not in str(caught.value)  # torch's advice runs what the file says

    def test_code_in_a_file_is_not_run(self):
        class Trap:
            def __reduce__(self):
                return Path.touch, (Path("sprung"),)

        torch.save({"state_dict": {}, "trap": Trap()}, "x.ckpt")
        with pytest.raises(ValueError, match="not a checkpoint that can be read"):
            read_checkpoint("x.ckpt")
        assert not Path("sprung").exists()

    @pytest.mark.parametrize("content", [{"model": {}}, [1, 2], torch.zeros(3)])
    def test_other_peoples_files(self, content):
        torch.save(content, "x.ckpt")
        with pytest.raises(ValueError, match="it has no state_dict"):
            read_checkpoint("x.ckpt")

    def test_weights_by_kind(self):
        checkpoint = {
            "state_dict": {"network.a": torch.zeros(1), "network_ema.a": torch.ones(1), "other": torch.ones(2)}
        }
        assert network_weights(checkpoint, ema=False) == {"a": torch.zeros(1)}
        assert network_weights(checkpoint, ema=True) == {"a": torch.ones(1)}
        assert network_weights({"state_dict": {"network.a": torch.zeros(1)}}, ema=True) is None


class TestInitFrom:
    @pytest.fixture
    def save(self, make_module):
        """Saves a module whose raw weights are all 1 and averaged ones all 2."""

        def save(**kwargs) -> str:
            module = make_module(**kwargs)
            with torch.no_grad():
                for network, value in ((module.network, 1.0), (module.network_ema, 2.0)):
                    for p in network.parameters() if network is not None else ():
                        p.fill_(value)
            torch.save({"state_dict": module.state_dict()}, "x.ckpt")
            return "x.ckpt"

        return save

    @pytest.mark.parametrize(("ema_decay", "kind", "value"), [(0.9, "EMA", 2.0), (0.0, "raw", 1.0)])
    def test_averaged_weights_come_first(self, save, make_network, ema_decay, kind, value):
        network = make_network()
        assert init_from(network, save(ema_decay=ema_decay)) == f"Started from the {kind} weights of x.ckpt."
        assert all((p == value).all() for p in network.parameters())

    def test_another_number_of_classes_keeps_the_fresh_table(self, save, make_network):
        network = make_network(num_classes=7)
        fresh = network.state_dict()[LABEL_TABLE].clone()
        line = init_from(network, save())
        assert "the label table starts fresh (4 rows there, 8 here)" in line
        for name, x in network.state_dict().items():
            assert torch.equal(x, fresh) if name == LABEL_TABLE else (x == 2).all()

    def test_another_width_is_refused_and_changes_nothing(self, save, make_network):
        network = make_network(hidden_size=32)
        before = {name: x.clone() for name, x in network.state_dict().items()}
        with pytest.raises(ValueError, match=r"x\.ckpt does not fit .* first: \S+ \(.*16.*\) there, \(.*32.*\) here"):
            init_from(network, save())
        assert_same_bits(network.state_dict(), before)

    def test_another_network_is_refused(self, save):
        with pytest.raises(ValueError, match="weight missing there"):
            init_from(torch.nn.Linear(2, 2), save())

    def test_a_file_without_a_network_is_refused(self, make_network):
        torch.save({"state_dict": {"a": torch.zeros(1)}}, "x.ckpt")
        with pytest.raises(ValueError, match=r"holds no weights named network\.\*"):
            init_from(make_network(), "x.ckpt")
