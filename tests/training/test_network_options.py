"""Networks that compute activations again or whose blocks are compiled train as others do, and share checkpoints."""

import pytest
import torch

from fm_stages.networks import DiT, UNet
from fm_stages.training import Checkpoints, network_weights, read_checkpoint


def small_network(kind: type, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind is DiT:
        network = DiT(4, 2, 1, 16, 2, 2, 3, **options)
    else:
        sizes = {"channels": (8, 16), "layers_per_block": 1, "head_size": 8, "norm_groups": 4}
        network = UNet(4, 1, 3, **sizes, **options)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture
def _no_compiler(monkeypatch):
    """Dynamo reads the code as for torch.compile, and then runs it as it is."""
    torch._dynamo.reset()
    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: make(function, backend="eager", **options))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("kind", [DiT, UNet])
@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile_blocks": True}])
def test_runs_and_their_checkpoints_are_the_same(make_module, make_data, make_trainer, kind, options):
    def run(folder, network, max_steps=2, ckpt_path=None):
        callback = Checkpoints(monitor=None, every_n_train_steps=2)
        keep = {"enable_checkpointing": True, "default_root_dir": folder, "limit_val_batches": 1}
        trainer = make_trainer(max_steps, callbacks=[callback], **keep)
        trainer.fit(make_module(network), datamodule=make_data(), ckpt_path=ckpt_path)
        return read_checkpoint(f"{folder}/checkpoints/last.ckpt")

    plain = run("plain", small_network(kind))
    other = run("other", small_network(kind, **options))
    assert list(plain["state_dict"]) == list(other["state_dict"])
    assert not [key for key in other["state_dict"] if "_orig_mod" in key or "checkpoint" in key]
    for ema in (False, True):
        weights, expected = network_weights(other, ema), network_weights(plain, ema)
        assert weights is not None
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    longer = run("longer", small_network(kind), max_steps=4, ckpt_path="other/checkpoints/last.ckpt")
    assert longer["global_step"] == 4
