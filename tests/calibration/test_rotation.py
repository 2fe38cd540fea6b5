"""Rotation keeps the function of every family that it accepts, and says why it refuses the others."""

import copy

import pytest
import torch
from torch import nn

hf = pytest.importorskip("transformers")
from torchao.quantization import quantize_  # noqa: E402

import intscale_compile  # noqa: E402
from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts  # noqa: E402
from intscale_compile.calibration import rotation, solve  # noqa: E402
from intscale_compile.calibration.groups import difference  # noqa: E402
from intscale_compile.calibration.layers import blocks  # noqa: E402
from intscale_compile.errors import CalibrationError, OverflowProofError  # noqa: E402
from intscale_compile.kernels.hadamard import hadamard_transform  # noqa: E402
from intscale_compile.tensors import input_rotation  # noqa: E402
from tests.support.benchmarks import inject_outliers  # noqa: E402
from tests.support.calibration import logits_of, small_model  # noqa: E402

# Size of the online transform of each block's linear layers; the output projection has one where heads are too narrow.
ONLINE = {
    "llama": {"mlp.down_proj": 256},
    "mistral": {"mlp.down_proj": 256},
    "qwen2": {"mlp.down_proj": 64},  # 320 = 5 * 64, biases of q, k and v, hidden size 192
    "qwen3": {"mlp.down_proj": 256},  # norms of queries and keys, tied embeddings
    "phi3": {"mlp.down_proj": 256},  # joined weights
    "gemma": {"mlp.down_proj": 256},  # scaled embeddings, norms of 1 + weight
    "mixtral": {},  # experts and routers
    "gpt_oss": {},  # biases of experts, sinks
    "gpt2": {"attn.c_proj": 32, "mlp.c_proj": 128},  # LayerNorm, position embeddings, hidden size 96, heads of 24
    "opt_plain": {"fc2": 256},
    "gpt_neox": {"mlp.dense_4h_to_h": 256},
    "falcon": {"mlp.dense_4h_to_h": 512},  # no biases
    "phi": {"mlp.fc2": 256},
}


@pytest.mark.parametrize("size, keep_ones", [(128, False), (96, False), (7, False), (96, True)])
def test_residual_rotation_is_orthogonal_flat_and_seeded(size, keep_ones):
    q = rotation.residual_rotation(size, 3, keep_ones)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(q, rotation.residual_rotation(size, 3, keep_ones))
    assert not torch.equal(q, rotation.residual_rotation(size, 4, keep_ones))
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(ones @ q, ones, atol=1e-9) == keep_ones
    if size == 128:
        torch.testing.assert_close(q.abs(), torch.full_like(q, 128**-0.5))
    if size == 96:
        assert float(q.abs().max()) < 0.5


def test_hadamard_matrix_is_that_of_the_kernel():
    x = torch.randn(3, 64)
    torch.testing.assert_close(hadamard_transform(x, 64), (x.double() @ rotation.hadamard_matrix(64)).float())


@pytest.mark.parametrize("name", ONLINE)
def test_logits_stay(name):
    model, inputs = small_model(name)
    before = logits_of(model, inputs)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    sizes = rotation.rotate(model, inputs)
    assert difference(logits_of(model, inputs), before) < 1e-5
    assert sizes == {f"{b}.{n}": size for b, _ in blocks(model) for n, size in ONLINE[name].items()}
    for n, parameter in model.named_parameters():
        if parameter.dim() > 1 and n in kept and not n.endswith("bias"):
            assert difference(parameter, kept[n]) > 0.1, f"{n} was not rotated"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outliers_disappear(name):
    model, inputs = small_model(name)
    inject_outliers(model, batch=inputs)
    largest = {}

    def watch(key):
        def hook(module, args):
            x = args[0].flatten(0, -2)
            largest[key] = float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).max())

        return hook

    layer = model.get_submodule("model.layers.0.self_attn.q_proj" if name == "llama" else "transformer.h.0.attn.c_attn")
    handle = layer.register_forward_pre_hook(watch("before"))
    logits_of(model, inputs)
    handle.remove()
    rotation.rotate(model, inputs)
    layer.register_forward_pre_hook(watch("after"))
    logits_of(model, inputs)
    assert largest["before"] > 8
    assert largest["after"] < 5


@pytest.mark.parametrize(
    "name, met",
    [
        ("gemma2", "post_attention_layernorm, post_feedforward_layernorm"),
        ("bert", "no linear output embedding"),
        ("roberta", "output.LayerNorm"),
        ("t5", "several stacks"),
        ("opt", "no norm comes right before the output embedding"),  # a projection does
    ],
)
def test_others_are_refused_untouched(name, met):
    model, inputs = small_model(name)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CalibrationError, match=met):
        rotation.rotate(model, inputs)
    assert {n for n, _ in model.named_parameters()} == set(kept)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_embeddings_are_put_back_where_something_comes_between():
    model, inputs = small_model("llama")
    table = model.model.embed_tokens
    table.register_forward_hook(lambda module, args, result: result + torch.arange(128.0))
    kept = table.weight.clone()
    with pytest.raises(CalibrationError, match="sum of embeddings"):
        rotation.rotate(model, inputs)
    assert torch.equal(table.weight, kept)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_quantized_layers_rotate_their_inputs_themselves(name):
    model, inputs = small_model(name)
    before = logits_of(model, inputs)
    sizes = rotation.rotate(model, inputs)
    quantize_(model, IntScaleConfig(), filter_fn=linears_and_experts)
    found = {n: p.rotation for n, p in model.named_parameters() if isinstance(p, IntScaleTensor) and p.rotation}
    assert found == {f"{layer}.weight": size for layer, size in sizes.items()}
    with_hooks = logits_of(model, inputs)
    assert difference(with_hooks, before) < 0.5
    for module in model.modules():
        module._forward_pre_hooks.clear()
    assert torch.equal(logits_of(model, inputs), with_hooks)


def test_the_hook_and_the_tensor_give_the_same_bits():
    model, inputs = small_model("llama")
    rotation.rotate(model, inputs)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, 256)
    tensor = IntScaleTensor.from_hp(layer.weight, IntScaleConfig())
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    with_hook = layer(x)
    layer.weight = nn.Parameter(tensor.replaced(rotation=256), requires_grad=False)
    assert torch.equal(layer(x), with_hook)


def test_without_online_transforms_there_are_no_hooks():
    model, inputs = small_model("llama")
    before = logits_of(model, inputs)
    assert rotation.rotate(model, inputs, online=False) == {}
    assert difference(logits_of(model, inputs), before) < 1e-5
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_tied_output_embedding_gets_its_own_weight_and_stays_so_when_saved(tmp_path):
    model, inputs = small_model("mixtral")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = logits_of(model, inputs)
    rotation.rotate(model, inputs)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.tie_word_embeddings is False
    assert difference(logits_of(again, inputs), before) < 1e-5


def test_a_copy_of_a_rotated_model_is_the_same_model():
    model, inputs = small_model("llama")
    rotation.rotate(model, inputs)
    assert torch.equal(logits_of(copy.deepcopy(model), inputs), logits_of(model, inputs))


def test_the_seed_decides_and_equal_seeds_give_equal_bits():
    def rotated(seed):
        torch.manual_seed(0)
        model, inputs = small_model("qwen2")
        rotation.rotate(model, inputs, seed=seed)
        return model.model.layers[0].self_attn.q_proj.weight

    assert torch.equal(rotated(1), rotated(1))
    assert not torch.equal(rotated(1), rotated(2))


def test_bfloat16_models_are_rotated_within_their_precision():
    model, inputs = small_model("llama")
    before = logits_of(model.bfloat16(), inputs)
    rotation.rotate(model, inputs)
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert difference(logits_of(model, inputs), before) < 0.05


@pytest.mark.parametrize("door", ["quantize", "calibrate"])
def test_a_dequantized_weight_reads_the_input_as_it_is(door):
    """The hook leaves with the plain weight that it was for: adapters are merged into dequantized weights."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64).requires_grad_(False)
    input_rotation.start_rotating(layer, 64)
    other = copy.deepcopy(layer)
    if door == "quantize":
        intscale_compile.quantize(layer, IntScaleConfig(group_size=32))
        assert layer.weight.rotation == 64
    else:
        tensor = IntScaleTensor.from_hp(layer.weight, IntScaleConfig(group_size=32)).replaced(rotation=64)
        solve.set_integer(layer, "weight", tensor)
    assert not layer._forward_pre_hooks and not hasattr(layer, input_rotation.ROTATION)
    x = torch.randn(4, 64)
    dense = layer.weight.dequantize()
    layer.weight = nn.Parameter(dense, requires_grad=False)
    assert torch.equal(layer(x), nn.functional.linear(x, dense, layer.bias))
    intscale_compile.quantize(layer, IntScaleConfig(group_size=32))
    assert layer.weight.rotation == 0
    assert difference(layer(x), other(x)) < 0.2
    assert other._forward_pre_hooks  # a copy keeps its own


def test_a_failed_quantization_leaves_the_hook():
    layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    input_rotation.start_rotating(layer[0], 64)
    layer[1].weight[0, 0] = 3e38
    with pytest.raises(OverflowProofError):
        intscale_compile.quantize(layer, IntScaleConfig(group_size=32, amplifier=1024))
    assert list(layer[0]._forward_pre_hooks.values()) == [input_rotation.rotate_input]
    assert layer[0]._intscale_rotation == 64
