"""The parts of the vLLM plugin that need no vLLM: checkpoints, rows that loaders bring, products, refusals."""

from __future__ import annotations

import sys
import traceback
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from intscale_compile import IntScaleConfig, IntScaleTensor, save_safetensors
from intscale_compile.errors import CheckpointError, ConfigError, ShardingError, VersionError
from intscale_compile.integrations import vllm as plugin
from intscale_compile.integrations.vllm import checkpoints
from intscale_compile.integrations.vllm.checkpoints import ExpertNames, header_of_each, kind_of, stored_weights
from intscale_compile.integrations.vllm.selection import left_alone
from intscale_compile.integrations.vllm.weights import Rows, cut, grouped_product, hold, joined, product
from intscale_compile.tensors.experts import grouped_linear
from intscale_compile.tensors.linear import linear

CPU = torch.device("cpu")
OURS = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntScaleConfig", "_data": {}}}}


def weight(n=64, k=256, seed=0, **config):
    generator = torch.Generator().manual_seed(seed)
    return IntScaleTensor.from_hp(torch.randn(n, k, generator=generator), IntScaleConfig(**config))


def x(rows=5, k=256):
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(9))


def test_the_entry_point_names_the_plugin():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert f'intscale = "{plugin.__name__}:{plugin.register.__name__}"' in text


# --- rows --------------------------------------------------------------------------------------------------------------


def served(rows, n, bias=None, given=None):
    layer = nn.Module()
    forms = hold(layer, joined(rows, n, "layer"), CPU)
    return forms, product(layer, forms, x() if given is None else given, bias)


def test_rows_come_in_any_order_and_are_joined_to_the_bit():
    parts = [weight(64, seed=0), weight(32, seed=1), weight(32, seed=2)]
    bias = torch.arange(128.0)
    rows = [Rows(96, parts[2]), Rows(0, parts[0]), Rows(64, parts[1])]
    forms, y = served(rows, 128, bias)
    assert len(forms) == 1 and forms[0].out_features == 128
    expected = torch.cat([linear(x(), part, b) for part, b in zip(parts, bias.split([64, 32, 32]))], dim=-1)
    assert torch.equal(y, expected)


FORMS = {
    "group 32": lambda: weight(group_size=32),
    "group 64": lambda: weight(group_size=64),
    "group 256": lambda: weight(group_size=256),
    "per channel": lambda: weight(group_size=-1),
    "8-bit scales": lambda: weight(scale_bits=8),
    "W8A8": lambda: weight(group_size=-1, weight_bits=8),
    "static": lambda: weight().with_activation_scale(0.03),
    "rotated": lambda: weight().with_rotation(128),
    "ordered": lambda: weight().with_input_order(torch.arange(255, -1, -1)),
    "zero points": lambda: IntScaleTensor.from_codes(
        torch.randint(-8, 8, (64, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(1)),
        torch.rand(64, 2, generator=torch.Generator().manual_seed(2)) + 0.1,
        group_size=128,
        zero_point=torch.randint(-3, 4, (64, 2), generator=torch.Generator().manual_seed(3)),
        dtype=torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_bits_of_the_layer(form):
    first, second = FORMS[form](), weight(32, seed=5)
    forms, y = served([Rows(0, first), Rows(64, second)], 96)
    assert torch.equal(y, torch.cat([linear(x(), first), linear(x(), second)], dim=-1))
    alone, y = served([Rows(0, first)], 64)
    assert torch.equal(y, linear(x(), first)) and len(alone) == 1


def test_plain_rows_beside_quantized_ones_stay_plain():
    plain = torch.randn(32, 256)
    forms, y = served([Rows(0, weight()), Rows(64, plain)], 96)
    assert [bool(form.parts) for form in forms] == [True, False]
    assert torch.equal(y, torch.cat([linear(x(), weight()), nn.functional.linear(x(), plain)], dim=-1))


def test_an_output_does_not_depend_on_the_batch():
    batch = x(33)
    _, together = served([Rows(0, weight())], 64, given=batch)
    alone = torch.cat([served([Rows(0, weight())], 64, given=row)[1] for row in batch.split([1, 7, 25])])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([Rows(0, weight())], r"\[\(0, 64\)\]"),
        ([], "none"),
        ([Rows(0, weight()), Rows(0, weight())], r"\[\(0, 64\), \(0, 64\)\]"),
        ([Rows(64, weight())], r"\[\(64, 128\)\]"),
    ],
    ids=["missing", "nothing", "twice", "the first missing"],
)
def test_rows_that_are_missing_or_doubled_are_refused(rows, said):
    with pytest.raises(
        CheckpointError, match=f"model.qkv: 128 output rows are needed, loaded were {said}.*--load-format"
    ):
        joined(rows, 128, "model.qkv")


# --- ranks -------------------------------------------------------------------------------------------------------------


def test_ranks_hold_parts_of_the_whole_weight():
    whole = weight(64, 512)
    given = x(3, 512)
    rows = torch.cat([linear(given, cut(whole, 0, 32 * r, 32, "layer", 2)) for r in (0, 1)], dim=-1)
    assert torch.equal(rows, linear(given, whole))
    halves = [cut(whole, 1, 256 * r, 256, "layer", 2) for r in (0, 1)]
    dense = torch.cat([half.dequantize() for half in halves], dim=-1)
    assert torch.equal(dense, whole.dequantize())


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "fp8"},
        {"quant_method": "gptq", "bits": 8, "group_size": 128},
        {"quant_method": "awq", "bits": 3, "group_size": 128},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"a": {"targets": ["Linear"], "weights": {"type": "float"}}},
        },
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"]}}},
        {"quant_method": "compressed-tensors", "config_groups": []},
    ],
)
def test_formats_that_cannot_be_served_are_refused_in_one_line_with_the_mend(config):
    with pytest.raises(ConfigError, match="original model") as caught:
        kind_of(config)
    assert "\n" not in str(caught.value)


def test_a_group_is_never_cut():
    with pytest.raises(
        ShardingError, match=r"model.down: tensor parallelism over 4 ranks cuts its 256 .* --tensor-parallel-size"
    ):
        cut(weight(64, 256), 1, 64, 64, "model.down", 4)
    with pytest.raises(ShardingError) as caught:
        cut(weight(64, 256), 1, 64, 64, "model.down", 4)
    shown = "".join(traceback.format_exception(caught.value))  # what vLLM logs: one error, and no other mend
    assert shown.count("Error: ") == 1 and "dequantize" not in shown and "\n" not in str(caught.value)
    with pytest.raises(ShardingError, match="scattered .an input order."):
        cut(FORMS["ordered"](), 1, 0, 128, "model.down", 2)
    with pytest.raises(ShardingError, match="through blocks of its rotation=256: use a smaller"):
        cut(weight(64, 256).with_rotation(256), 1, 0, 128, "model.down", 2)
    with pytest.raises(CheckpointError, match="has 64 output rows where vLLM reads 64 to 128"):
        cut(weight(), 0, 64, 64, "model.up", 2)


def test_a_part_does_not_keep_the_whole():
    layer = nn.Module()
    hold(layer, [cut(weight(128), 0, 64, 64, "layer", 2)], CPU)
    assert layer.intscale0_qdata.untyped_storage().nbytes() == 64 * 128


def test_experts():
    stack = torch.stack([weight(64, seed=seed) for seed in range(3)])
    layer, offsets = nn.Module(), torch.tensor([2, 2, 5])
    (form,) = hold(layer, [stack], CPU, "up")
    assert torch.equal(grouped_product(layer, form, x(), offsets), grouped_linear(x(), stack, offsets))
    order = torch.tensor([4, 3, 2, 1, 0])
    expected = grouped_linear(x(), stack, offsets, None, order, order)
    assert torch.equal(grouped_product(layer, form, x(), offsets, order, order), expected)


def test_a_matrix_is_a_stack_of_one():
    one = weight().unsqueeze(0)
    assert one.shape == (1, 64, 256) and torch.equal(one.unbind()[0].dequantize(), weight().dequantize())


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_kinds_of_checkpoints():
    assert kind_of(None) == kind_of({}) == checkpoints.PLAIN
    assert kind_of(OURS) == checkpoints.OURS
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    assert kind_of(gptq) == checkpoints.IMPORTED
    with pytest.raises(ConfigError, match="GPTQ with bits=8"):
        kind_of({**gptq, "bits": 8})
    with pytest.raises(ConfigError, match="cannot take over a checkpoint with quant_method='fp8'"):
        kind_of({"quant_method": "fp8"})


def saved(folder, **weights):
    model = nn.Module()
    for name, tensor in weights.items():
        owner = model
        *path, leaf = name.split("__")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    folder.mkdir(exist_ok=True)
    save_safetensors(model, folder / "model.safetensors")
    return folder


def test_a_folder_of_ours_is_read_as_it_was_written(tmp_path):
    stack = torch.stack([weight(seed=seed) for seed in range(2)])
    folder = saved(
        tmp_path / "m", norm__weight=torch.ones(4), a__q_proj__weight=weight(), mlp__experts__gate_up_proj=stack
    )
    found = dict(stored_weights(folder, OURS, torch.bfloat16, ExpertNames("w1", "w3", "w2")))
    assert sorted(found) == ["a.q_proj.weight", "mlp.experts.w13", "norm.weight"]
    assert found["a.q_proj.weight"].dtype == torch.bfloat16 and torch.equal(found["norm.weight"], torch.ones(4))
    assert torch.equal(found["a.q_proj.weight"].qdata, weight().qdata)
    assert torch.equal(found["mlp.experts.w13"].qdata, stack.qdata)
    assert checkpoints.quantized_names(folder, OURS) == ["a.q_proj", "mlp.experts"]
    with pytest.raises(ConfigError, match="for which this model has no place"):
        dict(stored_weights(folder, OURS, torch.bfloat16, None))


def test_a_shared_weight_is_there_under_all_its_names(tmp_path):
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(256, 64))
    model[0].weight = model[1].weight = nn.Parameter(weight(), requires_grad=False)
    save_safetensors(model, tmp_path / "model.safetensors")
    found = dict(stored_weights(tmp_path, OURS, torch.float32))
    assert sorted(found) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert torch.equal(found["0.weight"].qdata, found["1.weight"].qdata)


def test_what_no_layer_takes_is_refused_by_name(tmp_path):
    folder = saved(tmp_path / "m", lm_head__weight=weight())
    with pytest.raises(ConfigError, match="lm_head is quantized, which vLLM's output embeddings cannot load"):
        dict(stored_weights(folder, OURS, torch.float32))
    folder = saved(tmp_path / "n", c_attn__weight=weight().t())
    with pytest.raises(ConfigError, match="c_attn.weight is stored transposed"):
        dict(stored_weights(folder, OURS, torch.float32))


def test_headers_are_found_under_the_names_that_transformers_stores():
    keys = [
        f"layers.{n}.moe.experts._down_proj_{part}" for n in (0, 1) for part in ("qdata", "scale", "per_tensor_scale")
    ]
    headers = ["layers.0.mlp.experts.down_proj", "layers.1.mlp.experts.down_proj"]
    found = list(header_of_each(keys, headers, "file"))
    assert [(name, header, len(parts)) for name, header, parts in found] == [
        ("layers.0.moe.experts.down_proj", headers[0], 3),
        ("layers.1.moe.experts.down_proj", headers[1], 3),
    ]
    with pytest.raises(CheckpointError, match="layers.1.moe.experts.down_proj: 0 headers fit it"):
        list(header_of_each(keys, headers[:1], "file"))
    with pytest.raises(CheckpointError, match="layers.0.moe.experts.down_proj: 2 headers fit it"):
        list(header_of_each(keys, [*headers, "layers.0.other.experts.down_proj"], "file"))


def test_what_compiled_models_are_kept_under_follows_the_files_and_our_sources(tmp_path, monkeypatch):
    folder = saved(tmp_path / "m", q_proj__weight=weight())
    before = checkpoints.compiled_for(folder)
    assert checkpoints.compiled_for(folder) == before != checkpoints.compiled_for(None)
    saved(folder, q_proj__weight=weight().with_activation_scale(0.05))  # the same config.json, another product
    after = checkpoints.compiled_for(folder)
    assert after != before
    monkeypatch.setattr(checkpoints, "KERNEL_ABI", checkpoints.KERNEL_ABI + 1)
    assert checkpoints.compiled_for(folder) != after


@pytest.mark.parametrize(
    "prefix, left",
    [
        ("model.layers.0.mlp.gate", True),
        ("model.layers.0.mlp.gate_up_proj", False),
        ("model.layers.0.block_sparse_moe.experts", False),
        ("lm_head", True),
        ("model.layers.1.self_attn.o_proj", False),
        ("visual.blocks.1.proj", True),
    ],
)
def test_which_layers_of_a_plain_model_are_quantized(prefix, left):
    assert left_alone(prefix, 64, 64, ignore=("visual",)) is left
    assert left_alone(prefix, 8, 64)


# --- versions ----------------------------------------------------------------------------------------------------------


class _Config:
    __abstractmethods__ = frozenset({"get_name"})


def test_under_another_vllm_only_what_asks_for_intscale_fails(monkeypatch):
    registered = {}
    module = types.ModuleType("vllm")
    module.__version__ = "0.99.1"
    layers = types.ModuleType("vllm.model_executor.layers.quantization")
    layers.register_quantization_config = lambda name: lambda cls: registered.setdefault(name, cls)
    base = types.ModuleType("vllm.model_executor.layers.quantization.base_config")
    base.QuantizationConfig = _Config
    for name, found in {"vllm": module, layers.__name__: layers, base.__name__: base}.items():
        monkeypatch.setitem(sys.modules, name, found)
    plugin.register()
    refused = registered["intscale"]
    said = r"intscale runs under vllm>=0.32,<0.33, found 0.99.1: pip install 'vllm>=0.32,<0.33'"
    for call in (
        lambda: refused.from_config({}),
        lambda: refused(),
        lambda: refused.override_quantization_method(OURS, None),
        lambda: refused.override_quantization_method({"quant_method": "gptq"}, "intscale"),
    ):
        with pytest.raises(VersionError, match=said):
            call()
    assert refused.override_quantization_method({"quant_method": "gptq"}, None) is None
    layers.register_quantization_config = None
    del layers.register_quantization_config
    plugin.register()  # nothing is there to register with: said in the log, vLLM starts
