"""OracleMonitor against its numbers by their definition, in float64, from what the training steps returned."""

import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from fm_stages.flow import CosinePath, LinearPath, ShiftedTimesteps
from fm_stages.oracle import DataBank, StageProfile, TimestepCurves
from fm_stages.training import QUANTITIES, FlowMatching, OracleMonitor

SCALARS = {
    *(f"oracle/{name}" for name in ("regular", "gap", "floor", "gap_navigation", "gap_refinement", "closed")),
    *(f"oracle/{name}" for name in ("top1", "ess", "gap_sem", "identity_z", "coverage", "share")),
    *(f"stages/{name}" for name in ("boundary", "navigation_end", "refinement_complete")),
}
HELD_OUT = {f"oracle_val/{name}" for name in ("regular", "regular_refinement", "gap_navigation", "closed")}


class WithoutIndex(FlowMatching):
    """Reports no rows, as a module with a plain loader does."""

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        outputs.pop("index")
        return outputs


def rows_and_labels(bank: DataBank) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.arange(len(bank))
    return bank.rows(index), bank.labels_of(index)


@pytest.fixture
def csv_logger() -> CSVLogger:
    return CSVLogger(".", name="", version="")


@pytest.fixture
def logged(read_csv):
    """The logged values of one step by name."""

    def at(step: int) -> dict[str, float]:
        table = read_csv("metrics.csv")
        lines = [k for k, s in enumerate(table["step"]) if s == step]
        return {name: x[k] for name, x in table.items() for k in lines if not math.isnan(x[k])}

    return at


class TestTrainingNumbers:
    @pytest.fixture(params=["linear", "cosine, flips, bf16", "unconditional"])
    def run(self, request, make_module, make_network, make_data, make_trainer, recorder, csv_logger):
        """Six steps on all 60 images, in windows of three."""
        kwargs, data, precision = {"label_dropout": 0.3}, make_data(60), "32-true"
        if request.param == "cosine, flips, bf16":
            kwargs["path"], data, precision = CosinePath(), make_data(60, flip=True), "bf16-mixed"
        if request.param == "unconditional":
            kwargs = {"network": make_network(num_classes=0), "label_dropout": 1.0}
        module, monitor = make_module(timesteps=ShiftedTimesteps(1.5), **kwargs), OracleMonitor(1, window=3)
        trainer = make_trainer(6, callbacks=[monitor, recorder], logger=csv_logger, precision=precision)
        trainer.fit(module, datamodule=data)
        return module, data.bank(), monitor, recorder.steps

    @pytest.fixture
    def expected(self, run, by_definition, binned, read_csv):
        """The table of a window, and its samples by definition."""
        module, bank, _, steps = run

        def of_window(step: int):
            table = read_csv(f"oracle/gap_by_t_{step:07d}.csv")
            samples = [by_definition(*rows_and_labels(bank), module.path, s) for s in steps[step - 3 : step]]
            return table, binned(samples, [*table["t_lo"], 1.0])

        return of_window

    @pytest.mark.parametrize("step", [3, 6])
    def test_table(self, expected, step):
        table, samples = expected(step)
        assert table["t_lo"][1:] == table["t_hi"][:-1]
        assert (table["t_lo"][0], table["t_hi"][-1]) == (0, 1)
        assert table["count"] == [len(samples.of("t", k)) for k in range(18)]
        assert sum(table["count"]) == 180
        for name in QUANTITIES:
            parts = [samples.of(name, k) for k in range(18)]
            means = [x.mean() if len(x) else math.nan for x in parts]
            errors = [x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan for x in parts]
            assert table[name] == pytest.approx(means, rel=5e-4, abs=2e-5, nan_ok=True), name
            assert table[f"{name}_sem"] == pytest.approx(errors, rel=5e-3, abs=2e-5, nan_ok=True), name

    @pytest.mark.parametrize("step", [3, 6])
    def test_scalars(self, run, expected, logged, step):
        values = logged(step)
        assert values.keys() >= SCALARS
        table, samples = expected(step)
        boundary = run[2].profile.boundary
        assert boundary in table["t_lo"]
        for name in ("regular", "gap", "floor", "top1", "ess"):
            assert values[f"oracle/{name}"] == pytest.approx(samples.average(name), rel=2e-4)
        navigation = samples.average("gap", 0, boundary)
        assert values["oracle/gap_navigation"] == pytest.approx(navigation, rel=2e-4)
        assert values["oracle/gap_refinement"] == pytest.approx(samples.average("gap", boundary, 1), rel=2e-4)
        wiener = samples.average("wiener", 0, boundary)
        assert values["oracle/closed"] == pytest.approx(1 - navigation / wiener, rel=2e-3)
        assert values["oracle/identity_z"] == pytest.approx(samples.z_score(), abs=5e-3)
        width = np.diff(samples.edges)
        filled = np.array([len(samples.of("t", k)) for k in range(18)])
        assert values["oracle/coverage"] == pytest.approx(width[filled > 0].sum())
        error = np.array(
            [samples.of("gap", k).std(ddof=1) / math.sqrt(n) if n > 1 else 0 for k, n in enumerate(filled)]
        )
        sem = math.sqrt(np.square(width * error).sum()) / width[filled > 1].sum()
        assert values["oracle/gap_sem"] == pytest.approx(sem, rel=1e-3)
        assert values["stages/shift"] == 1.5
        assert values["stages/boundary"] == boundary

    def test_stages_are_of_the_label_mix_that_the_network_sees(self, run):
        module, bank, monitor, _ = run
        profile = monitor.profile
        assert profile.label_dropout == module.label_dropout
        assert profile == StageProfile.measure(monitor.oracle, module.label_dropout)
        assert profile.num_rows == len(bank)
        assert 0 <= profile.navigation_end <= profile.boundary <= profile.refinement_complete <= 1

    def test_curves_stay_with_the_monitor(self, run, expected):
        table, _ = expected(6)
        assert run[2].train.mean["gap"] == pytest.approx(table["gap"], nan_ok=True)

    def test_share_of_the_time_is_a_share(self, run, logged):
        assert 0 < logged(3)["oracle/share"] < 1
        assert 0 < logged(6)["oracle/share"] < 1


class TestCadence:
    def test_every_other_step_of_accumulated_batches(
        self, make_module, make_data, make_trainer, recorder, csv_logger, by_definition, read_csv
    ):
        """Step 2 is micro-batches 2 and 3: the one that ended it is measured, once."""
        module, data = make_module(label_dropout=0.3), make_data(20)
        callbacks = [OracleMonitor(every_n_steps=2, window=1), recorder]
        make_trainer(5, accumulate_grad_batches=2, callbacks=callbacks, logger=csv_logger).fit(module, datamodule=data)
        files = sorted(file.name for file in Path("oracle").glob("gap_by_t_*.csv"))
        assert files == ["gap_by_t_0000002.csv", "gap_by_t_0000004.csv"]
        for step in (2, 4):
            table = read_csv(f"oracle/gap_by_t_{step:07d}.csv")
            outputs = recorder.steps[2 * step - 1]
            samples = by_definition(*rows_and_labels(data.bank()), module.path, outputs)
            assert sum(table["count"]) == 10
            total = sum(n * gap for n, gap in zip(table["count"], table["gap"], strict=True) if n)
            assert total == pytest.approx(samples["gap"].sum(), rel=1e-4)

    @pytest.mark.parametrize(
        ("every", "window", "steps"), [(1, 1, [1, 2, 3, 4, 5]), (1, 2, [2, 4]), (2, 2, [4]), (1, 9, [5])]
    )
    def test_windows(self, make_module, make_data, make_trainer, every, window, steps):
        """An unfinished window is logged at the end only if the run has nothing else to show."""
        make_trainer(5, callbacks=[OracleMonitor(every, window)]).fit(make_module(), datamodule=make_data())
        assert sorted(int(file.stem[-7:]) for file in Path("oracle").glob("gap_by_t_*.csv")) == steps

    def test_a_run_too_short_to_measure_says_so(self, make_module, make_data, make_trainer, capsys):
        make_trainer(2, callbacks=[OracleMonitor(every_n_steps=3)]).fit(make_module(), datamodule=make_data())
        assert "measured nothing: the run ended before step 3" in capsys.readouterr().out
        assert not Path("oracle").exists()

    def test_a_resumed_run_goes_on_at_its_steps(self, make_module, make_data, make_trainer):
        first = make_trainer(3, callbacks=[OracleMonitor(2, 1)])
        first.fit(make_module(), datamodule=make_data())
        first.save_checkpoint("a.ckpt")
        trainer = make_trainer(6, callbacks=[OracleMonitor(2, 1)])
        trainer.fit(make_module(), datamodule=make_data(), ckpt_path="a.ckpt")
        assert sorted(int(file.stem[-7:]) for file in Path("oracle").glob("gap_by_t_*.csv")) == [2, 4, 6]

    def test_a_window_goes_on_where_the_checkpoint_left_it(self, make_module, make_data, make_trainer):
        def run(steps: int, ckpt_path: str | None = None) -> tuple[L.Trainer, OracleMonitor]:
            monitor = OracleMonitor(1, 4)
            trainer = make_trainer(steps, callbacks=[monitor], val_check_interval=2, check_val_every_n_epoch=None)
            trainer.fit(make_module(), datamodule=make_data(), ckpt_path=ckpt_path)
            return trainer, monitor

        trainer, half = run(6)  # in the middle of the second window
        trainer.save_checkpoint("a.ckpt")
        _, whole = run(8)
        first, second = (Path(f"oracle/gap_by_t_{step:07d}.csv") for step in (4, 8))
        expected = second.read_text()
        second.unlink()
        first.unlink()
        _, resumed = run(8, "a.ckpt")
        assert not first.exists()
        assert second.read_text() == expected
        # as text, for NaN is not equal to itself
        assert repr(resumed.train) == repr(whole.train) != repr(half.train)
        assert repr(resumed.held_out) == repr(whole.held_out)

    def test_a_window_with_other_bins_begins_anew(self, make_module, make_data, make_trainer):
        first = make_trainer(3, callbacks=[OracleMonitor(1, 4)])
        first.fit(make_module(), datamodule=make_data())
        first.save_checkpoint("a.ckpt")
        monitor = OracleMonitor(1, 4, num_bins=6)
        make_trainer(7, callbacks=[monitor]).fit(make_module(), datamodule=make_data(), ckpt_path="a.ckpt")
        assert monitor.logged_step == 7
        assert sum(monitor.train.count) == 4 * 20

    def test_a_second_fit_measures_anew(self, make_module, make_data, make_trainer):
        monitor = OracleMonitor(1, 2)
        for data in (make_data(), make_data(flip=True)):
            make_trainer(2, callbacks=[monitor]).fit(make_module(), datamodule=data)
            assert monitor.oracle.bank is data.bank()
            assert monitor.profile.num_rows == len(data.bank())
            assert sum(monitor.train.count) == 40

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"every_n_steps": 0}, "every_n_steps=0"),
            ({"window": 0}, "window=0"),
            ({"num_bins": 2}, "at least 3 timestep bins, got 2"),
        ],
    )
    def test_arguments_outside_their_range_raise(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            OracleMonitor(**arguments)


class Doctor(L.Callback):
    """After the first batch, and with it the checks at the start: half of the rows become other images."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, OracleMonitor))
        if trainer.global_step == 1:
            bank = monitor.oracle.bank
            x1, labels = rows_and_labels(bank)
            x1[::2] = -x1[::2]
            bank._table = DataBank(x1, labels)._table


class TestAlarm:
    @pytest.fixture
    def alarms(self, make_network, make_data, make_trainer, recwarn):
        """Number of alarms in six windows, with a callback beside the monitor."""

        def run(kind, window, *callbacks) -> int:
            module = kind(make_network(), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
            callbacks = [OracleMonitor(1, window), *callbacks]
            make_trainer(6 * window, callbacks=callbacks).fit(module, datamodule=make_data(60))
            return sum("identity regular = gap + floor is broken" in str(w.message) for w in recwarn)

        return run

    def test_a_healthy_run_raises_none(self, alarms):
        assert alarms(FlowMatching, 16) == 0

    @pytest.mark.parametrize(("kind", "window"), [(WithoutIndex, 4), (FlowMatching, 16)])
    def test_a_bank_whose_rows_are_replaced_by_others_raises_it(self, alarms, kind, window):
        """With the rows' index x1 is read from the bank: then only the network's prediction knows better."""
        assert alarms(kind, window, Doctor()) >= 1

    def test_noise_that_knows_the_image_raises_it(self, make_network, make_data, make_trainer, recwarn):
        """A coupling of noise and data: no row is wrong, but the identity does not hold."""

        class Coupled(WithoutIndex):
            def draw(self, x1, labels, position):
                t, x0, labels = super().draw(x1, labels, position)
                return t, x0 + x1, labels

        module = Coupled(make_network(), optimizer=lambda p: torch.optim.Adam(p, lr=5e-3))
        make_trainer(12, callbacks=[OracleMonitor(1, window=4)]).fit(module, datamodule=make_data(60))
        assert any("identity regular = gap + floor is broken" in str(w.message) for w in recwarn)


class TestHeldOut:
    @pytest.fixture
    def run(self, make_module, make_data, make_trainer, recorder, csv_logger):
        """A fit of three steps with a validation at its end, of raw and averaged weights that differ."""
        module, monitor = make_module(label_dropout=0.3, ema_decay=0.5), OracleMonitor(1, 1)
        options = {"limit_val_batches": None, "val_check_interval": 3, "check_val_every_n_epoch": None}
        trainer = make_trainer(3, callbacks=[monitor, recorder], logger=csv_logger, **options)
        data = make_data(val_batch_size=7)
        trainer.fit(module, datamodule=data)
        return module, data, monitor, recorder.held_out

    @pytest.mark.parametrize("suffix", ["", "_ema"])
    def test_numbers(self, run, by_definition, binned, read_csv, logged, suffix):
        module, data, monitor, batches = run
        table = read_csv(f"oracle_val/gap_by_t{suffix}_0000003.csv")
        boundary = monitor.profile.boundary
        parts = [
            by_definition(*rows_and_labels(data.bank()), module.path, outputs, f"prediction{suffix}")
            for outputs in batches
        ]
        samples = binned(parts, [*table["t_lo"], 1.0])
        assert sum(table["count"]) == data.num_val
        early = [t < boundary for t in table["t_lo"]]
        for name in ("regular", "gap", "wiener"):
            for k, (n, value) in enumerate(zip(table["count"], table[name], strict=True)):
                if n and (early[k] or name == "regular"):
                    assert value == pytest.approx(samples.of(name, k).mean(), rel=1e-3), (name, k)
                else:
                    assert math.isnan(value)  # past the boundary a held-out gap means nothing
        values = logged(3)
        assert values[f"oracle_val/regular{suffix}"] == pytest.approx(samples.average("regular"), rel=1e-4)
        late = samples.average("regular", boundary, 1)
        assert values[f"oracle_val/regular_refinement{suffix}"] == pytest.approx(late, rel=1e-4)
        gap, wiener = (samples.average(name, 0, boundary) for name in ("gap", "wiener"))
        assert values[f"oracle_val/gap_navigation{suffix}"] == pytest.approx(gap, rel=1e-3)
        assert values[f"oracle_val/closed{suffix}"] == pytest.approx(1 - gap / wiener, rel=5e-3)

    def test_raw_and_averaged_weights_are_told_apart(self, run, logged):
        values = logged(3)
        assert values.keys() >= HELD_OUT | {f"{name}_ema" for name in HELD_OUT}
        assert values["oracle_val/regular"] != values["oracle_val/regular_ema"]

    def test_without_averaged_weights_there_are_no_numbers_of_them(
        self, make_module, make_data, make_trainer, csv_logger, logged
    ):
        trainer = make_trainer(callbacks=[OracleMonitor()], logger=csv_logger, limit_val_batches=None)
        trainer.validate(make_module(ema_decay=0.0), datamodule=make_data(), verbose=False)
        values = logged(0)
        assert values.keys() >= HELD_OUT
        assert not [name for name in values if name.endswith("_ema")]

    def test_validate_alone(self, make_module, make_data, make_trainer, capsys):
        monitor = OracleMonitor()
        trainer = make_trainer(callbacks=[monitor], limit_val_batches=None)
        trainer.validate(make_module(label_dropout=0.3), datamodule=make_data(), verbose=False)
        assert monitor.profile.label_dropout == 0.3
        assert sum(monitor.held_out[""].count) == sum(monitor.held_out["_ema"].count) == 24
        out = capsys.readouterr().out
        assert "held-out EMA, navigation" in out
        assert "training, navigation" not in out

    def test_validate_of_a_checkpoint_is_logged_at_its_step(
        self, make_module, make_data, make_trainer, csv_logger, logged
    ):
        trainer = make_trainer(3)
        trainer.fit(make_module(), datamodule=make_data())
        trainer.save_checkpoint("a.ckpt")
        trainer = make_trainer(callbacks=[OracleMonitor()], logger=csv_logger, limit_val_batches=None)
        trainer.validate(make_module(), datamodule=make_data(), ckpt_path="a.ckpt", verbose=False)
        assert [file.name for file in Path("oracle_val").glob("gap_by_t_0*")] == ["gap_by_t_0000003.csv"]

    def test_the_sanity_check_is_not_measured(self, make_module, make_data, make_trainer):
        options = {"limit_val_batches": None, "val_check_interval": 9, "check_val_every_n_epoch": None}
        trainer = make_trainer(2, callbacks=[OracleMonitor(1, 1)], num_sanity_val_steps=2, **options)
        trainer.fit(make_module(), datamodule=make_data())
        assert not Path("oracle_val").exists()


class Plain(L.LightningModule):
    """A module of one's own that knows nothing of labels, EMA or index."""

    path = LinearPath()

    def __init__(self, validation=None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 16)
        self.validation = validation

    def training_step(self, batch, batch_idx):
        x1 = batch["x1"]
        x0, t = torch.randn_like(x1), torch.rand(len(x1))
        x_t = self.path.interpolate(x0, x1, t)
        v = self.layer(x_t.flatten(1)).view_as(x1)
        loss = (v - self.path.velocity(x0, x1, t)).square().mean()
        return {"loss": loss, "x0": x0, "x1": x1, "x_t": x_t, "t": t, "prediction": v}  # not detached

    def validation_step(self, batch, batch_idx):
        return self.validation

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class TestModulesOfOnesOwn:
    OPTIONS = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}  # noqa: RUF012

    @pytest.mark.parametrize("validation", [None, torch.tensor(1.0), {"loss": torch.tensor(1.0)}])
    def test_a_validation_step_that_says_nothing_breaks_nothing(
        self, make_data, make_trainer, csv_logger, logged, validation
    ):
        callbacks = [OracleMonitor(1, 2)]
        trainer = make_trainer(2, callbacks=callbacks, logger=csv_logger, num_sanity_val_steps=1, **self.OPTIONS)
        trainer.fit(Plain(validation), datamodule=make_data())
        trainer.validate(Plain(validation), datamodule=make_data(), verbose=False)
        assert "oracle/gap" in logged(2)
        assert not Path("oracle_val").exists()

    def test_without_labels_all_queries_are_unconditional(
        self, make_data, make_trainer, recorder, by_definition, read_csv
    ):
        data, monitor = make_data(60), OracleMonitor(1, 2)
        torch.manual_seed(0)
        make_trainer(2, callbacks=[monitor, recorder]).fit(Plain(), datamodule=data)
        assert monitor.profile.label_dropout == 1.0
        parts = [by_definition(*rows_and_labels(data.bank()), Plain.path, outputs) for outputs in recorder.steps]
        table = read_csv("oracle/gap_by_t_0000002.csv")
        total = sum(n * gap for n, gap in zip(table["count"], table["gap"], strict=True) if n)
        assert total == pytest.approx(sum(part["gap"].sum() for part in parts), rel=1e-4)

    @pytest.mark.parametrize(("told", "known"), [(None, 0.4), (0.25, 0.25)])
    def test_label_dropout_is_what_is_told_or_what_the_first_batch_shows(self, make_data, make_trainer, told, known):
        class Labelled(Plain):
            def training_step(self, batch, batch_idx):
                labels = torch.where(torch.arange(20) < 8, -1, batch["labels"])
                return {**super().training_step(batch, batch_idx), "labels": labels}

        monitor = OracleMonitor(1, 1, label_dropout=told)
        make_trainer(1, callbacks=[monitor]).fit(Labelled(), datamodule=make_data())
        assert monitor.profile.label_dropout == pytest.approx(known)

    def test_bank_and_path_may_be_given(self, make_data, make_trainer):
        """Then neither datamodule nor attribute is needed."""

        class Bare(Plain):
            path = None

            def training_step(self, batch, batch_idx):
                self.path = LinearPath()
                outputs = super().training_step(batch, batch_idx)
                del self.path
                return outputs

        data = make_data()
        monitor = OracleMonitor(1, 1, bank=DataBank(*rows_and_labels(data.bank())), path=LinearPath())
        make_trainer(1, callbacks=[monitor]).fit(Bare(), data.train_dataloader())
        assert sum(monitor.train.count) == 20

    def test_training_is_left_alone(self, make_module, make_data, make_trainer):
        """The same losses, weights and random numbers with the monitor and without."""
        states = []
        for callbacks in ([], [OracleMonitor(1, 1)]):
            torch.manual_seed(0)
            module = make_module(label_dropout=0.3)
            make_trainer(3, callbacks=callbacks).fit(module, datamodule=make_data())
            states.append([*module.state_dict().values(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_other_callbacks_see_the_gap(self, make_module, make_data, make_trainer):
        trainer = make_trainer(2, callbacks=[monitor := OracleMonitor(1, 2)])
        trainer.fit(make_module(), datamodule=make_data())
        assert trainer.callback_metrics["oracle/gap"].item() == pytest.approx(monitor.train.average("gap"), rel=1e-6)


class TestWithoutLinearReference:
    def test_large_rows_do_without_closed(
        self, make_module, make_data, make_trainer, csv_logger, logged, monkeypatch, capsys
    ):
        from fm_stages.oracle import wiener

        monkeypatch.setattr(wiener, "MAX_DIMS", 15)
        trainer = make_trainer(2, callbacks=[OracleMonitor(1, 2)], logger=csv_logger)
        with pytest.warns(UserWarning, match="No linear reference and so no `closed`"):
            trainer.fit(make_module(), datamodule=make_data())
        values = logged(2)
        assert values["oracle/gap"] > 0
        assert "oracle/closed" not in values  # NaN
        out = capsys.readouterr().out
        assert "training, navigation" in out
        assert "nan" not in out


class TestFigure:
    def test_is_drawn_beside_the_table(self, make_module, make_data, make_trainer, real_figures):
        options = {"limit_val_batches": None, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = make_trainer(2, callbacks=[OracleMonitor(1, 2)], **options)
        trainer.fit(make_module(), datamodule=make_data())
        assert Path("oracle/gap_by_t.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_on_a_gpu(make_module, make_data, make_trainer, recorder, by_definition, read_csv):
    module, data = make_module(label_dropout=0.3), make_data(60)
    callbacks = [OracleMonitor(1, 2), recorder]
    options = {"accelerator": "gpu", "precision": "bf16-mixed", "callbacks": callbacks}
    make_trainer(2, **options).fit(module, datamodule=data)
    assert data.bank().device.type == "cuda"
    data.bank().to("cpu")
    steps = [{name: x.cpu() for name, x in outputs.items()} for outputs in recorder.steps]
    parts = [by_definition(*rows_and_labels(data.bank()), module.path, outputs) for outputs in steps]
    table = read_csv("oracle/gap_by_t_0000002.csv")
    for name in ("regular", "gap", "floor"):
        total = sum(n * x for n, x in zip(table["count"], table[name], strict=True) if n)
        assert total == pytest.approx(sum(part[name].sum() for part in parts), rel=1e-4)


def test_sums_are_made_of_the_reported_quantities():
    assert TimestepCurves(QUANTITIES, [0.0, 0.5, 1.0]).names == QUANTITIES
