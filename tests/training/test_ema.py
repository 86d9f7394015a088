"""The averaged twin: its formula, its ramp, and that nothing trains it."""

import math

import pytest
import torch
from torch import nn

from fm_stages.training.ema import frozen_twin, ramped_decay, update_twin


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class TestTwin:
    def test_average_by_its_formula_in_float64(self):
        source, generator = network(), torch.Generator().manual_seed(1)
        twin = frozen_twin(source)
        expected = [p.detach().double().clone() for p in source.parameters()]
        for decay in (0.0, 0.5, 0.9, 0.99, 1.0):
            with torch.no_grad():
                for p in source.parameters():
                    p.add_(torch.randn(p.shape, generator=generator))
            update_twin(twin, source, decay)
            expected = [
                decay * e + (1 - decay) * p.detach().double()
                for e, p in zip(expected, source.parameters(), strict=True)
            ]
            for e, kept in zip(expected, twin.parameters(), strict=True):
                assert (e - kept.double()).abs().max() < 2e-6

    def test_buffers_are_copied_and_not_averaged(self):
        source = network().train()
        twin = frozen_twin(source)
        source(torch.randn(8, 3) + 5)
        assert not torch.equal(twin[1].running_mean, source[1].running_mean)
        update_twin(twin, source, 0.9)
        assert torch.equal(twin[1].running_mean, source[1].running_mean)
        assert torch.equal(twin[1].running_var, source[1].running_var)
        assert int(twin[1].num_batches_tracked) == 1  # an averaged counter would stay 0

    def test_starts_equal_shares_nothing_and_takes_no_gradient(self):
        source = network()
        twin = frozen_twin(source)
        for p, kept in zip(source.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, kept)
            assert p.data_ptr() != kept.data_ptr()
            assert p.requires_grad
            assert not kept.requires_grad
        assert not twin.training
        assert source.training

    def test_update_leaves_the_source_and_its_gradients_alone(self):
        source = network()
        twin = frozen_twin(source)
        source(torch.randn(8, 3)).sum().backward()
        before = [(p.detach().clone(), p.grad.clone()) for p in source.parameters()]
        update_twin(twin, source, 0.5)
        for (weight, grad), p in zip(before, source.parameters(), strict=True):
            assert torch.equal(p, weight)
            assert torch.equal(p.grad, grad)


class TestRamp:
    def test_rises_to_the_decay_and_stays(self):
        decays = [ramped_decay(0.999, step) for step in range(20_000)]
        assert decays == sorted(decays)
        assert decays[0] == pytest.approx(0.1)
        assert decays[90] == pytest.approx(0.91)
        assert decays[-1] == 0.999
        assert max(decays) == 0.999

    def test_forgets_the_random_start(self):
        """What is left of the first weights after 1000 steps: a fixed 0.9999 would keep 90 % of them."""
        left = math.prod(ramped_decay(0.9999, step) for step in range(1, 1001))
        assert left < 1e-9
        assert 0.9999**1000 > 0.9


class TestInTraining:
    def test_follows_the_ramp_step_by_step(self, make_module, make_data, make_trainer, recorder):
        module = make_module(ema_decay=0.3)
        start = [p.detach().double().clone() for p in module.network.parameters()]
        weights = []

        class Keep(type(recorder)):
            def on_train_batch_end(self, trainer, pl_module, *args) -> None:
                weights.append([p.detach().double().clone() for p in pl_module.network.parameters()])

        make_trainer(5, callbacks=[Keep()]).fit(module, datamodule=make_data())
        for decay, current in zip([1 / 10, 2 / 11, 3 / 12, 0.3, 0.3], weights, strict=True):
            start = [decay * e + (1 - decay) * p for e, p in zip(start, current, strict=True)]
        for expected, kept in zip(start, module.network_ema.parameters(), strict=True):
            assert (expected - kept.double()).abs().max() < 1e-6

    def test_moves_once_per_optimizer_step(self, make_module, make_data, make_trainer, monkeypatch):
        from fm_stages.training import module as module_file

        steps = []
        monkeypatch.setattr(module_file, "update_twin", lambda *args: steps.append(args))
        make_trainer(3, accumulate_grad_batches=2).fit(make_module(), datamodule=make_data())
        assert len(steps) == 3

    def test_no_optimizer_holds_the_twin(self, make_module, make_data, make_trainer):
        module = make_module()
        trainer = make_trainer(2)
        trainer.fit(module, datamodule=make_data())
        held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in module.network.parameters() if p.requires_grad}
        assert all(p.grad is None for p in module.network_ema.parameters())
        assert not module.network_ema.training

    def test_without_decay_there_is_none(self, make_module, make_data, make_trainer):
        module = make_module(ema_decay=0.0)
        trainer = make_trainer(2, limit_val_batches=None, val_check_interval=2, check_val_every_n_epoch=None)
        trainer.fit(module, datamodule=make_data())
        assert module.network_ema is None
        assert "val/loss" in trainer.callback_metrics
        assert "val/loss_ema" not in trainer.callback_metrics
