"""The DiT's modern parts against formulas of their own, and what saves memory and time, which must change no number."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fm_stages.networks import DiT, DiT_XL
from tests.networks import dit_formulas

# every dimension differs from every other, so that no two axes can be swapped unseen
SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, BATCH = 6, 2, 3, 40, 2, 5, 7, 4
LIGHTNING = {"rms_norm": True, "swiglu": True, "rotary": True}
PARTS = ("qk_norm", "rms_norm", "swiglu", "rotary")


def small_dit(**options) -> DiT:
    """Random weights of a scale that keeps activations near one."""
    network = DiT(SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator)
            parameter.data /= math.sqrt(max(parameter[0].numel(), 16))
            if "norm" in name and name.endswith("weight"):
                parameter.data += 1
    return network


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=generator)
    return x, torch.tensor([0.0, 0.13, 0.71, 1.0]), torch.tensor([2, -1, 0, CLASSES - 1])


@pytest.mark.parametrize("chosen", list(itertools.product([False, True], repeat=len(PARTS))))
def test_each_part_is_its_formula(inputs, chosen):
    options = dict(zip(PARTS, chosen, strict=True))
    network = small_dit(**options)
    expected = dit_formulas.velocity(network.state_dict(), *inputs, num_heads=HEADS, rotary=options["rotary"])
    plain = dit_formulas.velocity(small_dit().state_dict(), *inputs, num_heads=HEADS)
    assert any(chosen) == ((expected - plain).abs().max().item() > 0.1)
    torch.testing.assert_close(network(*inputs).double(), expected, rtol=0, atol=1e-5)


def test_scaled_time(inputs):
    x, _, y = inputs
    t = torch.tensor([0.0, 0.125, 0.5, 0.75])
    network = small_dit(time_scale=1000)
    expected = dit_formulas.velocity(network.state_dict(), x, t, y, num_heads=HEADS, time_scale=1000)
    torch.testing.assert_close(network(x, t, y).double(), expected, rtol=0, atol=1e-4)  # float32 knows 750 rad to 6e-5
    near = [network.t_embedder(torch.tensor([0.3, 0.301])).diff(dim=0).norm() for network in (small_dit(), network)]
    assert near[1] > 20 * near[0]


def test_the_layout_of_lightning_dit_xl_1():
    with torch.device("meta"):
        network = DiT_XL(input_size=16, patch_size=1, in_channels=32, num_classes=1000, **LIGHTNING)
    assert sum(parameter.numel() for parameter in network.parameters()) == 675_256_736
    state = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    expected = {
        "feat_rope.freqs_cos": (256, 72),
        "feat_rope.freqs_sin": (256, 72),
        "final_layer.norm_final.weight": (1152,),
        "blocks.27.norm1.weight": (1152,),
        "blocks.27.norm2.weight": (1152,),
        "blocks.27.mlp.w12.weight": (6144, 1152),
        "blocks.27.mlp.w12.bias": (6144,),
        "blocks.27.mlp.w3.weight": (1152, 3072),
        "blocks.27.mlp.w3.bias": (1152,),
    }
    assert state.items() >= expected.items()
    with torch.device("meta"):
        plain = DiT_XL(input_size=16, patch_size=1, in_channels=32, num_classes=1000)
    new = {key for key in state if key not in plain.state_dict()}
    assert new == {key.replace("27", str(i)) for key in expected for i in range(28)}


@pytest.mark.parametrize(("width", "expected"), [(768, 2048), (1024, 2730), (1152, 3072), (1536, 4096), (1792, 4778)])
def test_widths_of_published_gated_mlps(width, expected):
    with torch.device("meta"):
        network = DiT(2, 1, 1, width, 1, 16, 1, swiglu=True)
    assert network.blocks[0].mlp.w3.in_features == expected


def test_qk_norm_bounds_the_logits(inputs, monkeypatch):
    largest = []
    fused = nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **kwargs):
        largest.append((q @ k.transpose(2, 3)).abs().max().item() / math.sqrt(q.shape[3]))
        return fused(q, k, v, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    for qk_norm in (False, True):
        network = small_dit(qk_norm=qk_norm, rms_norm=True)
        with torch.no_grad():
            for block in network.blocks:
                block.attn.qkv.weight *= 100
                if qk_norm:
                    block.attn.q_norm.weight.fill_(1)
                    block.attn.k_norm.weight.fill_(1)
        network(*inputs)
    assert min(largest[:DEPTH]) > 1000
    assert max(largest[DEPTH:]) <= math.sqrt(HIDDEN / HEADS) + 1e-5


def test_weights_with_all_parts_can_be_drawn_after_the_meta_device(inputs):
    with torch.device("meta"):
        network = DiT(SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, qk_norm=True, **LIGHTNING)
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.fill_(math.nan)
    network.init_weights()
    fresh = DiT(SIDE, PATCH, CHANNELS, HIDDEN, DEPTH, HEADS, CLASSES, qk_norm=True, **LIGHTNING)
    for name, value in fresh.named_buffers():
        assert torch.equal(network.get_buffer(name), value)
    assert torch.equal(network.blocks[0].attn.q_norm.weight, torch.ones(HIDDEN // HEADS))
    assert torch.equal(network(*inputs), torch.zeros_like(inputs[0]))


def test_mixed_precision_keeps_the_norms_in_float32(inputs, recwarn):
    network = small_dit(qk_norm=True, **LIGHTNING)
    expected = network(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = network(*inputs)
        heads = torch.randn(1000, HIDDEN // HEADS, generator=torch.Generator().manual_seed(2)).bfloat16()
        normal = network.blocks[0].attn.q_norm(heads)
    exact = dit_formulas.norm({"q.weight": network.blocks[0].attn.q_norm.weight.double()}, "q", heads.double())
    assert torch.equal(normal, exact.bfloat16()) or (normal.double() - exact).abs().max() < 2**-8 * exact.abs().max()
    assert 0 < (prediction - expected).std() < 0.03 * expected.std()
    assert not [w for w in recwarn if "dtype" in str(w.message)]


def gradients(network: DiT, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    prediction = network(*inputs)
    prediction.square().mean().backward()
    return prediction, {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def test_checkpointing_changes_no_bit_and_computes_blocks_again(inputs):
    plain, sparing = small_dit(), small_dit(activation_checkpointing=True)
    calls = []
    for block in sparing.blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    (expected, grads), (prediction, again) = gradients(plain, inputs), gradients(sparing, inputs)
    assert torch.equal(prediction, expected)
    assert all(torch.equal(grads[name], again[name]) for name in grads)
    assert len(calls) == 2 * DEPTH
    with torch.no_grad():
        sparing(*inputs)
    assert len(calls) == 3 * DEPTH  # without gradients nothing is computed twice


def test_checkpointing_keeps_less(inputs):
    def kept(network: DiT) -> int:
        """Bytes that the graph of one forward pass holds for the backward pass, weights not counted."""
        weights = {p.data_ptr() for p in network.parameters()}
        tensors = {}

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in weights:
                tensors[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            prediction = network(*inputs)
        del prediction
        return sum(tensors.values())

    assert kept(small_dit(activation_checkpointing=True)) < 0.3 * kept(small_dit())


@pytest.fixture
def compiled_frames(monkeypatch):
    """Compile without a compiler, and count how often dynamo reads a piece of code."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: make(function, backend=backend, **options))
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("sparing", [False, True])
def test_compiled_blocks_share_code_and_keep_names(inputs, compiled_frames, sparing):
    plain = small_dit(**LIGHTNING)
    network = small_dit(compile_blocks=True, activation_checkpointing=sparing, **LIGHTNING)
    assert list(network.state_dict()) == list(plain.state_dict())
    (expected, grads), (prediction, again) = gradients(plain, inputs), gradients(network, inputs)
    assert len(compiled_frames) == 1  # for all blocks
    torch.testing.assert_close(prediction, expected)
    for name in grads:
        torch.testing.assert_close(again[name], grads[name])


def test_a_copy_of_compiled_blocks_is_compiled(inputs, compiled_frames):
    network = small_dit(compile_blocks=True)
    with torch.no_grad():
        expected = network(*inputs)
    twin = copy.deepcopy(network).requires_grad_(False).eval()
    assert all(block._compiled_call_impl is not None for block in twin.blocks)
    with torch.no_grad():
        torch.testing.assert_close(twin(*inputs), expected)
    assert copy.deepcopy(small_dit()).blocks[0]._compiled_call_impl is None
