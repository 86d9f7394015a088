"""A training set of distributions, drawn anew at every step: the monitor and the oracle target beside it."""

import pytest
import torch

from fm_stages.oracle import GaussianMixtureBank, MixtureOracle
from fm_stages.training import OracleMonitor, OracleTarget

STD = 0.3


@pytest.fixture
def moments(make_data):
    """The patterns, each with noise of its own in every batch."""
    data = make_data()
    data.setup()
    x1, labels = data._ready().train.rows(torch.arange(data.num_train))
    bank = GaussianMixtureBank(x1, torch.full_like(x1, STD), labels)
    generator = torch.Generator().manual_seed(1)

    def draw_anew(batch, dataloader_idx):
        if "index" in batch:
            batch["x1"] = bank.draw(batch["index"], generator)
        return batch

    data.bank, data.on_after_batch_transfer = lambda: bank, draw_anew
    return data


def test_is_monitored_and_trained_on_the_oracle(moments, make_module, make_trainer):
    monitor = OracleMonitor(every_n_steps=1, window=150)
    module = make_module(target=OracleTarget(), label_dropout=0.2)
    make_trainer(max_steps=150, callbacks=[monitor]).fit(module, datamodule=moments)
    assert isinstance(monitor.oracle, MixtureOracle)
    assert isinstance(module.target.oracle, MixtureOracle)
    train = monitor.train
    # even when the row is known, x_1 is not: x_1 and x_0 given x_t vary together, by STD^2 / (a^2 STD^2 + s^2)
    late = [i for i, edge in enumerate(train.edges[:-1]) if edge > 0.9]
    assert late
    for i in late:
        t = torch.linspace(train.edges[i], train.edges[i + 1], 1000)
        expected = STD**2 / (t**2 * STD**2 + (1 - t) ** 2)
        assert expected.min() * 0.98 < train.mean["floor"][i] < expected.max() * 1.02
    assert abs(train.z_score("identity")) < 5
