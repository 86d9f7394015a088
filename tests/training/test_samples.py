"""Sample grids: the pixels of the files are the samples of the weights that they name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fm_stages.flow import Guidance, midpoint, sample
from fm_stages.training import SampleGrid


def steps_of(folder: str = "samples") -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir())


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

    def test_guided_grids_lie_beside_the_others(self, make_module, make_data, make_trainer):
        module = make_module(ema_decay=0.9)
        grid = SampleGrid(
            num_samples=3, num_steps=4, solver="midpoint", guidance_scale=3.0, guidance_interval=(0.2, 0.8)
        )
        make_trainer(2, callbacks=[grid]).fit(module, datamodule=make_data())
        assert steps_of() == [f"{name}_0000002.png" for name in ("ema", "ema_guided", "raw", "raw_guided")]
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

    def test_training_is_left_alone(self, make_module, make_data, make_trainer):
        states = []
        for callbacks in ([], [SampleGrid(1, num_samples=3, num_steps=1)]):
            torch.manual_seed(0)
            module = make_module()
            make_trainer(3, callbacks=callbacks).fit(module, datamodule=make_data())
            assert module.network.training
            assert not module.network_ema.training
            states.append([*module.state_dict().values(), torch.get_rng_state()])
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))

    def test_a_network_that_never_saw_a_label_is_asked_without(
        self, make_module, make_network, make_data, make_trainer
    ):
        module = make_module(make_network(num_classes=0), label_dropout=1.0, ema_decay=0.0)
        trainer = make_trainer(1, callbacks=[SampleGrid(num_samples=3, num_steps=1)])
        trainer.fit(module, datamodule=make_data())
        assert steps_of() == ["raw_0000001.png"]

    def test_data_of_unknown_shape_is_refused_before_training(self, make_module, make_data, make_trainer):
        with pytest.raises(ValueError, match=r"`shape` \(C, H, W\) and `num_classes`"):
            make_trainer(1, callbacks=[SampleGrid()]).fit(make_module(), make_data().train_dataloader())

    @pytest.mark.parametrize("arguments", [{"every_n_steps": -1}, {"num_samples": 0}, {"num_steps": 0}])
    def test_arguments_outside_their_range_raise(self, arguments):
        ((name, value),) = arguments.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SampleGrid(**arguments)

    def test_solver_and_guidance_that_cannot_be(self):
        with pytest.raises(ValueError, match="no solver 'rk4'"):
            SampleGrid(solver="rk4")
        with pytest.raises(ValueError, match="guidance interval"):
            SampleGrid(guidance_interval=(0.9, 0.1))
