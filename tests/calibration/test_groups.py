"""Where scales fold: found for each family, and the function kept."""

import pytest
import torch

pytest.importorskip("transformers")
from intscale_compile.calibration.groups import Norm, difference, fold_scale, norm_offset, scaling_groups  # noqa: E402
from intscale_compile.calibration.layers import blocks, record_inputs  # noqa: E402
from intscale_compile.errors import CalibrationError  # noqa: E402
from tests.support.calibration import logits_of, small_model  # noqa: E402

QKV = "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
LLAMA = {
    f"input_layernorm -> {QKV}",
    "self_attn.v_proj -> self_attn.o_proj",
    "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj",
    "mlp.up_proj -> mlp.down_proj",
}
GROUPS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": {g.replace("post_attention", "pre_feedforward") for g in LLAMA},
    "mixtral": {
        f"input_layernorm -> {QKV}",
        "self_attn.v_proj -> self_attn.o_proj",
        "post_attention_layernorm -> mlp.gate, mlp.experts.gate_up_proj",
        "mlp.experts.gate_up_proj -> mlp.experts.down_proj",
    },
    # Their experts clamp gate and up: nothing scales through that.
    "gpt_oss": {
        f"input_layernorm -> {QKV}",
        "self_attn.v_proj -> self_attn.o_proj",
        "post_attention_layernorm -> mlp.router, mlp.experts.gate_up_proj",
    },
    # GELU lets no scale through, ReLU does.
    "gpt2": {"ln_1 -> attn.c_attn", "attn.c_attn -> attn.c_proj", "ln_2 -> mlp.c_fc"},
    "opt": {
        f"self_attn_layer_norm -> {QKV}",
        "self_attn.v_proj -> self_attn.out_proj",
        "final_layer_norm -> fc1",
        "fc1 -> fc2",
    },
    # Norms after the sum feed the residual as well.
    "bert": {"attention.self.value -> attention.output.dense"},
    "phi3": {
        "input_layernorm -> self_attn.qkv_proj",
        "self_attn.qkv_proj -> self_attn.o_proj",
        "post_attention_layernorm -> mlp.gate_up_proj",
        "mlp.gate_up_proj -> mlp.down_proj",
    },
    "gpt_neox": {
        "input_layernorm -> attention.query_key_value",
        "attention.query_key_value -> attention.dense",
        "post_attention_layernorm -> mlp.dense_h_to_4h",
    },
}


def groups_of(name):
    model, inputs = small_model(name)
    recorded = record_inputs(model, inputs)
    return model, inputs, {n: scaling_groups(block, recorded[n]) for n, block in blocks(model)}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_found_and_folding_keeps_the_function(name):
    model, inputs, groups = groups_of(name)
    assert all({str(group) for group in found} == GROUPS[name] for found in groups.values())
    before = logits_of(model, inputs)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    for found in groups.values():
        for group in found:
            fold_scale(group, group.tie(0.25 + 4 * torch.rand(group.channels)))
    assert difference(logits_of(model, inputs), before) < 1e-5
    for block, found in groups.items():
        for group in found:
            touched = [*group.consumers, group.previous] if not isinstance(group.previous, Norm) else group.consumers
            for weight in touched:
                name_in_model = f"{block}.{weight.qualified}"
                assert not torch.equal(kept[name_in_model], model.get_parameter(name_in_model)), name_in_model


def test_finding_groups_does_not_touch_the_model():
    model, inputs = small_model("gemma2")
    kept = {n: p.clone() for n, p in model.named_parameters()}
    recorded = record_inputs(model, inputs)
    for name, block in blocks(model):
        scaling_groups(block, recorded[name])
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_each_expert_may_have_its_own_scale():
    model, inputs, groups = groups_of("mixtral")
    before = logits_of(model, inputs)
    group = groups["model.layers.0"][-1]
    fold_scale(group, 0.5 + torch.rand(4, group.channels))
    assert difference(logits_of(model, inputs), before) < 1e-5


def test_gemma_norms_multiply_by_one_plus_weight():
    _, _, groups = groups_of("gemma2")
    offsets = {g.previous.offset for found in groups.values() for g in found if isinstance(g.previous, Norm)}
    assert offsets == {1.0}
    _, _, groups = groups_of("llama")
    assert {g.previous.offset for g in groups["model.layers.0"] if isinstance(g.previous, Norm)} == {0.0}


def test_a_module_that_is_no_norm_has_no_offset():
    class Shift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((8,), 3.0), requires_grad=False)

        def forward(self, x):
            return x + self.weight

    module = Shift()
    assert norm_offset(module, torch.randn(2, 8)) is None
    assert bool((module.weight == 3.0).all())


def test_grouped_heads_are_tied():
    _, _, groups = groups_of("llama")
    group = next(g for g in groups["model.layers.0"] if g.previous.name == "self_attn.v_proj")
    scale = group.tie(torch.rand(group.channels) + 0.5)
    heads = scale.view(2, 2, 32)  # 2 heads of keys and values, 2 heads of queries each
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert not torch.equal(heads[0], heads[1])


def test_scales_that_cannot_be_folded_are_refused():
    model, _, groups = groups_of("llama")
    norm, value = groups["model.layers.0"][:2]
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(CalibrationError, match="shape"):
        fold_scale(norm, torch.ones(3))
    with pytest.raises(CalibrationError, match="positive"):
        fold_scale(norm, torch.zeros(norm.channels))
    with pytest.raises(CalibrationError, match="positive"):
        fold_scale(norm, torch.full((norm.channels,), float("nan")))
    with pytest.raises(CalibrationError, match="tie"):
        fold_scale(value, torch.rand(value.channels) + 0.5)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
