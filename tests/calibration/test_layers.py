"""The structure of models, found by running them."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from intscale_compile import IntScaleConfig, IntScaleTensor  # noqa: E402
from intscale_compile.calibration.layers import (  # noqa: E402
    blocks,
    linears,
    observe_inputs,
    record_inputs,
    run_block,
    stacks,
    stages,
    weights_of,
)
from intscale_compile.errors import CalibrationError  # noqa: E402
from tests.support.calibration import logits_of, small_model  # noqa: E402

ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
STAGES = {
    "llama": [*ATTENTION, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
    "mixtral": [*ATTENTION, ["mlp.gate", "mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]],
    "gpt_oss": [*ATTENTION, ["mlp.router", "mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]],
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "phi": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"],
    ],
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"], ["intermediate.dense"], ["output.dense"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_found_in_order_of_dataflow(name):
    model, inputs = small_model(name)
    recorded = record_inputs(model, inputs)
    block_name, block = blocks(model)[-1]
    found = stages(block, recorded[block_name])
    assert [[weight.name for weight in stage] for stage in found] == STAGES[name]


def test_routers_are_marked_and_are_no_linears():
    model, inputs = small_model("mixtral")
    name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[name]
    routers = [weight.name for stage in stages(block, recorded) for weight in stage if weight.router]
    assert routers == ["mlp.gate"]
    assert "mlp.gate" not in linears(block, recorded)
    assert list(linears(block, recorded))[-2:] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_an_encoder_decoder_has_two_stacks_and_cross_attention_its_own_stage():
    model, inputs = small_model("t5")
    assert [[name for name, _ in stack] for stack in stacks(model)] == [
        ["encoder.block.0"],
        ["decoder.block.0", "decoder.block.1"],
    ]
    recorded = record_inputs(model, inputs)
    found = [[w.name for w in stage] for stage in stages(model.decoder.block[1], recorded["decoder.block.1"])]
    assert ["layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"] in found
    assert ["layer.1.EncDecAttention.q"] in found


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "whisper"])
def test_a_block_runs_again_on_what_was_recorded(name):
    model, inputs = small_model(name)
    kept = []
    block_name, block = blocks(model)[0]
    block.register_forward_hook(lambda module, args, result: kept.append(result))
    recorded = record_inputs(model, inputs)
    with torch.no_grad():
        again = run_block(block, recorded[block_name])
    first = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]
    assert torch.equal(again, first)


def test_recording_leaves_the_cache_setting_and_the_hooks_as_they_were():
    model, inputs = small_model("mixtral")
    model.config.use_cache = True
    model.config._experts_implementation = "grouped_mm"
    name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)
    stages(block, recorded[name])
    assert model.config.use_cache is True
    assert model.config._experts_implementation == "grouped_mm"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in block.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_observed_inputs_give_the_outputs_of_the_layer(name):
    model, inputs = small_model(name)
    block_name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[block_name]
    weight = list(linears(block, recorded).values())[-1]
    seen, made = [], []
    weight.module.register_forward_hook(lambda module, args, result: made.append(result))
    with torch.no_grad(), observe_inputs(block, [weight], lambda n, e, x: seen.append((n, e, x))):
        run_block(block, recorded)
    ((found, expert, x),) = seen
    assert (found, expert) == (weight.name, None)
    product = x.double() @ weight.weight.double().mT
    if weight.bias is not None:
        product += weight.bias
    torch.testing.assert_close(product.view(made[0].shape).float(), made[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_is_observed_with_its_own_tokens(name):
    model, inputs = small_model(name)
    block_name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[block_name]
    stack = weights_of(block)["mlp.experts.gate_up_proj"]
    chosen, seen = [], {}
    router = next(w for w in weights_of(block).values() if w.router).module
    router.register_forward_hook(lambda module, args, result: chosen.append(result))
    with torch.no_grad(), observe_inputs(block, [stack], lambda n, e, x: seen.update({e: len(x)})):
        run_block(block, recorded)
    index = next(part for part in chosen[0] if part.dtype == torch.int64)
    counts = torch.bincount(index.flatten(), minlength=4)
    assert seen == {expert: int(count) for expert, count in enumerate(counts) if count}
    assert sum(seen.values()) == 2 * inputs["input_ids"].numel()


def test_writing_to_a_weight_changes_the_model():
    model, inputs = small_model("gpt2")
    before = logits_of(model, inputs)
    weights_of(blocks(model)[0][1])["mlp.c_proj"].weight[:, 3] = 5.0
    assert bool((model.transformer.h[0].mlp.c_proj.weight[3] == 5.0).all())
    assert not torch.equal(logits_of(model, inputs), before)


def test_stages_of_a_half_quantized_block():
    model, inputs = small_model("llama")
    block_name, block = blocks(model)[0]
    recorded = record_inputs(model, inputs)[block_name]
    block = copy.deepcopy(block)
    tensor = IntScaleTensor.from_hp(block.self_attn.q_proj.weight, IntScaleConfig())
    block.self_attn.q_proj.weight = nn.Parameter(tensor, requires_grad=False)
    seen = []
    with torch.no_grad(), observe_inputs(block, weights_of(block).values(), lambda n, e, x: seen.append(n)):
        run_block(block, recorded)
    assert "self_attn.q_proj" not in seen and "self_attn.k_proj" in seen


def test_a_model_without_repeated_layers_is_refused():
    with pytest.raises(CalibrationError, match="no nn.ModuleList"):
        stacks(nn.Sequential(nn.Linear(4, 4)))
