"""Sample grids: the pixels of the files are the samples of the weights that they name."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from fm_stages import plots
from fm_stages.flow import Guidance, count_evaluations, midpoint, sample
from fm_stages.training import OracleMonitor, SampleGrid, save_grid
from fm_stages.training.samples import evaluating


def steps_of(folder: str = "samples") -> list[str]:
    return sorted(file.name for file in Path(folder).glob("*.png"))


class TestGrid:
    def test_pixels_are_the_samples_of_both_weights(self, make_module, make_data, make_trainer):
        module = make_module(ema_decay=0.9)
        trainer = make_trainer(2, callbacks=[SampleGrid(num_samples=7, num_steps=3, seed=5)])
        trainer.fit(module, datamodule=make_data())
        for weights, network in (("raw", module.network), ("ema", module.network_ema)):
            labels = torch.arange(6) % 3  # a row of the grid has each class once
            images = sample(network.eval(), labels, (1, 4, 4), seed=5, num_steps=3)
            pixels = np.array(Image.open(f"samples/{weights}_0000002.png"))[..., 0]
            assert pixels.shape == (2 * 34 + 2, 3 * 34 + 2)  # each value 8 pixels wide, frames of 2
            for i, image in enumerate(images):
                top, left = 2 + 34 * (i // 3), 2 + 34 * (i % 3)
                shown = torch.from_numpy(pixels[top : top + 32, left : left + 32].copy()).double()
                expected = (
                    ((image[0].double().clamp(-1, 1) + 1) * 127.5).repeat_interleave(8, 0).repeat_interleave(8, 1)
                )
                assert (shown - expected).abs().max() <= 1

    @pytest.mark.parametrize(("side", "enlarged"), [(8, 32), (14, 42), (28, 56), (32, 32), (33, 33)])
    def test_small_images_are_enlarged(self, side, enlarged, tmp_path):
        save_grid(torch.zeros(6, 3, side, side), tmp_path / "new/grid.png", columns=3)
        assert Image.open(tmp_path / "new/grid.png").size == (3 * (enlarged + 2) + 2, 2 * (enlarged + 2) + 2)

    def test_guided_grids_lie_beside_the_others(self, make_module, make_data, make_trainer):
        module = make_module(ema_decay=0.9)
        grid = SampleGrid(
            num_samples=3, num_steps=4, solver="midpoint", guidance_scale=3.0, guidance_interval=(0.2, 0.8)
        )
        make_trainer(2, callbacks=[grid]).fit(module, datamodule=make_data())
        assert steps_of() == [f"{name}_0000002.png" for name in ("ema", "ema_guided", "raw", "raw_guided")]
        said = json.loads(Path("samples/raw_guided_0000002.json").read_text())
        assert (said["guidance_scale"], said["guidance_interval"], said["solver"]) == (3.0, [0.2, 0.8], "midpoint")
        assert (said["labels"], said["num_steps"], said["columns"]) == ([0, 1, 2], 4, 3)
        assert json.loads(Path("samples/raw_0000002.json").read_text())["guidance_scale"] == 1.0
        guidance = Guidance(3.0, (0.2, 0.8))
        images = sample(module.network.eval(), torch.arange(3), (1, 4, 4), 0, 4, solver=midpoint, guidance=guidance)
        shown = np.array(Image.open("samples/raw_guided_0000002.png"))[2:34:8, 2:34:8, 0]
        assert np.abs(shown - ((images[0, 0].double().clamp(-1, 1) + 1) * 127.5).numpy()).max() <= 1

    def test_same_noise_each_time(self, make_module, make_data, make_trainer):
        module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.0), ema_decay=0.0)
        make_trainer(4, callbacks=[SampleGrid(2, num_samples=3, num_steps=2)]).fit(module, datamodule=make_data())
        assert steps_of() == ["raw_0000002.png", "raw_0000004.png"]
        assert Path("samples/raw_0000002.png").read_bytes() == Path("samples/raw_0000004.png").read_bytes()

    @pytest.mark.parametrize(("every", "expected"), [(0, [5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
    def test_at_intervals_and_at_the_end(self, make_module, make_data, make_trainer, every, expected):
        grid = SampleGrid(every, num_samples=3, num_steps=1)
        trainer = make_trainer(5, callbacks=[grid], accumulate_grad_batches=2)
        trainer.fit(make_module(ema_decay=0.0), datamodule=make_data())
        assert steps_of() == [f"raw_{step:07d}.png" for step in expected]

    def test_of_no_samples_none_are_drawn(self, make_module, make_data, make_trainer):
        module = make_module()
        evaluations = []
        for callbacks in ([], [SampleGrid(1, num_samples=0, num_predictions=0)]):
            with count_evaluations(module.network_ema) as of_ema, count_evaluations(module.network) as of_raw:
                make_trainer(2, callbacks=[OracleMonitor(1, 1), *callbacks]).fit(module, datamodule=make_data())
            evaluations.append((len(of_raw), len(of_ema)))
        assert evaluations[0] == evaluations[1]
        assert not Path("samples").exists()

    def test_a_network_that_never_saw_a_label_is_asked_without(
        self, make_module, make_network, make_data, make_trainer
    ):
        module = make_module(make_network(num_classes=0), label_dropout=1.0, ema_decay=0.0)
        trainer = make_trainer(1, callbacks=[SampleGrid(num_samples=3, num_steps=1)])
        trainer.fit(module, datamodule=make_data())
        assert steps_of() == ["raw_0000001.png"]

    def test_without_classes_the_grid_has_eight_columns(self, make_module, make_network, make_data, make_trainer):
        data = make_data()
        data.setup()
        data.num_classes = 0
        module = make_module(make_network(num_classes=0), label_dropout=1.0, ema_decay=0.0)
        make_trainer(1, callbacks=[SampleGrid(num_samples=16, num_steps=1)]).fit(module, datamodule=data)
        assert Image.open("samples/raw_0000001.png").size == (8 * 34 + 2, 2 * 34 + 2)

    def test_data_of_unknown_shape_is_refused_before_training(self, make_module, make_data, make_trainer):
        with pytest.raises(ValueError, match=r"`shape` \(C, H, W\) and `num_classes`"):
            make_trainer(1, callbacks=[SampleGrid()]).fit(make_module(), make_data().train_dataloader())

    @pytest.mark.parametrize(
        "arguments", [{"every_n_steps": -1}, {"num_samples": -1}, {"num_steps": 0}, {"num_predictions": -2}]
    )
    def test_arguments_outside_their_range_raise(self, arguments):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SampleGrid(**arguments)

    def test_solver_and_guidance_that_cannot_be(self):
        with pytest.raises(ValueError, match="no solver 'rk4'"):
            SampleGrid(solver="rk4")
        with pytest.raises(ValueError, match="guidance interval"):
            SampleGrid(guidance_interval=(0.9, 0.1))

    @pytest.mark.parametrize(
        ("dropout", "message"),
        [(0.0, "label_dropout=0 the null class is never trained"), (1.0, "no label is ever seen")],
    )
    def test_guidance_without_labels_or_null_class_is_refused_before_training(
        self, make_module, make_data, make_trainer, dropout, message
    ):
        module = make_module(label_dropout=dropout)
        trainer = make_trainer(1, callbacks=[SampleGrid(guidance_scale=2.5)])
        with pytest.raises(ValueError, match=f"guidance_scale=2.5 .*{message}.* label_dropout to 0.1, or guidance_s"):
            trainer.fit(module, datamodule=make_data())
        assert trainer.global_step == 0

    def test_guidance_on_data_without_labels_is_refused(self, make_module, make_data):
        data = make_data()
        data.setup()
        data.num_classes = 0
        with pytest.raises(ValueError, match="guidance_scale=3 .* the data has none: set guidance_scale to 1"):
            SampleGrid(guidance_scale=3.0).check(make_module(), data)
        SampleGrid().check(make_module(), data)

    def test_a_module_without_network_is_refused(self, make_data):
        with pytest.raises(ValueError, match="`network`, and LightningModule has none"):
            SampleGrid().check(L.LightningModule(), make_data())


class TestPredictions:
    @pytest.fixture
    def figures(self, monkeypatch) -> list[tuple]:
        """What each strip was made of."""
        caught: list[tuple] = []
        make = plots.prediction_strips
        monkeypatch.setattr(plots, "prediction_strips", lambda *args: caught.append(args) or make(*args))
        return caught

    @pytest.mark.usefixtures("real_figures")
    def test_both_weights_of_that_step_beside_the_oracle(self, make_module, make_data, make_trainer, figures, read_csv):
        module = make_module(ema_decay=0.9)
        monitor = OracleMonitor(1, 1)
        grid = SampleGrid(2, num_samples=0, num_predictions=3)
        make_trainer(4, callbacks=[monitor, grid]).fit(module, datamodule=make_data())
        assert steps_of() == ["predictions_0000002.png", "predictions_0000004.png"]
        assert Image.open("samples/predictions_0000004.png").size[0] > 400
        table = read_csv("samples/predictions_0000004.csv")
        assert list(table) == ["draw", "label", "t", "distance_raw", "distance_EMA"]
        assert set(table["draw"]) == set(range(max(map(int, table["draw"])) + 1))
        assert all(distance > 0 for distance in table["distance_raw"])
        first, last = figures
        x_t, mean, predicted, distance, x1, labels, t, title, boundary = last
        assert boundary == monitor.profile.boundary
        assert boundary in t
        assert "step 4" in title
        for early, late in ((first[0], x_t), (first[1], mean), (first[4], x1)):  # asked the same each time
            assert np.array_equal(early, late)
        assert not np.allclose(first[2]["raw"], predicted["raw"])
        names = {"raw": module.network, "EMA": module.network_ema}
        assert list(predicted) == list(names)
        for name, network in names.items():
            for draw in range(3):
                label = torch.tensor([int(labels[draw].removeprefix("class "))])
                for column, time in enumerate(t):
                    x = torch.from_numpy(x_t[draw, column])[None, None]
                    with torch.no_grad():
                        v = network.eval()(x, torch.tensor([time]), label)
                    expected = (x.double() + (1 - time) * v.double())[0, 0].numpy()  # on the linear path
                    np.testing.assert_allclose(predicted[name][draw, column], expected, atol=1e-5)
                    far = np.sqrt(np.square(expected - mean[draw, column]).mean())
                    assert distance[name][draw, column] == pytest.approx(far, abs=1e-5)

    def test_without_a_monitor_there_is_no_strip(self, make_module, make_data, make_trainer, figures):
        make_trainer(1, callbacks=[SampleGrid(num_samples=3, num_steps=1)]).fit(make_module(), datamodule=make_data())
        assert not figures
        assert steps_of() == ["ema_0000001.png", "raw_0000001.png"]

    def test_before_the_stages_are_known_there_is_no_strip(self, make_module, make_data, make_trainer, figures):
        callbacks = [SampleGrid(1, num_samples=0), OracleMonitor(1, 1)]  # which comes after, and knows them at step 2
        make_trainer(2, callbacks=callbacks).fit(make_module(), datamodule=make_data())
        assert ["step 2" in arguments[7] for arguments in figures] == [True]

    def test_labels_are_none_where_the_network_sees_none(self, make_module, make_data, make_trainer, figures):
        callbacks = [OracleMonitor(1, 1), SampleGrid(num_samples=0)]
        make_trainer(1, callbacks=callbacks).fit(make_module(label_dropout=1.0), datamodule=make_data())
        assert figures[0][5] == ["no label"] * 4

    @pytest.mark.usefixtures("real_figures")
    def test_wandb_gets_each_picture_at_its_step(self, make_module, make_data, make_trainer, monkeypatch):
        logged = []
        monkeypatch.setattr(
            WandbLogger, "log_image", lambda self, key, images, step: logged.append((key, images, step))
        )
        monkeypatch.setattr(WandbLogger, "log_metrics", lambda *args, **kwargs: None)
        monkeypatch.setattr(WandbLogger, "log_table", lambda *args, **kwargs: None)
        grid = SampleGrid(1, num_samples=3, num_steps=2, guidance_scale=2.0)
        trainer = make_trainer(2, callbacks=[OracleMonitor(9, 9), grid], logger=WandbLogger(offline=True))
        trainer.fit(make_module(), datamodule=make_data())
        names = ["raw", "raw_guided", "ema", "ema_guided", "predictions"]
        ours = [entry for entry in logged if entry[0].startswith("samples/")]
        assert [(key, step) for key, _, step in ours] == [(f"samples/{n}", step) for step in (1, 2) for n in names]
        for key, (path,), step in ours:
            assert Path(path).name == f"{key.removeprefix('samples/')}_{step:07d}.png"
            assert Path(path).read_bytes().startswith(b"\x89PNG")


class TestTrainingIsLeftAlone:
    def test_bit_for_bit(self, make_module, make_data, make_trainer):
        states = []
        for pictures in ([], [SampleGrid(1, num_samples=3, num_steps=2, guidance_scale=3.0, num_predictions=2)]):
            torch.manual_seed(0)
            module = make_module()
            make_trainer(3, callbacks=[OracleMonitor(1, 1), *pictures]).fit(module, datamodule=make_data())
            assert module.network.training
            assert not module.network_ema.training
            states.append([*module.state_dict().values(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_each_part_keeps_its_mode(self, make_network):
        first, second = make_network(), make_network().eval()
        first.blocks.eval()
        modes = [part.training for network in (first, second) for part in network.modules()]
        assert len(set(modes)) == 2
        with evaluating(first, second):
            assert not any(part.training for network in (first, second) for part in network.modules())
        assert [part.training for network in (first, second) for part in network.modules()] == modes
