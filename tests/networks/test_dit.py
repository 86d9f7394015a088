"""DiT against an independent writing of its formulas, and against the layout of SiT's published checkpoints."""

import math

import pytest
import torch
from torch import Tensor, nn

from fm_stages.networks import DiT, DiT_B, DiT_L, DiT_S, DiT_XL
from tests.networks import dit_formulas

# every dimension differs from every other, so that no two axes can be swapped unseen
SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, BATCH = 6, 2, 3, 40, 2, 5, 7, 4


def small_dit(**changes) -> DiT:
    sizes = {
        "input_size": SIDE,
        "patch_size": PATCH,
        "in_channels": CHANNELS,
        "hidden_size": HIDDEN,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }
    return DiT(**(sizes | changes))


def randomize(network: nn.Module) -> nn.Module:
    """Random weights of a scale that keeps activations near one; a fresh network would only show its zeros."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel()
            parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(max(fan_in, 16))
    return network


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0.0, 0.13, 0.71, 1.0]), torch.tensor([2, -1, 0, CLASSES - 1])


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_forward_is_the_published_formula(inputs, learn_sigma):
    network = randomize(small_dit(learn_sigma=learn_sigma))
    expected = dit_formulas.velocity(network.state_dict(), *inputs, num_heads=HEADS)
    assert expected.shape[1] == CHANNELS * (2 if learn_sigma else 1)
    assert expected.std() > 0.3  # the comparison below is about numbers of this size
    velocity = network(*inputs)
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity.double(), expected[:, :CHANNELS], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("constructor", "num_elements"),
    [(DiT_S, 32_963_360), (DiT_B, 130_512_416), (DiT_L, 458_102_816), (DiT_XL, 675_129_632)],
)
def test_published_sizes(constructor, num_elements):
    with torch.device("meta"):
        network = constructor(input_size=32, patch_size=2, in_channels=4, num_classes=1000, learn_sigma=True)
    assert sum(value.numel() for value in network.state_dict().values()) == num_elements


@pytest.mark.parametrize(("learn_sigma", "patch_values"), [(True, 32), (False, 16)])
def test_keys_and_shapes_are_those_of_the_published_checkpoint(learn_sigma, patch_values):
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (patch_values, 1152),
        "final_layer.linear.bias": (patch_values,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    linears = {
        "attn.qkv": (3456, 1152),
        "attn.proj": (1152, 1152),
        "mlp.fc1": (4608, 1152),
        "mlp.fc2": (1152, 4608),
        "adaLN_modulation.1": (6912, 1152),
    }
    for i in range(28):
        for name, shape in linears.items():
            expected[f"blocks.{i}.{name}.weight"] = shape
            expected[f"blocks.{i}.{name}.bias"] = shape[:1]
    assert len(expected) == 292
    with torch.device("meta"):
        network = DiT_XL(input_size=32, patch_size=2, in_channels=4, num_classes=1000, learn_sigma=learn_sigma)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


def test_a_new_network_returns_zero_velocity(inputs):
    assert torch.equal(small_dit()(*inputs), torch.zeros_like(inputs[0]))


def test_weights_can_be_drawn_after_the_meta_device(inputs):
    with torch.device("meta"):
        network = small_dit()
        assert network(*(value.to("meta") for value in inputs)).shape == inputs[0].shape
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        parameter.data.fill_(math.nan)
    network.init_weights()
    assert torch.equal(network.pos_embed, small_dit().pos_embed)
    assert torch.equal(network(*inputs), torch.zeros_like(inputs[0]))
    patches = network.x_embedder.proj.weight
    bound = math.sqrt(6 / (HIDDEN + patches[0].numel()))  # Xavier on the flat (D, C * p * p) matrix
    assert 0.9 * bound < patches.abs().max() <= bound
    for weight in (network.t_embedder.mlp[0].weight, network.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_label_minus_one_is_the_last_row(inputs):
    x, t, _ = inputs
    network = randomize(small_dit())
    null = torch.full((BATCH,), -1)
    velocity = network(x, t, null)
    assert torch.equal(network(x, t), velocity)
    for label in range(CLASSES):
        assert not torch.allclose(network(x, t, torch.full((BATCH,), label)), velocity, atol=1e-3)
    with torch.no_grad():
        network.y_embedder.embedding_table.weight[:CLASSES] = math.nan
    assert torch.equal(network(x, t, null), velocity)


def test_an_unconditional_network_has_the_null_row_only(inputs):
    x, t, _ = inputs
    network = randomize(small_dit(num_classes=0))
    assert network.state_dict()["y_embedder.embedding_table.weight"].shape == (1, HIDDEN)
    assert torch.equal(network(x, t), network(x, t, torch.full((BATCH,), -1)))
    with pytest.raises(ValueError, match=r"label 0 is outside \[-1, 0\)"):
        network(x, t, torch.zeros(BATCH, dtype=torch.int64))


@pytest.mark.parametrize("label", [-2, CLASSES, CLASSES + 1])
def test_a_wrong_label_raises(inputs, monkeypatch, label):
    x, t, y = inputs
    network = small_dit()
    y = y.clone()
    y[2] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside \[-1, {CLASSES}\)"):
        network(x, t, y)
    # where the check is not made (GPU, compiled code) the lookup must fail: label num_classes is not the null class
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(IndexError):
        network.y_embedder(y)


def test_gradients_reach_every_trainable_parameter(inputs):
    x, t, y = inputs
    network = small_dit()
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == ["pos_embed"]
    with torch.no_grad():  # what the first steps of training do to the layers that start at zero
        for parameter in network.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    before = network.pos_embed.clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x, t, y).square().mean().backward()
    untouched = [
        name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert untouched == ["pos_embed"]
    optimizer.step()
    assert torch.equal(network.pos_embed, before)


def test_autocast_runs_and_leaves_the_time_embedding_alone(inputs):
    network = randomize(small_dit())
    expected, embedding = network(*inputs), network.t_embedder(inputs[1])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = network(*inputs)
        assert torch.equal(network.t_embedder(inputs[1]), embedding)
    assert velocity.dtype == torch.bfloat16
    assert 0 < (velocity - expected).std() < 0.03 * expected.std()
    velocity.float().square().mean().backward()


def test_compiles_into_one_graph(inputs):
    network, compiled = randomize(small_dit()), randomize(small_dit())
    compiled.compile(backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), network(*inputs))
    assert list(compiled.state_dict()) == list(network.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits_for_the_gpu(inputs):
    network = randomize(small_dit())
    expected = network(*inputs)
    network.cuda()
    on_gpu = [value.cuda() for value in inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        velocity = network(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(velocity.cpu(), expected, rtol=0, atol=1e-2)  # TF32 may be on


def test_attention_is_fused(inputs, monkeypatch):
    calls = []
    fused = nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    small_dit()(*inputs)
    assert len(calls) == DEPTH


@pytest.mark.parametrize(("input_size", "patch_size", "in_channels"), [(1, 1, 1), (28, 4, 1), (5, 5, 8)])
def test_takes_any_square_input(input_size, patch_size, in_channels):
    network = randomize(small_dit(input_size=input_size, patch_size=patch_size, in_channels=in_channels))
    for batch in (0, 1, 2):
        x = torch.ones(batch, in_channels, input_size, input_size)
        assert network(x, torch.zeros(batch)).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 7}, "input_size=7 is not a multiple of patch_size=2"),
        ({"hidden_size": 44}, "hidden_size=44 must be a multiple of num_heads=5"),
        ({"hidden_size": 30}, "hidden_size=30 must be .* and of 4 .*: 20 and its multiples"),
        (
            {"rotary": True, "hidden_size": 60, "num_heads": 6},
            "hidden_size=60 over num_heads=6 must be a multiple of 4",
        ),
        ({"time_scale": 0.0}, "time_scale=0.0 must be positive"),
        ({"num_classes": -1}, "num_classes=-1 is negative: pass 0"),
    ],
)
def test_wrong_sizes_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        small_dit(**changes)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (BATCH, CHANNELS, 8, 8), r"x has shape \(4, 3, 8, 8\), this network takes \(batch, 3, 6, 6\)"),
        ("x", (BATCH, 1, SIDE, SIDE), r"x has shape \(4, 1, 6, 6\)"),
        ("x", (CHANNELS, SIDE, SIDE), r"x has shape \(3, 6, 6\)"),
        ("t", (BATCH, 1), r"t has shape \(4, 1\).* 4 samples, shape \(4,\)"),
        ("t", (), r"t has shape \(\)"),
        ("y", (1,), r"y has shape \(1,\)"),
    ],
)
def test_wrong_inputs_raise(inputs, name, shape, message):
    x, t, y = inputs
    given = {"x": x, "t": t, "y": y}
    given[name] = torch.zeros(shape, dtype=given[name].dtype)
    with pytest.raises(ValueError, match=message):
        small_dit()(**given)


@pytest.mark.parametrize(
    ("class_path", "arguments"),
    [
        ("fm_stages.networks.DiT", {"hidden_size": HIDDEN, "depth": 1, "num_heads": HEADS}),
        ("fm_stages.networks.DiT_S", {}),
    ],
)
def test_is_chosen_by_class_path_and_linked_to_the_data(class_path, arguments):
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    parser.add_argument("--num_classes", type=int)
    parser.link_arguments("num_classes", "network.init_args.num_classes")

    def parse(**more):
        arguments_given = {"input_size": SIDE, "patch_size": PATCH, "in_channels": CHANNELS} | arguments | more
        return parser.parse_object(
            {"network": {"class_path": class_path, "init_args": arguments_given}, "num_classes": CLASSES}
        )

    with torch.device("meta"):
        network = parser.instantiate(parse()).network
    assert isinstance(network, DiT)
    assert (network.input_size, network.in_channels, network.num_classes) == (SIDE, CHANNELS, CLASSES)
    with pytest.raises(jsonargparse.ArgumentError, match="patchsize"):
        parse(patchsize=PATCH)
