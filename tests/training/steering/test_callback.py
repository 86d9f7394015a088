"""StageAware in real runs: when it changes what, what it logs, and what a resumed run goes on with."""

import dataclasses
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch

from fm_stages.flow import (
    LinearPath,
    LogitNormalTimesteps,
    MinSNRWeighting,
    ShiftedTimesteps,
    StageWeighting,
    TabulatedTimesteps,
    UniformTimesteps,
)
from fm_stages.oracle import Curves, StageProfile, oracle_of
from fm_stages.training import (
    GapDensity,
    HybridTarget,
    OracleMonitor,
    ShiftToBoundary,
    StageAware,
    StageWeights,
    TargetByStage,
)
from fm_stages.training.steering.outlook import Outlook


def steered(make_module, make_data, make_trainer, *policies, steps=12, module=None, ckpt_path=None, **kwargs):
    """Train; returns the trainer, the module and the callback."""
    module, callback = module or make_module(), StageAware(list(policies))
    monitor = OracleMonitor(every_n_steps=1, window=2)
    trainer = make_trainer(max_steps=steps, callbacks=[monitor, callback], **kwargs)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return trainer, module, callback


def lines(trainer) -> list[dict]:
    """What the run wrote about its changes."""
    file = Path(trainer.default_root_dir) / "steering.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class TestChanges:
    def test_a_shift_by_the_boundary_that_was_measured(self, make_module, make_data, make_trainer, tmp_path, capsys):
        trainer, module, callback = steered(
            make_module, make_data, make_trainer, ShiftToBoundary(0.7), default_root_dir=tmp_path
        )
        boundary = trainer.callbacks[0].profile.boundary
        assert isinstance(module.timesteps, ShiftedTimesteps)
        assert module.timesteps.shift == pytest.approx(0.7 * (1 - boundary) / (0.3 * boundary))
        (line,) = lines(trainer)  # once: the boundary does not move
        assert line["step"] == 1
        assert line["policy"] == "ShiftToBoundary"
        assert line["numbers"] == [module.timesteps.shift]
        assert f"t = {boundary:.3f}" in line["reason"]

    def test_training_goes_on_where_its_file_cannot_be_written(self, make_module, make_data, make_trainer, tmp_path):
        class FullDisk(L.Callback):
            def on_train_batch_start(self, *_) -> None:
                (tmp_path / "steering.jsonl").mkdir(exist_ok=True)

        callback = StageAware([ShiftToBoundary(0.7)])
        callbacks = [OracleMonitor(every_n_steps=1, window=2), callback, FullDisk()]
        trainer, module = make_trainer(max_steps=3, callbacks=callbacks, default_root_dir=tmp_path), make_module()
        with pytest.warns(UserWarning, match="steering.jsonl could not be written"):
            trainer.fit(module, make_data())
        assert isinstance(module.timesteps, ShiftedTimesteps)

    def test_a_density_by_the_gap_of_the_last_window(self, make_module, make_data, make_trainer, tmp_path):
        policy = GapDensity(warmup_steps=4, every_n_steps=3)
        trainer, module, _ = steered(make_module, make_data, make_trainer, policy, default_root_dir=tmp_path)
        assert [line["step"] for line in lines(trainer)] == [4, 7, 10]
        assert isinstance(module.timesteps, TabulatedTimesteps)
        density = torch.tensor(lines(trainer)[-1]["numbers"])
        written = torch.tensor(module.timesteps.density)
        assert torch.allclose(written / written[0], density / density[0], rtol=1e-5)
        assert module.timesteps.density != [1.0] * len(density)

    def test_training_draws_from_it_and_the_weights_keep_mean_one(self, make_module, make_data, make_trainer, recorder):
        module = make_module(importance_weights=True)
        callback = StageAware([ShiftToBoundary(0.9, largest=100)])
        monitor = OracleMonitor(every_n_steps=1)
        trainer = make_trainer(max_steps=60, callbacks=[monitor, callback, recorder])
        trainer.fit(module, make_data())
        boundary = monitor.profile.boundary
        t = torch.cat([outputs["t"] for outputs in recorder.steps[1:]])
        assert (t < boundary).float().mean().item() == pytest.approx(0.9, abs=0.02)
        assert module.weighting(t).mean().item() == pytest.approx(1, abs=0.15)

    def test_weights_and_targets(self, make_module, make_data, make_trainer):
        _, module, _ = steered(make_module, make_data, make_trainer, StageWeights(0.6), TargetByStage())
        assert isinstance(module.weighting, StageWeighting)
        assert isinstance(module.target, HybridTarget)
        assert module.target.oracle is not None

    def test_smoothing_is_geometric(self, make_module, make_data, make_trainer, tmp_path):
        policy = ShiftToBoundary(0.9, largest=100, smoothing=0.75, every_n_steps=2)
        trainer, _, _ = steered(make_module, make_data, make_trainer, policy, steps=8, default_root_dir=tmp_path)
        boundary = trainer.callbacks[0].profile.boundary
        goal = math.log(0.9 * (1 - boundary) / (0.1 * boundary))
        shifts = [math.log(line["numbers"][0]) for line in lines(trainer)]
        assert shifts == pytest.approx([goal * (1 - 0.75**k) for k in (1, 2, 3, 4)])

    def test_a_dry_run_changes_nothing_and_says_what_it_would(self, make_module, make_data, make_trainer, tmp_path):
        trainer, module, _ = steered(
            make_module, make_data, make_trainer, ShiftToBoundary(0.7, dry_run=True), default_root_dir=tmp_path
        )
        assert isinstance(module.timesteps, UniformTimesteps)
        assert [line["dry_run"] for line in lines(trainer)] == [True]

    def test_no_policy_changes_nothing_bit_for_bit(self, make_module, make_data, make_trainer):
        _, alone, _ = steered(make_module, make_data, make_trainer)
        module = make_module()
        make_trainer(max_steps=12).fit(module, make_data())
        pairs = zip(alone.network.parameters(), module.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


class TestNothingToFollow:
    def test_data_with_one_stage_is_left_alone(self, make_module, make_data, make_trainer, tmp_path, monkeypatch):
        def never_collapses(trainer, oracle, share):
            return dataclasses.replace(StageProfile.measure(oracle, share, num_queries=16), boundary=1.0)

        monkeypatch.setattr("fm_stages.training.monitor.stages.measure_profile", never_collapses)
        trainer, module, _ = steered(make_module, make_data, make_trainer, ShiftToBoundary(), default_root_dir=tmp_path)
        assert isinstance(module.timesteps, UniformTimesteps)
        assert "no boundary was found" in lines(trainer)[0]["reason"]

    def test_a_gap_that_is_not_finite_is_skipped_and_said(
        self, make_module, make_data, make_trainer, tmp_path, monkeypatch
    ):
        policy = GapDensity(warmup_steps=4, every_n_steps=100)
        compute = OracleMonitor._log_window

        def spoiled(monitor, *arguments):
            gap = compute(monitor, *arguments)
            monitor.train.mean["gap"] = [math.nan] * len(monitor.train.count)
            return gap

        monkeypatch.setattr(OracleMonitor, "_log_window", spoiled)
        trainer, module, _ = steered(make_module, make_data, make_trainer, policy, default_root_dir=tmp_path)
        assert isinstance(module.timesteps, UniformTimesteps)
        assert "not finite" in lines(trainer)[0]["reason"]

    def test_the_same_again_after_a_change_is_said_again(
        self, make_module, make_data, make_trainer, tmp_path, monkeypatch
    ):
        compute, windows = OracleMonitor._log_window, []

        def spoiled(monitor, *arguments):
            gap = compute(monitor, *arguments)
            windows.append(gap)
            if len(windows) in (1, 3):
                monitor.train.count = [10] * len(monitor.train.count)
                monitor.train.mean["gap"] = [math.nan] * len(monitor.train.count)
            return gap

        monkeypatch.setattr(OracleMonitor, "_log_window", spoiled)
        policy = GapDensity(warmup_steps=2, every_n_steps=2)
        trainer, _, _ = steered(make_module, make_data, make_trainer, policy, steps=7, default_root_dir=tmp_path)
        assert ["not finite" in line["reason"] for line in lines(trainer)] == [True, False, True]


class TestResume:
    @pytest.mark.parametrize(
        "made",
        [
            lambda: [ShiftToBoundary(0.7)],
            lambda: [StageWeights(0.7), TargetByStage(0.5)],
            lambda: [GapDensity(warmup_steps=2, every_n_steps=2)],  # decides at 6 from a window of before and after 5
        ],
        ids=["shift", "weights and target", "gap density"],
    )
    def test_goes_on_bit_for_bit(self, make_module, make_data, make_trainer, tmp_path, made):
        trainer, _, _ = steered(make_module, make_data, make_trainer, *made(), steps=5)
        trainer.save_checkpoint(tmp_path / "five.ckpt")
        _, whole, expected = steered(make_module, make_data, make_trainer, *made(), steps=10)
        trainer, resumed, callback = steered(
            make_module, make_data, make_trainer, *made(), steps=10, ckpt_path=tmp_path / "five.ckpt"
        )
        assert callback.state_dict() == expected.state_dict()
        pairs = zip(whole.network.parameters(), resumed.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize(
        "policy",
        [
            lambda: StageWeights(0.7, warmup_steps=6),
            lambda: GapDensity(warmup_steps=6),
            lambda: ShiftToBoundary(0.7, warmup_steps=6),
            lambda: StageWeights(0.999, width=3.0, every_n_steps=2),  # refused: nothing has that share
        ],
        ids=["weights", "gap density", "shift", "refused"],
    )
    def test_before_the_first_change_the_configuration_holds(
        self, make_module, make_data, make_trainer, tmp_path, policy
    ):
        def made():
            return make_module(timesteps=LogitNormalTimesteps(-0.5, 0.8), weighting=MinSNRWeighting())

        trainer, _, _ = steered(make_module, make_data, make_trainer, policy(), module=made(), steps=3)
        trainer.save_checkpoint(tmp_path / "three.ckpt")
        _, whole, expected = steered(make_module, make_data, make_trainer, policy(), module=made(), steps=5)
        _, resumed, callback = steered(
            make_module, make_data, make_trainer, policy(), module=made(), steps=5, ckpt_path=tmp_path / "three.ckpt"
        )
        assert isinstance(resumed.timesteps, LogitNormalTimesteps)
        assert isinstance(resumed.weighting, MinSNRWeighting)
        assert callback.state_dict() == expected.state_dict()
        pairs = zip(whole.network.parameters(), resumed.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_the_checkpoint_holds_what_was_decided(self, make_module, make_data, make_trainer, tmp_path):
        trainer, module, callback = steered(make_module, make_data, make_trainer, GapDensity(warmup_steps=2))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        other = make_module()
        resumed = StageAware([GapDensity(warmup_steps=2)])
        monitor = OracleMonitor(every_n_steps=1, window=2)
        trainer = make_trainer(max_steps=12, callbacks=[monitor, resumed])  # nothing is left to train
        trainer.fit(other, make_data(), ckpt_path=tmp_path / "last.ckpt")
        assert other.timesteps.density == module.timesteps.density


class TestAgain:
    def test_a_second_fit_of_one_module_begins_with_what_was_configured(self, make_module, make_data, make_trainer):
        module = make_module()
        for _ in range(2):
            policies = ShiftToBoundary(0.7), TargetByStage()
            trainer, _, _ = steered(make_module, make_data, make_trainer, *policies, module=module, steps=3)
            b = trainer.callbacks[0].profile.boundary
            assert module.timesteps.shift == pytest.approx(0.7 * (1 - b) / (0.3 * b))
            assert module.target.boundary == b

    def test_nothing_changes_inside_a_step_of_accumulated_gradients(
        self, make_module, make_data, make_trainer, tmp_path
    ):
        two = {"accumulate_grad_batches": 2, "default_root_dir": tmp_path}
        trainer, _, _ = steered(make_module, make_data, make_trainer, ShiftToBoundary(0.7), steps=3, **two)
        assert [line["step"] for line in lines(trainer)] == [1]


class TestRefusals:
    def test_two_policies_for_one_thing(self):
        with pytest.raises(ValueError, match="ShiftToBoundary and GapDensity both change the timesteps"):
            StageAware([ShiftToBoundary(), GapDensity()])

    def test_density_and_weights_contradict_each_other(self, make_module, make_data, make_trainer):
        with pytest.raises(ValueError, match="contradict"):
            steered(make_module, make_data, make_trainer, ShiftToBoundary(), StageWeights())
        module = make_module(importance_weights=True)  # then the density is out of the objective
        steered(make_module, make_data, make_trainer, ShiftToBoundary(), StageWeights(), module=module, steps=2)

    def test_without_a_monitor(self, make_module, make_data, make_trainer):
        trainer = make_trainer(callbacks=[StageAware([ShiftToBoundary()])])
        with pytest.raises(ValueError, match="add an OracleMonitor"):
            trainer.fit(make_module(), make_data())

    def test_before_the_monitor(self, make_module, make_data, make_trainer):
        trainer = make_trainer(callbacks=[StageAware([ShiftToBoundary()]), OracleMonitor()])
        with pytest.raises(ValueError, match="must come before StageAware"):
            trainer.fit(make_module(), make_data())

    def test_another_module(self, make_trainer):
        with pytest.raises(ValueError, match="steers FlowMatching, not LightningModule"):
            StageAware([ShiftToBoundary()]).setup(make_trainer(), L.LightningModule(), "fit")


class TestOutlook:
    def test_gradients_are_measured_and_training_is_not_touched(self, make_module, make_data, make_trainer, caplog):
        plain, watched = make_module(), make_module()
        make_trainer(max_steps=6, callbacks=[OracleMonitor(every_n_steps=1)]).fit(plain, make_data())
        callbacks = [OracleMonitor(every_n_steps=1), StageAware(gradients_every_n_steps=3)]
        with caplog.at_level("INFO"):
            make_trainer(max_steps=6, callbacks=callbacks).fit(watched, make_data())
        said = [record.getMessage() for record in caplog.records if "scatters" in record.getMessage()]
        assert [text.partition(":")[0] for text in said] == ["StageAware, step 3", "StageAware, step 6"]
        pairs = zip(plain.network.parameters(), watched.network.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_a_run_ends_with_a_forecast(self, make_module, make_data, make_trainer, caplog):
        callback = StageAware()
        monitor = OracleMonitor(every_n_steps=1, window=1)
        with caplog.at_level("INFO"):
            make_trainer(max_steps=40, callbacks=[monitor, callback]).fit(make_module(), make_data())
        steps = [step for step, _, _ in callback._outlook.gaps]
        assert steps == sorted(steps)
        assert len(steps) > 30
        forecast = callback._outlook.forecast()
        assert forecast is None or any(forecast in record.getMessage() for record in caplog.records)

    def test_memorization_is_alerted(self, make_module, make_data, make_trainer, monkeypatch):
        """Held-out regular loss rises, the training one falls: by curves made by hand."""
        callback, step = StageAware(), 0
        trainer = make_trainer()
        callback._monitor = OracleMonitor()
        callback._monitor.profile = StageProfile.measure(
            oracle_of(make_data().bank(), LinearPath()), num_queries=16, num_times=4
        )
        for held_out, training in ((0.5, 0.5), (0.4, 0.4), (0.6, 0.3), (0.7, 0.2)):
            step += 10
            monkeypatch.setattr(type(trainer), "global_step", step)
            callback._monitor.train = flat(regular=training)
            callback._monitor.held_out = {"": flat(regular=held_out)}
            if held_out == 0.7:
                with pytest.warns(UserWarning, match="memorization sets in"):
                    callback.on_validation_end(trainer, None)
            else:
                callback.on_validation_end(trainer, None)

    def test_its_state_survives_a_checkpoint(self):
        outlook = Outlook()
        for step in range(1, 9):
            outlook.add_window(10 * step, flat(gap=1 / step), 0.5)
            outlook.add_validation(10 * step, flat(regular=1 / step), flat(regular=1 / step), 0.5)
        other = Outlook()
        other.load_state_dict(json.loads(json.dumps(outlook.state_dict())))
        assert other.forecast() == outlook.forecast()
        assert other.state_dict() == outlook.state_dict()


def flat(**mean: float) -> Curves:
    """Curves that do not depend on t."""
    columns = {name: [value] * 4 for name, value in mean.items()}
    return Curves([0.0, 0.25, 0.5, 0.75, 1.0], [50] * 4, columns, {name: [0.01] * 4 for name in mean})
