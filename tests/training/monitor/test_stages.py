"""A run whose stages are read from a file: what it accepts, what it logs, and what it says that they promise."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from fm_stages.flow import CosinePath, LinearPath, LogitNormalTimesteps, ShiftedTimesteps, VPPath
from fm_stages.oracle import DataBank, Oracle, StageProfile
from fm_stages.training import OracleMonitor
from fm_stages.training.monitor.stages import (
    check_label_dropout,
    describe_stages,
    draws_before,
    expected_floors,
    read_profile,
)

TIMES = ("boundary", "navigation_end", "refinement_complete")
FILE = "stages.json"


def density(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Of u / (u + s (1 - u)) for uniform u."""
    return shift / (shift * t + 1 - t) ** 2


def floor_by_definition(rows: torch.Tensor, labels: torch.Tensor, dropout: float, shift: float, end: float) -> tuple:
    """Mean floor of t in (0, end) on the linear path, from draws of everything in float64; and its error."""
    generator = torch.Generator().manual_seed(7)
    rows = rows.double().flatten(1)
    t = (torch.arange(40, dtype=torch.float64) + 0.5) / 40 * end
    weight = density(t, shift)
    floors = torch.zeros(600, len(t), dtype=torch.float64)
    index = torch.randint(len(rows), (600,), generator=generator)
    x0 = torch.randn(600, rows.shape[1], generator=generator, dtype=torch.float64)
    dropped = torch.rand(600, generator=generator) < dropout
    allowed = dropped[:, None] | (labels[index][:, None] == labels)
    for k, time in enumerate(t):
        x_t = time * rows[index] + (1 - time) * x0
        logits = -(x_t[:, None] - time * rows).square().sum(2) / (2 * (1 - time) ** 2)
        g = torch.softmax(logits.masked_fill(~allowed, -torch.inf), 1)
        variance = g @ rows.square().sum(1) - (g @ rows).square().sum(1)
        floors[:, k] = variance / (1 - time) ** 2 / rows.shape[1]
    each = (floors * weight).sum(1) / weight.sum()
    return each.mean().item(), each.std().item() / math.sqrt(600)


@pytest.fixture
def no_measurement(monkeypatch):
    def fail(*args, **kwargs):
        pytest.fail("the stages were measured")

    return lambda: monkeypatch.setattr(StageProfile, "measure", fail)


@pytest.fixture
def bank(make_data) -> DataBank:
    return make_data().bank()


@pytest.fixture
def saved(bank) -> StageProfile:
    """The stages of what `make_data` and a module with label dropout 0.3 train on."""
    profile = StageProfile.measure(Oracle(bank, LinearPath()), 0.3, num_times=20)
    profile.save(FILE)
    return profile


@pytest.fixture
def logged(read_csv):
    """The logged values of the last step, by name."""

    def read() -> dict[str, float]:
        table = read_csv("metrics.csv")
        last = max(table["step"])
        lines = [k for k, step in enumerate(table["step"]) if step == last]
        return {name: x[k] for name, x in table.items() for k in lines if not math.isnan(x[k])}

    return read


def csv() -> CSVLogger:
    return CSVLogger(".", name="", version="")


class TestRun:
    def test_logs_what_the_file_says_and_measures_nothing(
        self, saved, no_measurement, bank, make_module, make_data, make_trainer, logged, caplog
    ):
        no_measurement()
        module = make_module(label_dropout=0.3, timesteps=ShiftedTimesteps(2.0))
        monitor = OracleMonitor(1, 2, profile=FILE)
        with caplog.at_level(logging.INFO):
            make_trainer(2, callbacks=[monitor], logger=csv()).fit(module, datamodule=make_data())
        assert monitor.profile == saved
        values = logged()
        for name in TIMES:
            assert values[f"stages/{name}"] == pytest.approx(getattr(saved, name))
        assert any(f"stages read from {FILE}: navigation ends at" in line for line in caplog.messages)
        assert not any("measuring the stages" in line for line in caplog.messages)

        index = torch.arange(len(bank))
        rows, labels = bank.rows(index), bank.labels_of(index)
        for name, end in (("stages/floor", 1.0), ("stages/floor_navigation", saved.boundary)):
            expected, error = floor_by_definition(rows, labels, 0.3, 2.0, end)
            assert abs(values[name] - expected) < 4 * math.hypot(error, error * math.sqrt(600 / 256)) + 0.01 * expected
            assert values[name] > 10 * error

    def test_logs_what_a_measurement_logs(self, bank, no_measurement, make_module, make_data, make_trainer, logged):
        make_trainer(2, callbacks=[first := OracleMonitor(1, 2)], logger=csv()).fit(
            make_module(label_dropout=0.3), datamodule=make_data()
        )
        first.profile.save(FILE)
        measured = {name: x for name, x in logged().items() if name.startswith("stages/")}
        assert measured.keys() == {f"stages/{name}" for name in (*TIMES, "floor", "floor_navigation")}
        Path("metrics.csv").unlink()
        no_measurement()
        make_trainer(2, callbacks=[OracleMonitor(1, 2, profile=FILE)], logger=csv()).fit(
            make_module(label_dropout=0.3), datamodule=make_data()
        )
        assert {name: x for name, x in logged().items() if name.startswith("stages/")} == measured

    def test_resumes(self, saved, no_measurement, make_module, make_data, make_trainer):
        no_measurement()
        first = make_trainer(2, callbacks=[OracleMonitor(1, 1, profile=FILE)])
        first.fit(make_module(label_dropout=0.3), datamodule=make_data())
        first.save_checkpoint("a.ckpt")
        monitor = OracleMonitor(1, 1, profile=FILE)
        trainer = make_trainer(4, callbacks=[monitor])
        trainer.fit(make_module(label_dropout=0.3), datamodule=make_data(), ckpt_path="a.ckpt")
        assert monitor.profile == saved
        assert sorted(int(file.stem[-7:]) for file in Path("oracle").glob("gap_by_t_*.csv")) == [1, 2, 3, 4]

    def test_a_second_fit_of_other_data_is_refused(self, saved, no_measurement, make_module, make_data, make_trainer):
        no_measurement()
        monitor = OracleMonitor(1, 1, profile=FILE)
        module = make_module(label_dropout=0.3)
        make_trainer(1, callbacks=[monitor]).fit(module, datamodule=make_data())
        with pytest.raises(ValueError, match="rows: 60 there, 120 here"):
            make_trainer(1, callbacks=[monitor]).fit(module, datamodule=make_data(flip=True))

    def test_validates_only(self, saved, no_measurement, make_module, make_data, make_trainer):
        no_measurement()
        monitor = OracleMonitor(profile=FILE)
        trainer = make_trainer(callbacks=[monitor], limit_val_batches=None, logger=csv())
        trainer.validate(make_module(label_dropout=0.3), datamodule=make_data(), verbose=False)
        assert monitor.profile == saved
        assert monitor.held_out[""].edges.count(saved.boundary) == 1

    def test_the_share_of_a_module_that_does_not_say_is_told(
        self, saved, no_measurement, make_module, make_data, make_trainer
    ):
        """Counted in one batch of 20 it would be 0.3 by luck only."""
        no_measurement()
        for told, fits in ((0.3, True), (0.1, False)):
            monitor = OracleMonitor(1, 1, label_dropout=told, profile=FILE)
            trainer = make_trainer(1, callbacks=[monitor])
            if fits:
                trainer.fit(make_module(label_dropout=0.3), datamodule=make_data())
                continue
            with pytest.raises(ValueError, match=r"0\.3 there, 0\.1 here"):
                trainer.fit(make_module(label_dropout=0.3), datamodule=make_data())

    def test_a_module_whose_timesteps_are_a_number(self, saved, make_module, make_data, make_trainer, logged, caplog):
        """As in diffusion code: then the floor is that of uniform t, and said to be."""
        module = make_module(label_dropout=0.3)
        sampler = module.timesteps
        draw = module.draw

        def own_draw(*args):
            module.timesteps = sampler
            try:
                return draw(*args)
            finally:
                module.timesteps = 1000

        module.draw, module.timesteps = own_draw, 1000
        with caplog.at_level(logging.INFO):
            make_trainer(1, callbacks=[OracleMonitor(1, 1, profile=FILE)], logger=csv()).fit(
                module, datamodule=make_data()
            )
        assert logged()["stages/floor"] == pytest.approx(saved.expected_floor()[0])
        assert any("With uniform t the regular loss cannot go below" in line for line in caplog.messages)


class TestRefusals:
    @pytest.fixture
    def refused(self, no_measurement, make_module, make_data, make_trainer):
        """The message with which a fit with the file in place is refused, before any step."""

        def message(kind=ValueError, data=None, **kwargs) -> str:
            no_measurement()
            module = make_module(**{"label_dropout": 0.3, **kwargs})
            trainer = make_trainer(1, callbacks=[OracleMonitor(1, 1, profile=FILE)])
            with pytest.raises(kind) as caught:
                trainer.fit(module, datamodule=data or make_data())
            text = str(caught.value)
            assert FILE in text
            assert "\n" not in text
            return text

        return message

    def change(self, **kwargs) -> None:
        plain = json.loads(Path(FILE).read_text())
        Path(FILE).write_text(json.dumps(plain | kwargs))

    def test_other_rows(self, saved, refused, make_data):
        assert "not those of this run's data (rows: 60 there, 120 here)" in refused(data=make_data(flip=True))

    def test_other_dims(self, saved, refused):
        self.change(num_dims=17)
        assert "values per row: 17 there, 16 here" in refused()

    def test_another_path(self, saved, refused):
        text = refused(path=CosinePath())
        assert "path: LinearPath there, CosinePath here" in text
        assert "measure them with `fm-stages profile`" in text

    def test_the_same_path_with_other_numbers(self, bank, refused):
        StageProfile.measure(Oracle(bank, VPPath(0.1, 10.0)), 0.3, num_queries=4, num_times=3).save(FILE)
        text = refused(path=VPPath())
        assert "VPPath(beta_min=0.1, beta_max=10.0) there, VPPath(beta_min=0.1, beta_max=20.0) here" in text

    def test_other_data(self, bank, refused):
        """As many rows of as many values, a little brighter."""
        index = torch.arange(len(bank))
        other = DataBank(bank.rows(index) * 1.001, bank.labels_of(index))
        StageProfile.measure(Oracle(other, LinearPath()), 0.3, num_queries=4, num_times=3).save(FILE)
        assert "root mean square norm of a row" in refused()

    def test_another_label_dropout(self, saved, refused):
        assert "share of unlabelled queries: 0.3 there, 0.1 here" in refused(label_dropout=0.1)

    def test_a_missing_file(self, refused):
        assert "No such file" in refused(FileNotFoundError)

    @pytest.mark.parametrize("text", ["[1, 2]", "{}", '{"loss": [1.0]}', "boundary: 0.3", ""])
    def test_another_file(self, refused, text):
        Path(FILE).write_text(text)
        assert "not a stage profile" in refused()


class TestReadProfile:
    def test_of_the_same_data(self, saved, bank):
        assert read_profile(FILE, Oracle(bank, LinearPath())) == saved
        assert read_profile(Path(FILE), Oracle(bank, LinearPath())) == saved

    def test_stored_otherwise_it_is_the_same_data(self, saved, bank):
        """Rows in uint8 and in float32 have norms that differ by rounding."""
        index = torch.arange(len(bank))
        assert read_profile(FILE, Oracle(DataBank(bank.rows(index)), LinearPath())) == saved

    @pytest.mark.parametrize(("share", "fits"), [(0.3, True), (0.305, True), (0.28, False), (1.0, False), (0.0, False)])
    def test_share_of_labels(self, saved, share, fits):
        if fits:
            check_label_dropout(saved, share, FILE)
            return
        with pytest.raises(ValueError, match="share of unlabelled queries"):
            check_label_dropout(saved, share, FILE)


class TestFloors:
    def test_names_and_numbers(self, saved):
        floors = expected_floors(saved, ShiftedTimesteps(2.0))
        assert floors == {
            "stages/floor": saved.expected_floor(ShiftedTimesteps(2.0)),
            "stages/floor_navigation": saved.expected_floor(ShiftedTimesteps(2.0), 0.0, saved.boundary),
        }
        text = describe_stages(saved, ShiftedTimesteps(2.0))
        assert f"boundary {saved.boundary:.3f}" in text
        (floor, error), (early, _) = floors.values()
        assert f"With t as this run draws it the regular loss cannot go below {floor:.4f} ± {error:.4f}" in text
        assert f"before the boundary not below {early:.4f}" in text
        assert early > floor

    def test_without_draws_before_the_boundary(self, saved):
        late = LogitNormalTimesteps(6.0, 0.3)
        assert expected_floors(saved, late).keys() == {"stages/floor"}
        assert "before the boundary" not in describe_stages(saved, late)

    def test_a_boundary_at_the_start(self):
        profile = StageProfile.measure(Oracle(DataBank(torch.ones(1, 3)), LinearPath()), num_queries=4)
        assert expected_floors(profile, None) == {"stages/floor": (0.0, 0.0)}

    @pytest.mark.parametrize(
        ("time", "timesteps", "draws"),
        [
            (0.0, None, False),
            (1e-4, None, False),
            (0.01, None, True),
            (1.0, None, True),
            (0.1, LogitNormalTimesteps(3.0, 1.0), False),
            (0.1, LogitNormalTimesteps(0.0, 1.0), True),
            (0.0, LogitNormalTimesteps(0.0, 1.0), False),
            (1.0, ShiftedTimesteps(3.0), True),
        ],
    )
    def test_draws_before(self, time, timesteps, draws):
        assert draws_before(time, timesteps) == draws
