"""The probe of training images, against what the module itself says of these images, and as other callbacks see it."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from fm_stages.oracle import GaussianMixtureBank, oracle_of, timestep_bins
from fm_stages.training import Checkpoints, OracleMonitor
from fm_stages.training.monitor.probe import measure_probe

VALIDATED = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}


class Probed(L.Callback):
    """Keeps the batches that `predict_fixed` was asked about outside of validation steps, and the weights then."""

    def __init__(self, module) -> None:
        self.batches, predict = [], module.predict_fixed

        def recorded(batch, batch_idx=0):
            outputs = predict(batch, batch_idx)
            if isinstance(batch, dict) and "index" not in batch and batch["x1"].shape[0]:
                self.batches.append(outputs)
            return outputs

        module.predict_fixed = recorded


class TestNumbers:
    @pytest.mark.parametrize(("num_probe", "expected"), [(1024, 24), (10, 10)])
    def test_are_regular_losses_of_training_images_under_the_held_out_draws(
        self, make_module, make_data, make_trainer, binned, num_probe, expected
    ):
        module, data = make_module(label_dropout=0.3, ema_decay=0.5), make_data(val_batch_size=7, flip=True)
        seen, monitor = Probed(module), OracleMonitor(1, 2, num_probe=num_probe)
        make_trainer(2, callbacks=[monitor], **VALIDATED).fit(module, datamodule=data)
        held_out, probe = seen.batches[:4], seen.batches[4:]
        assert sum(len(part["t"]) for part in held_out) == 24
        assert sum(len(part["t"]) for part in probe) == expected
        assert max(len(part["t"]) for part in probe) <= max(len(part["t"]) for part in held_out)
        for name in ("x0", "t"):  # the same draws, image by image
            theirs, ours = (torch.cat([part[name] for part in parts]) for parts in (held_out, probe))
            assert torch.equal(ours, theirs[:expected])
        rows = data.bank().rows(torch.arange(data.bank().num_rows)).flatten(1)
        x1 = torch.cat([part["x1"] for part in probe]).flatten(1)
        where = (x1[:, None] == rows[None]).all(2)
        assert where.any(1).all()
        assert len(where.int().argmax(1).unique()) == expected  # each row once
        for suffix in ("", "_ema"):
            parts = [
                {
                    "t": part["t"].double().numpy(),
                    "regular": (part[f"prediction{suffix}"].double() - (part["x1"].double() - part["x0"].double()))
                    .square()
                    .flatten(1)
                    .mean(1)
                    .numpy(),
                }
                for part in probe
            ]
            samples = binned(parts, monitor.probe[suffix].edges)
            assert monitor.probe[suffix].average("regular") == pytest.approx(samples.average("regular"), rel=1e-5)
        assert monitor.probe[""].mean != monitor.probe["_ema"].mean

    @pytest.mark.parametrize("num_batches", [1, 3, 60])
    def test_do_not_depend_on_the_batches(self, make_module, make_data, make_trainer, num_batches):
        module, data, trainer = make_module(), make_data(), make_trainer()
        oracle = oracle_of(data.bank(), module.path)
        module.eval()
        one, other = (
            measure_probe(trainer, module, oracle, timestep_bins(), 40, n)[""].average("regular")
            for n in (5, num_batches)
        )
        assert other == pytest.approx(one, rel=1e-6)

    def test_a_small_training_set_is_measured_in_turns_under_other_noise(self, make_module, make_data, make_trainer):
        module, data = make_module(), make_data()
        seen = Probed(module)
        found = measure_probe(
            make_trainer(), module, oracle_of(data.bank(), module.path), timestep_bins(), 150, num_batches=4
        )
        assert sum(found[""].count) == 150
        x1, x0, t = (torch.cat([part[name] for part in seen.batches]) for name in ("x1", "x0", "t"))
        assert torch.equal(x1[60:120], x1[:60])
        assert len(x1.flatten(1).unique(dim=0)) == 60
        assert len(x0.flatten(1).unique(dim=0)) == len(t.unique()) == 150

    def test_a_bank_of_distributions_gives_the_same_draws_each_time(self, make_module, make_data, make_trainer):
        data, module = make_data(), make_module()
        x1, labels = (f(torch.arange(60)) for f in (data.bank().rows, data.bank().labels_of))
        oracle = oracle_of(GaussianMixtureBank(x1, torch.full_like(x1, 0.3), labels), module.path)
        seen = Probed(module)
        for num_batches in (2, 5):
            measure_probe(make_trainer(), module, oracle, timestep_bins(), 20, num_batches)
        drawn = [torch.cat([part["x1"] for part in parts]) for parts in (seen.batches[:2], seen.batches[2:])]
        torch.testing.assert_close(*drawn, rtol=0, atol=0)
        nearest = torch.cdist(drawn[0].flatten(1), x1.flatten(1)).min(1).values / math.sqrt(16)
        assert 0.1 < nearest.min() < nearest.max() < 0.6  # no row itself: about 0.3 away

    def test_more_ranks_than_images_measure_none(self, make_module, make_data, make_trainer, monkeypatch):
        module, trainer = make_module(), make_trainer()
        monkeypatch.setattr(type(trainer), "world_size", 9)
        oracle = oracle_of(make_data().bank(), module.path)
        assert measure_probe(trainer, module, oracle, timestep_bins(), 8, 1) == {}


class TestTraining:
    def test_is_left_alone(self, make_module, make_data, make_trainer):
        """The same weights and random numbers, bit for bit, with a probe and without."""
        states = []
        for num_probe in (0, 1024):
            torch.manual_seed(0)
            module, monitor = make_module(label_dropout=0.3), OracleMonitor(1, 2, num_probe=num_probe)
            make_trainer(5, callbacks=[monitor], **VALIDATED).fit(module, datamodule=make_data(flip=True))
            assert bool(monitor.probe) == bool(num_probe)
            states.append([*module.state_dict().values(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_without_a_probe_or_a_held_out_set_there_are_no_numbers_of_them(self, make_module, make_data, make_trainer):
        for options in ({"num_probe": 0, **VALIDATED}, {"limit_val_batches": 0}):
            monitor = OracleMonitor(1, 2, num_probe=options.pop("num_probe", 1024))
            trainer = make_trainer(2, callbacks=[monitor], **options)
            trainer.fit(make_module(), datamodule=make_data())
            found = trainer.callback_metrics
            assert not [name for name in found if name.startswith(("oracle_train/", "memorization/excess"))]
            assert ("oracle_val/regular" in found) == bool(options.get("val_check_interval"))


class TestMonitored:
    """By callbacks of Lightning, whatever their place in the list."""

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("name", ["oracle_val/regular_refinement_ema", "memorization/excess_refinement"])
    def test_stops_early_and_keeps_the_best(self, make_module, make_data, make_trainer, tmp_path, first, name):
        stopping, monitor = EarlyStopping(name, patience=1, mode="min"), OracleMonitor(1, 2)
        checkpoints = Checkpoints(monitor=name, dirpath=str(tmp_path / "kept"))
        callbacks = [stopping, monitor] if first else [monitor, stopping]
        options = {**VALIDATED, "enable_checkpointing": True, "num_sanity_val_steps": 1}
        trainer = make_trainer(40, callbacks=[*callbacks, checkpoints], **options)
        module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.05, maximize=True), ema_decay=0.1)
        trainer.fit(module, datamodule=make_data())
        history, boundary = monitor.validations, monitor.profile.boundary
        assert trainer.global_step < 40
        assert history.steps == list(range(2, trainer.global_step + 1, 2))
        held_out, _ = history.average("held_out_ema", boundary, 1)
        if name.startswith("oracle_val"):
            best = min(held_out)
            assert stopping.best_score.item() == pytest.approx(best, rel=1e-6)
            assert checkpoints.best_model_path.endswith(f"step_{history.steps[held_out.index(best)]:07d}.ckpt")
        assert checkpoints.best_model_score.item() == pytest.approx(stopping.best_score.item())

    def test_the_best_step_is_not_forgotten(self, make_module, make_data, make_trainer, monkeypatch):
        """However many validations follow: it would be another one then."""
        monkeypatch.setattr("fm_stages.training.monitor.history.MOST", 4)
        monkeypatch.setattr(
            "fm_stages.training.monitor.callback.best_step_metrics", lambda *_: {"memorization/best_step": 4.0}
        )
        monitor = OracleMonitor(1, 2)
        make_trainer(20, callbacks=[monitor], **VALIDATED).fit(make_module(), datamodule=make_data())
        assert monitor.validations.steps[-1] == 20
        assert 4 in monitor.validations.steps

    def test_a_loss_that_is_no_number_stops_the_run(self, make_module, make_data, make_trainer):
        module, monitor = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=math.nan)), OracleMonitor(1, 2)
        stopping = EarlyStopping("oracle_val/regular_refinement", patience=5)
        trainer = make_trainer(40, callbacks=[monitor, stopping], **VALIDATED)
        trainer.fit(module, datamodule=make_data())
        assert trainer.global_step == 2
        assert "is not finite" in stopping.stopping_reason_message

    def test_of_a_stage_that_there_is_not_there_is_no_number(self, make_module, make_data, make_trainer):
        """A single image: the posterior has always collapsed."""
        data = make_data()
        data.setup()
        images = data._ready().train
        images.images[:] = images.images[0].clone()
        images.labels[:] = 0
        stopping = EarlyStopping("oracle_val/regular_navigation")
        trainer = make_trainer(2, callbacks=[OracleMonitor(1, 2), stopping], **VALIDATED)
        with (
            pytest.warns(UserWarning, match="has always collapsed"),
            pytest.raises(RuntimeError, match="`oracle_val/regular_navigation` which is not available"),
        ):
            trainer.fit(make_module(label_dropout=0.0), datamodule=data)

    def test_validate_says_them_too(self, make_module, make_data, make_trainer, capsys):
        trainer = make_trainer(callbacks=[OracleMonitor()], limit_val_batches=None)
        trainer.validate(make_module(ema_decay=0.0), datamodule=make_data(), verbose=False)
        found = trainer.callback_metrics
        excess = found["oracle_val/regular_refinement"] - found["oracle_train/regular_refinement"]
        assert found["memorization/excess_refinement"] == pytest.approx(excess.item(), abs=1e-6)
        assert not [name for name in found if name.endswith("_ema") or "best_step" in name]
        assert "refinement: held-out regular loss" in capsys.readouterr().out
