"""UNet against diffusers' own model with the same weights, and what it shares with every velocity network."""

import copy
import inspect
import math
import subprocess
import sys

import jsonargparse
import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from fm_stages.networks import DiT, UNet

SIDE, CHANNELS, CLASSES, BATCH = 12, 3, 7, 4
WIDTHS = (16, 24, 32)


def small_unet(fresh: bool = False, **changes) -> UNet:
    sizes = {
        "input_size": SIDE,
        "in_channels": CHANNELS,
        "num_classes": CLASSES,
        "channels": WIDTHS,
        "layers_per_block": 1,
        "attention_levels": (1,),
        "head_size": 8,
        "norm_groups": 4,
    }
    torch.manual_seed(0)
    network = UNet(**(sizes | changes))
    if not fresh:  # a fresh network would only show its zeros
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return network


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0.0, 0.13, 0.71, 1.0]), torch.tensor([2, -1, 0, CLASSES - 1])


def test_forward_is_diffusers_model_at_a_thousand_t(inputs):
    x, t, _ = inputs
    network = small_unet().double()
    theirs = UNet2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=CLASSES + 1,
    ).double()
    weights = {key.removeprefix("unet."): value for key, value in network.state_dict().items()}
    weights["class_embedding.weight"] = weights.pop("y_embedder.embedding_table.weight")
    theirs.load_state_dict(weights)
    rows = torch.tensor([2, CLASSES, 0, CLASSES - 1])  # -1 is the null class, the last row
    expected = theirs(x.double(), 1000 * t, class_labels=rows).sample
    velocity = network(x.double(), t, inputs[2])
    assert expected.std() > 0.1
    assert velocity.shape == x.shape
    torch.testing.assert_close(velocity, expected, rtol=0, atol=1e-10)


def test_a_new_network_returns_zero_velocity(inputs):
    assert torch.equal(small_unet(fresh=True)(*inputs), torch.zeros_like(inputs[0]))


def test_weights_can_be_drawn_after_the_meta_device(inputs):
    with torch.device("meta"):
        network = small_unet(fresh=True)
        assert network(*(value.to("meta") for value in inputs)).shape == inputs[0].shape
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.data.fill_(math.nan)
    network.init_weights()
    assert not any(parameter.isnan().any() for parameter in network.parameters())
    assert torch.equal(network(*inputs), torch.zeros_like(inputs[0]))


def test_label_minus_one_is_the_null_class(inputs):
    x, t, _ = inputs
    network = small_unet()
    velocity = network(x, t, torch.full((BATCH,), -1))
    assert torch.equal(network(x, t), velocity)
    for label in range(CLASSES):
        assert not torch.allclose(network(x, t, torch.full((BATCH,), label)), velocity, atol=1e-4)
    with torch.no_grad():
        network.y_embedder.embedding_table.weight[:CLASSES] = math.nan
    assert torch.equal(network(x, t), velocity)
    for label in (-2, CLASSES):
        with pytest.raises(ValueError, match=rf"label {label} is outside \[-1, {CLASSES}\)"):
            network(x, t, torch.full((BATCH,), label))


def test_an_unconditional_network_has_the_null_row_only(inputs):
    x, t, _ = inputs
    network = small_unet(num_classes=0)
    assert network.state_dict()["y_embedder.embedding_table.weight"].shape == (1, 4 * WIDTHS[0])
    assert torch.equal(network(x, t), network(x, t, torch.full((BATCH,), -1)))


def test_every_weight_is_trained(inputs):
    network = small_unet()
    network(*inputs).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_is_where_it_was_asked_for():
    network = small_unet(attention_levels=(0, 2))
    assert [hasattr(block, "attentions") for block in network.unet.down_blocks] == [True, False, True]
    assert [hasattr(block, "attentions") for block in network.unet.up_blocks] == [True, False, True]
    heads = [m.heads for name, m in network.named_modules() if name.endswith("attentions.0")]
    assert sorted(heads) == [2, 2, 4, 4, 4]  # channels over head_size: 16 twice, 32 twice, and 32 at the lowest level


@pytest.mark.parametrize(("input_size", "widths"), [(28, (8, 8, 8)), (1, (8,)), (32, (8, 8, 8, 8, 8, 8)), (6, (8, 16))])
def test_takes_any_square_input_that_halves(input_size, widths):
    network = small_unet(input_size=input_size, channels=widths, attention_levels=())
    for batch in (1, 2):
        x = torch.ones(batch, CHANNELS, input_size, input_size)
        assert network(x, torch.zeros(batch)).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_size": 28, "channels": (8, 8, 8, 8)},
            r"input_size=28 cannot be halved 3 times for 4 levels: give channels for 3 at most, or .* to 32",
        ),
        ({"input_size": 7}, r"input_size=7 .* channels for 1 at most, or pad or resize the data to 8"),
        ({"channels": ()}, "channels is empty"),
        ({"channels": (16, 18, 32)}, "channels has 18, not a multiple of norm_groups=4"),
        ({"attention_levels": (3,)}, "attention_levels has 3: with 3 channels there are 0 to 2"),
        ({"attention_levels": (-1,)}, "attention_levels has -1"),
        ({"head_size": 16}, "attention over 24 channels cannot have heads of head_size=16"),
        ({"head_size": 12}, "attention over 32 channels"),  # the lowest level always has attention
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"num_classes": -1}, "num_classes=-1 is negative"),
        ({"layers_per_block": 0, "in_channels": 0}, "sizes of a UNet must be 1 or more, got in_channels=0, layers_per"),
    ],
)
def test_wrong_sizes_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        small_unet(**changes)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (BATCH, CHANNELS, 8, 8), r"x has shape \(4, 3, 8, 8\), this network takes \(batch, 3, 12, 12\)"),
        ("t", (), r"t has shape \(\)"),
        ("y", (1,), r"y has shape \(1,\)"),
    ],
)
def test_wrong_inputs_raise(inputs, name, shape, message):
    given = dict(zip(("x", "t", "y"), inputs, strict=True))
    given[name] = torch.zeros(shape, dtype=given[name].dtype)
    with pytest.raises(ValueError, match=message):
        small_unet()(**given)


def gradients(network: nn.Module, inputs) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    prediction = network(*inputs)
    prediction.square().mean().backward()
    return prediction, {n: p.grad.clone() for n, p in network.named_parameters()}


def test_checkpointing_changes_no_bit_and_computes_blocks_again(inputs):
    plain, sparing = small_unet(), small_unet(activation_checkpointing=True)
    sparing = copy.deepcopy(sparing)  # as the average of the weights is made
    calls = []
    for block in (*sparing.unet.down_blocks, sparing.unet.mid_block, *sparing.unet.up_blocks):
        for resnet in block.resnets:
            resnet.conv1.register_forward_hook(lambda *_: calls.append(1))
    (expected, grads), (prediction, again) = gradients(plain, inputs), gradients(sparing, inputs)
    assert torch.equal(prediction, expected)
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    num_blocks = 3 + 2 + 6
    assert len(calls) == 2 * num_blocks - 1  # the first of the lowest level is kept
    with torch.no_grad():
        sparing(*inputs)
    assert len(calls) == 3 * num_blocks - 1


@pytest.mark.parametrize("sparing", [False, True])
def test_compiled_blocks_keep_names_and_numbers(inputs, monkeypatch, sparing):
    torch._dynamo.reset()
    make, graphs = torch.compile, []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: make(function, backend=backend, **options))
    plain, network = small_unet(), small_unet(compile_blocks=True, activation_checkpointing=sparing)
    assert list(network.state_dict()) == list(plain.state_dict())
    (expected, grads), (prediction, again) = gradients(plain, inputs), gradients(network, inputs)
    assert len(graphs) >= 7  # three levels twice, and what is between
    torch.testing.assert_close(prediction, expected)
    for name in grads:
        torch.testing.assert_close(again[name], grads[name], rtol=1e-4, atol=1e-5)
    num_graphs = len(graphs)
    network(*inputs)
    assert len(graphs) == num_graphs  # nothing is compiled again
    twin = copy.deepcopy(network)
    assert all(block._compiled_call_impl is not None for block in twin.unet.down_blocks)
    torch._dynamo.reset()


def test_is_chosen_by_class_path_and_linked_to_the_data():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    parser.add_argument("--num_classes", type=int)
    parser.link_arguments("num_classes", "network.init_args.num_classes")
    arguments = {"input_size": SIDE, "in_channels": CHANNELS, "channels": [16, 32], "attention_levels": [0]}
    arguments |= {"head_size": 8, "norm_groups": 4}
    given = {"network": {"class_path": "fm_stages.networks.UNet", "init_args": arguments}, "num_classes": CLASSES}
    network = parser.instantiate(parser.parse_object(given)).network
    assert (network.input_size, network.in_channels, network.num_classes) == (SIDE, CHANNELS, CLASSES)
    arguments["channel"] = [16]
    with pytest.raises(jsonargparse.ArgumentError, match="channel"):
        parser.parse_object(given)


def test_has_the_interface_of_the_dit():
    assert inspect.signature(UNet.forward) == inspect.signature(DiT.forward)


def test_importing_the_networks_does_not_import_diffusers():
    code = "import sys, fm_stages.networks; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
