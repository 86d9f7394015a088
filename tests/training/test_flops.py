"""A step's arithmetic, against the products of a linear network counted by hand."""

import lightning as L
import pytest
import torch
from torch import nn

from fm_stages.networks import DiT
from fm_stages.training.flops import step_flops

B = 6
X, T = torch.randn(B, 1, 8, 8), torch.rand(B)


class Linear(nn.Module):
    """Two products, 64 -> 32 -> 64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))

    def forward(self, x, t, y):
        return self.layers(x.flatten(1)).reshape(x.shape)


class NeedsData(Linear):
    def forward(self, x, t, y):
        return super().forward(x, t, y) * float(t.sum())


def module(network) -> L.LightningModule:
    owner = L.LightningModule()
    owner.network = network
    return owner


def test_counts_forward_and_twice_as_much_backward():
    assert step_flops(module(Linear()), X, T, None) == 3 * 2 * 2 * B * 64 * 32


def test_grows_with_the_batch():
    network = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    whole = step_flops(module(network), X, T, labels)
    assert whole > 0
    assert step_flops(module(network), X[:3], T[:3], labels[:3]) == whole // 2


def test_leaves_the_network_as_it_is():
    network = Linear()
    before = {name: x.clone() for name, x in network.state_dict().items()}
    step_flops(module(network), X, T, None)
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_a_compiled_network_is_not_compiled_for_it():
    network = Linear()
    network.compile(backend="eager")
    assert step_flops(module(network), X, T, None) == 3 * 2 * 2 * B * 64 * 32


@pytest.mark.parametrize("owner", [L.LightningModule(), module(NeedsData())])
def test_unknown_where_it_cannot_be_counted(owner):
    assert step_flops(owner, X, T, None) is None
