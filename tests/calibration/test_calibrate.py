"""``calibrate`` from end to end: what is quantized, in which order, with which inputs; resuming; what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers as hf
import transformers.integrations.moe  # noqa: F401 (defines an op)
from torch import nn

from intscale_compile import CalibrationConfig, IntScaleConfig, IntScaleTensor, calibrate
from intscale_compile.calibration import pipeline, random_token_ids
from intscale_compile.calibration.capture import StackInputs, capture, statistics
from intscale_compile.calibration.layers import blocks, stacks, weights_of
from intscale_compile.calibration.pipeline import make_integer
from intscale_compile.calibration.solve import Codes, FloatScaleWeight, fake_quantize
from intscale_compile.errors import CalibrationError, CheckpointError, WeightError
from intscale_compile.tensors.selection import DECIDED, is_decided
from tests.support.calibration import SHORT, calibrated, logits_of, same_weights, small_model, tiny_llama

from_preset = CalibrationConfig.from_preset


def snr(model: nn.Module, quantized: nn.Module, data: torch.Tensor) -> float:
    wanted, found = (m(data).logits for m in (model, quantized))
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.fixture
def small() -> nn.Module:
    """One layer, where the second would be the same again."""
    return tiny_llama(1)


# --- what comes out -----------------------------------------------------------------------------------------------------


def test_gptq_beats_rounding(small, data):
    nearest, gptq = (calibrated(small, data, name) for name in ("rtn", "gptq"))
    assert snr(small, gptq, data) > snr(small, nearest, data) + 1


def test_every_linear_of_a_block_is_quantized_and_nothing_else(model, data):
    report = calibrate(model, data, "gptq", progress=False)
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    assert {name.removesuffix(".weight") for name in report.weights} == inside
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, IntScaleTensor) == (name.removesuffix(".weight") in inside), name
        assert not parameter.requires_grad
    assert list(report.losses) == ["model.layers.0", "model.layers.1"]
    assert 0 < report.losses["model.layers.0"] < report.losses["model.layers.1"] < 0.1
    assert str(report).startswith("calibration gptq:") and "model.layers.1: " in str(report)


def test_without_statistics_the_weights_are_those_of_quantize(model, data):
    from torchao.quantization import quantize_

    plain = copy.deepcopy(model)
    quantize_(plain, IntScaleConfig())
    found = calibrated(model, data, CalibrationConfig(**SHORT))
    assert torch.equal(found(data).logits, plain(data).logits) or snr(plain, found, data) > 100
    for name, parameter in plain.named_parameters():
        if isinstance(parameter, IntScaleTensor):
            assert torch.equal(parameter.codes, found.get_parameter(name).codes), name


def test_same_call_same_bits(small, data):
    assert same_weights(*(calibrated(small, data, from_preset("gptq", tuning_steps=2)) for _ in range(2)))


def test_the_kind_of_data_does_not_matter(small, data):
    chosen = from_preset("gptq")
    whole = calibrated(small, data, chosen)
    kinds = ([data], [{"input_ids": data, "attention_mask": torch.ones_like(data)}])
    for kind in kinds:
        assert same_weights(whole, calibrated(small, kind, chosen))
    assert snr(whole, calibrated(small, list(data), chosen), data) > 20  # the same sums in another order


def test_overrides_and_formats(small, data):
    wide = {"down_proj": IntScaleConfig(weight_bits=8, group_size=-1)}
    found = calibrated(small, data, from_preset("gptq", group_size=32, overrides=wide))
    layer = found.model.layers[0]
    assert layer.mlp.down_proj.weight.weight_bits == 8 and layer.mlp.up_proj.weight.group_size == 32
    assert snr(small, found, data) > snr(small, calibrated(small, data, from_preset("gptq", group_size=32)), data)


@pytest.mark.parametrize("changes", [{"scale_bits": 8}, {"amplifier": 1024}], ids=str)
def test_wide_scales_keep_the_codes_of_float_scales(small, data, changes):
    floating = calibrated(small, data, from_preset("gptq", group_size=32, scales="float"))
    found = calibrated(small, data, from_preset("gptq", group_size=32, **changes))
    converted = make_integer(copy.deepcopy(floating), **changes)
    assert same_weights(found, converted)
    for name, parameter in floating.named_parameters():
        if isinstance(parameter, FloatScaleWeight):
            assert torch.equal(found.get_parameter(name).codes, parameter.source.codes), name
    assert snr(floating, found, data) > 25


def test_float_scales_quantize_activations_too(small, data):
    found = calibrated(small, data, from_preset("rtn", scales="float"))
    linear = found.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    wanted = fake_quantize(x) @ linear.weight.source.dequantize().mT
    torch.testing.assert_close(linear(x), wanted)
    assert not torch.equal(linear(x), x @ linear.weight.source.dequantize().mT)


@pytest.mark.parametrize("form", ["grouped_mm", "bmm", "weight @ column", "one expert"])
def test_float_scales_of_experts_quantize_activations_too(form):
    """Every form in which transformers multiplies with a stack; what comes out is no weight, and is quantized when it goes on."""
    codes = torch.randint(-8, 8, (3, 6, 64), dtype=torch.int8)
    stack = FloatScaleWeight.of(
        Codes(codes, torch.rand(3, 6, 2) + 0.5, IntScaleConfig(group_size=32), torch.float32), False
    )
    dense, x = stack.source.dequantize(), torch.randn(3, 4, 64)
    wanted = fake_quantize(x) @ dense.mT
    if form == "grouped_mm":
        offsets = torch.tensor([4, 8, 12], dtype=torch.int32)
        found = torch.ops.transformers.grouped_mm_fallback(x.view(12, 64), stack.mT, offs=offsets).view(3, 4, 6)
        if hasattr(torch.nn.functional, "grouped_mm"):
            torch.testing.assert_close(
                torch.nn.functional.grouped_mm(x.view(12, 64), stack.mT, offs=offsets).view(3, 4, 6), found
            )
    elif form == "bmm":
        found = torch.bmm(x, stack.transpose(1, 2))
    elif form == "weight @ column":
        rows = stack[torch.tensor([0, 2])]
        found, wanted = torch.bmm(rows, x[[0, 2], 0].unsqueeze(-1)).squeeze(-1), wanted[[0, 2], 0]
    else:
        found, wanted = torch.nn.functional.linear(x[1], stack[1]), wanted[1]
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, wanted)
    assert type(stack * 2.0) is type(stack.sum()) is torch.Tensor and isinstance(stack[0].mT, FloatScaleWeight)


def test_a_product_that_float_scales_cannot_follow():
    codes = Codes(torch.zeros(6, 64, dtype=torch.int8), torch.ones(6, 2), IntScaleConfig(group_size=32), torch.float32)
    weight = FloatScaleWeight.of(codes, False)
    with pytest.raises(CalibrationError, match="linear of a quantized weight with operands by name"):
        torch.nn.functional.linear(input=torch.ones(2, 64), weight=weight)
    with pytest.raises(CalibrationError, match="another weight"):
        weight @ weight.mT


def test_tuning_lowers_the_error_and_leaves_codes_alone(small, data):
    plain, tuned = (copy.deepcopy(small) for _ in range(2))
    before = calibrate(plain, data, from_preset("rtn", group_size=-1), progress=False).losses
    after = calibrate(tuned, data, from_preset("rtn", group_size=-1, tuning_steps=60), progress=False).losses
    assert after["model.layers.0"] < 0.95 * before["model.layers.0"]
    layers = plain.model.layers[0].self_attn.q_proj, tuned.model.layers[0].self_attn.q_proj
    assert torch.equal(layers[0].weight.codes, layers[1].weight.codes)
    assert not torch.equal(layers[0].weight.row_scale, layers[1].weight.row_scale)


def test_matching_the_original_helps(model, data):
    losses = []
    for match in (False, True):
        report = calibrate(copy.deepcopy(model), data, from_preset("gptq", match_original=match), progress=False)
        losses.append(report.losses["model.layers.1"])
    assert losses[1] < losses[0]


@pytest.mark.parametrize("preset", ["fptq", "fptq-paper", "llama3"])
def test_presets_that_change_the_model_first(small, data, preset):
    found = calibrated(small, data, preset)
    assert snr(small, found, data) > snr(small, calibrated(small, data, "rtn"), data) - 1.5
    layer = found.model.layers[0]
    if preset.startswith("fptq"):
        assert layer.self_attn.q_proj.weight.activation_scale is not None
    else:
        assert layer.mlp.down_proj.weight.rotation > 0 and layer.mlp.down_proj.weight.weight_bits == 8


def test_random_token_ids(model):
    ids = random_token_ids(model, 3, 5, seed=1)
    assert ids.shape == (3, 5) and torch.equal(ids, random_token_ids(model, 3, 5, seed=1))
    many = random_token_ids(model, 64, 512)
    assert int(many.min()) == 0 and int(many.max()) == model.config.vocab_size - 1
    with pytest.raises(CalibrationError, match="Linear has no vocabulary to draw from"):
        random_token_ids(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "opt_plain", "gemma", "gpt2", "bert"])
def test_other_families(family):
    model, inputs = small_model(family)
    found = copy.deepcopy(model)
    report = calibrate(found, [inputs], "gptq", progress=False)
    wanted, result = logits_of(model, inputs), logits_of(found, inputs)
    assert report.weights and 10 * torch.log10(wanted.square().sum() / (wanted - result).square().sum()) > 8
    expected = {f"{n}.{w.qualified}" for n, b in blocks(model) for w in weights_of(b).values() if not w.router}
    assert set(report.weights) == expected


def test_the_backend_leaves_out_what_calibrate_left_out(small, data):
    calibrate(small, data, CalibrationConfig(**SHORT), progress=False)
    assert vars(small.lm_head)[DECIDED] and is_decided(small)
    assert not isinstance(small.lm_head.weight, IntScaleTensor)


def test_the_configuration_is_saved_with_the_model(small, data, tmp_path):
    chosen = from_preset("gptq", damping=0.02)
    calibrate(small, data, chosen, progress=False)
    small.config.save_pretrained(tmp_path)
    assert CalibrationConfig.from_dict(hf.AutoConfig.from_pretrained(tmp_path).intscale_calibration_config) == chosen


# --- what blocks and weights see ----------------------------------------------------------------------------------------


def test_later_weights_see_what_quantized_ones_make(model, data, monkeypatch):
    """The statistics of ``down_proj`` of the second block are those of a model whose weights before it are quantized."""
    seen = {}

    def spy(block, weight, *rest):
        result = statistics(block, weight, *rest)
        seen.setdefault(weight.name, []).append(result.hessian)
        return result

    monkeypatch.setattr(pipeline, "statistics", spy)
    original = copy.deepcopy(model)
    calibrate(model, data, "gptq", progress=False)
    assert sorted(map(len, seen.values())) == [2, 2, 2, 2]  # q, o, gate and down of two blocks: q/k/v and gate/up share
    inputs = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
    model(data)
    x = inputs[0]
    torch.testing.assert_close(seen["mlp.down_proj"][1], x.mT @ x, rtol=1e-3, atol=1e-3 * float((x.mT @ x).max()))
    original.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda m, args: inputs.append(args[0].flatten(0, 1))
    )
    original(data)
    assert (inputs[1].mT @ inputs[1] - x.mT @ x).norm() > 0.01 * (x.mT @ x).norm()


def test_experts_have_statistics_of_their_own_tokens():
    model, inputs = small_model("mixtral")
    stack = stacks(model)[0]
    kept = capture(model, stack, [inputs])
    block = stack[0][1]
    weight = weights_of(block)["mlp.experts.gate_up_proj"]
    run = lambda: kept.inputs(0, 0, kept.hidden[0], torch.device("cpu"))  # noqa: E731
    found = statistics(block, weight, [run])
    assert int(found.tokens.sum()) == 2 * inputs["input_ids"].numel()
    assert found.hessian.shape[0] == 4 and not torch.equal(found.hessian[0], found.hessian[1])


def test_memory_is_bounded(model, monkeypatch):
    """Hidden states of one place are kept, not of every block, and what repeats is kept once."""
    kept: list[StackInputs] = []
    monkeypatch.setattr(pipeline, "capture", lambda *args: kept.append(capture(*args)) or kept[-1])
    deep, data = tiny_llama(4), torch.randint(0, 128, (32, 64))
    calibrate(deep, data, CalibrationConfig(**SHORT), progress=False)
    tensors = {}
    for batch in kept[0].calls:
        for args, kwargs in batch:
            tensors |= {id(t): t for v in (*args, *kwargs.values()) for t in (v if isinstance(v, tuple) else (v,))}
    extra = sum(t.nbytes for t in tensors.values() if isinstance(t, torch.Tensor))
    hidden = sum(t.nbytes for t in kept[0].hidden)
    assert hidden == 32 * 64 * 64 * 4 and extra < 0.1 * hidden


# --- going on after an interruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["integer", "float"])
def test_resuming_gives_the_same_bits(model, data, tmp_path, monkeypatch, scales):
    chosen = from_preset("gptq", scales=scales, tuning_steps=2)
    whole = calibrated(model, data, chosen)
    process = pipeline._Block.process

    def interrupted(self):
        if self.place == 1:
            raise KeyboardInterrupt
        process(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline._Block, "process", interrupted)
        calibrate(copy.deepcopy(model), data, chosen, checkpoint_dir=tmp_path, progress=False)
    assert (tmp_path / "model.layers.0.pt").is_file() and not (tmp_path / "model.layers.1.pt").exists()
    quantized = []
    with monkeypatch.context() as patch:
        solve = pipeline.solve
        patch.setattr(pipeline, "solve", lambda *args: quantized.append(args[4]) or solve(*args))
        resumed = calibrated(model, data, chosen, checkpoint_dir=tmp_path)
    assert same_weights(whole, resumed) and torch.equal(whole(data).logits, resumed(data).logits)
    assert len(quantized) == 7 and all(name.startswith("model.layers.1.") for name in quantized)


def everything(model):
    """Values of parameters, hooks, attributes and configuration of a model."""
    modules = {
        name: (sorted(vars(m)), [len(v) for v in vars(m).values() if isinstance(v, dict)])
        for name, m in model.named_modules()
    }
    return (
        {name: (p.detach().clone(), sorted(vars(p))) for name, p in model.named_parameters(remove_duplicate=False)},
        modules,
        model.config.to_dict(),
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, WeightError])
@pytest.mark.parametrize("name", ["best", "llama3", "fptq"])
def test_a_call_that_fails_leaves_the_model_as_it_was(name, error, data, monkeypatch):
    """Rotation and smoothing change weights in place, and the first block is quantized when the second one fails."""
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight  # the rotation gives it a weight of its own
    model.config.tie_word_embeddings = True
    embedding = model.model.embed_tokens.weight
    before, process = everything(model), pipeline._Block.process

    def failing(self):
        if self.place == 1:
            raise error("now")
        process(self)

    monkeypatch.setattr(pipeline._Block, "process", failing)
    changes = {} if name == "fptq" else {"tuning_steps": 2}
    with pytest.raises(error):
        calibrate(model, data[:2], from_preset(name, **changes), progress=False)
    after = everything(model)
    assert after[1:] == before[1:]
    for key, (value, attributes) in before[0].items():
        assert after[0][key][1] == attributes and torch.equal(after[0][key][0], value), key
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert next(model.parameters()) is embedding, "itself, as something still holds it"


def test_nothing_is_kept_where_nothing_is_to_be_restored(model, data, monkeypatch):
    monkeypatch.setattr("intscale_compile.calibration.restoring._State", None)
    calibrate(model, data, CalibrationConfig(**SHORT), restore=False, progress=False)


def test_a_damaged_block_is_said(model, data, tmp_path):
    calibrate(copy.deepcopy(model), data, CalibrationConfig(**SHORT), checkpoint_dir=tmp_path, progress=False)
    assert not [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".pt")]
    block = tmp_path / "model.layers.1.pt"
    for content in (block.read_bytes()[:1000], b"", torch_bytes({"parameters": 3}), torch_bytes([])):
        block.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model.layers.1.pt: .*block is calibrated again"):
            calibrate(copy.deepcopy(model), data, CalibrationConfig(**SHORT), checkpoint_dir=tmp_path, progress=False)


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_resuming_with_something_else_is_refused(model, data, tmp_path):
    calibrate(copy.deepcopy(model), data, CalibrationConfig(**SHORT), checkpoint_dir=tmp_path, progress=False)
    others = {
        "configuration": (model, data, CalibrationConfig(seed=1, **SHORT)),
        "data": (model, data + 0 * data + (data == 0), CalibrationConfig(**SHORT)),
        "model": (tiny_llama(), data, CalibrationConfig(**SHORT)),
    }
    for part, (other, ids, chosen) in others.items():
        with pytest.raises(CalibrationError, match=f"another {part}: delete it"):
            calibrate(copy.deepcopy(other), ids, chosen, checkpoint_dir=tmp_path, progress=False)
