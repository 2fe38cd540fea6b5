"""Adapters that begin with what quantization lost: nearer to the original, the base untouched, the same twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
hf = pytest.importorskip("transformers")

from intscale_compile import CalibrationConfig, IntScaleConfig, IntScaleTensor, lora, quantize  # noqa: E402
from intscale_compile.errors import CalibrationError, CheckpointError, ConfigError  # noqa: E402
from tests.support.adapters import adapted, change  # noqa: E402
from tests.support.calibration import calibrated, logits_of, small_model, tiny_llama  # noqa: E402

DATA = torch.arange(128).mul(7).remainder(128).view(2, 64)
INPUTS = {"input_ids": DATA}
QUICK = {"progress": False, "steps": 8, "lr": 1e-2}


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return tiny_llama(2)


@pytest.fixture(scope="module")
def base(original) -> nn.Module:
    return quantize(copy.deepcopy(original), IntScaleConfig(group_size=32))


def error(model: nn.Module, original: nn.Module) -> float:
    wanted = logits_of(original, INPUTS)
    return float((logits_of(model, INPUTS) - wanted).norm() / wanted.norm())


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def test_each_method_comes_closer(original, base):
    start = error(base, original)
    errors = {}
    for method in ("svd", "apiq-lw", "apiq"):
        peft_model = adapted(copy.deepcopy(base))
        weights = {n: p for n, p in peft_model.named_parameters() if isinstance(p, IntScaleTensor)}
        flags = {n: p.requires_grad for n, p in peft_model.named_parameters()}
        peft_model.train()
        report = lora.initialize(peft_model, original, DATA, method, **QUICK)
        assert peft_model.training and peft_model.base_model.model.model.layers[0].mlp.down_proj.training
        assert flags == {n: p.requires_grad for n, p in peft_model.named_parameters()}
        assert all(p is weights[n] for n, p in peft_model.named_parameters() if n in weights)
        assert all(p.grad is None for p in peft_model.parameters())
        assert len(report.layers) == 14 and report.method == method
        assert all(report.after[block] < report.before[block] for block in report.after)
        assert list(report.after) == ([] if method == "svd" else ["model.layers.0", "model.layers.1"])
        errors[method] = error(peft_model.eval(), original)
    assert errors["apiq-lw"] < 0.9 * errors["svd"] and errors["apiq"] < errors["svd"] < start, (errors, start)


def test_svd_is_the_best_approximation_of_its_rank(original, base):
    peft_model = adapted(copy.deepcopy(base), lora_alpha=3)
    lora.initialize(peft_model, original, method="svd")
    layer = peft_model.base_model.model.model.layers[1].mlp.up_proj
    residual = original.model.layers[1].mlp.up_proj.weight - layer.base_layer.weight.dequantize()
    left, sizes, right = torch.linalg.svd(residual)
    wanted = left[:, :4] * sizes[:4] @ right[:4]
    torch.testing.assert_close(layer.get_delta_weight("default"), wanted, rtol=1e-4, atol=1e-6)


def test_a_rotated_model_is_compared_in_its_own_space(original, tmp_path):
    """The block-wise target is turned as the hidden states are; layer by layer there is nothing to compare with."""
    recipe = CalibrationConfig("short", rounding="nearest", clipping="none", rotation="hadamard")
    model = calibrated(original, DATA, recipe)
    start = error(model, original)
    peft_model = adapted(copy.deepcopy(model))
    report = lora.initialize(peft_model, original, DATA, aug_loss=True, **QUICK)
    assert error(peft_model, original) < 0.9 * start
    assert all(report.after[block] < report.before[block] < 0.2 for block in report.after)
    for method, said in (("apiq-lw", "the quantized model is rotated"), ("svd", "it was transformed")):
        with pytest.raises(ConfigError, match=said + ".*use method='apiq'"):
            lora.initialize(adapted(copy.deepcopy(model)), original, DATA, method, progress=False)


def test_the_same_twice_and_an_interrupted_call_goes_on(original, base, tmp_path, monkeypatch):
    torch.manual_seed(1)
    first, second, third = (adapted(copy.deepcopy(base)) for _ in range(3))
    for other in (second, third):
        other.load_state_dict(adapters(first), strict=False)
    lora.initialize(first, original, DATA, **QUICK)
    lora.initialize(second, original, DATA, checkpoint_dir=tmp_path, **QUICK)
    assert all(torch.equal(p, adapters(first)[n]) for n, p in adapters(second).items())
    (tmp_path / "model.layers.1.pt").unlink()
    learned = []
    from intscale_compile.lora import initializing

    whole = initializing.learn_block
    monkeypatch.setattr(initializing, "learn_block", lambda *a: (learned.append(a[0].name), whole(*a)))
    lora.initialize(third, original, DATA, checkpoint_dir=tmp_path, **QUICK)
    assert learned == ["model.layers.1"]
    assert all(torch.equal(p, adapters(first)[n]) for n, p in adapters(third).items())
    with pytest.raises(CalibrationError, match="of a calibration with another configuration"):
        lora.initialize(third, original, DATA, checkpoint_dir=tmp_path, overwrite=True, **{**QUICK, "steps": 2})
    (tmp_path / "model.layers.0.pt").write_bytes(b"damaged")
    kept = adapters(third)
    with pytest.raises(CheckpointError, match="delete it, and the block is learned again"):
        lora.initialize(third, original, DATA, checkpoint_dir=tmp_path, overwrite=True, **QUICK)
    assert all(torch.equal(p, kept[n]) for n, p in adapters(third).items())


def test_saved_and_loaded_and_compiled(original, base, tmp_path):
    peft_model = adapted(copy.deepcopy(base))
    lora.initialize(peft_model, original, DATA, "apiq-lw", progress=False)
    peft_model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    wanted = logits_of(peft_model, INPUTS)
    assert torch.equal(logits_of(loaded, INPUTS), wanted)


REFUSED = {
    "no_adapter": (lambda o, q: (q, o), "has no adapters"),
    "not_quantized": (lambda o, q: (adapted(copy.deepcopy(o)), o), "its base weights are not quantized"),
    "embeddings_only": (
        lambda o, q: (adapted(q, target_modules=["embed_tokens"]), o),
        "no LoRA layer over a linear layer",
    ),
    "other_shape": (lambda o, q: (adapted(q), _other(160)), r"q_proj.weight has shape .* the quantized one"),
    "fewer_layers": (lambda o, q: (adapted(q), tiny_llama(1)), "original has no layer model.layers.1.self_attn.q_proj"),
    "quantized_original": (lambda o, q: (adapted(q), copy.deepcopy(q)), "is a IntScaleTensor: pass the model before"),
    "training_original": (lambda o, q: (adapted(q), copy.deepcopy(o).train()), "original is in training mode"),
    "no_original": (lambda o, q: (adapted(q), None), "original is a NoneType"),
    "trained": (lambda o, q: (change(adapted(q)), o), "has been trained .*overwrite=True"),
}


def _other(hidden: int) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
    )
    return hf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, original, base):
    build, said = REFUSED[kind]
    peft_model, source = build(original, copy.deepcopy(base))
    before = {n: p.detach().clone() for n, p in peft_model.named_parameters() if not isinstance(p, IntScaleTensor)}
    with pytest.raises(ConfigError, match=said):
        lora.initialize(peft_model, source, DATA, **QUICK)
    assert all(torch.equal(p, before[n]) for n, p in peft_model.named_parameters() if n in before)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"method": "loftq"}, r"method='loftq' is not supported: use one of \('apiq', 'apiq-lw', 'svd'\)"),
        ({"steps": 0}, "steps=0 is not supported: use a positive integer or None"),
        ({"lr": float("nan")}, "lr=nan is not supported"),
        ({"seed": -1}, "seed=-1 is not supported"),
        ({"token_ids": None}, "needs token_ids: pass some, or use method='svd'"),
        ({"adapter": "other"}, "adapter='other' is not there"),
    ],
)
def test_bad_arguments(options, said, original, base):
    with pytest.raises(ConfigError, match=said):
        lora.initialize(
            adapted(copy.deepcopy(base)), **{"original": original, "token_ids": DATA, "progress": False, **options}
        )


def test_kinds_of_adapters_that_are_refused(original, base):
    with pytest.raises(Exception, match="not defined on packed data|use_dora=False"):  # by peft's own start of DoRA
        lora.initialize(adapted(copy.deepcopy(base), use_dora=True), original, DATA, **QUICK)
    two = adapted(copy.deepcopy(base))
    two.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    two.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="2 adapters are active .*name one with adapter="):
        lora.initialize(two, original, DATA, **QUICK)
    lora.initialize(two, original, method="svd", adapter="other")
    assert all(bool((p != 0).any()) == ("other" in n) for n, p in two.named_parameters() if "lora_B" in n)


def test_adapters_of_stacks_of_experts_are_refused_by_name():
    model, inputs = small_model("mixtral")
    quantize(model, IntScaleConfig(scale_search="absmax"))
    peft_model = adapted(model, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    said = r"model\.layers\.0\.mlp\.experts\.down_proj: adapters of stacks of experts .* are not supported"
    with pytest.raises(ConfigError, match=said):
        lora.initialize(peft_model, small_model("mixtral")[0], inputs["input_ids"], **QUICK)


def test_overwrite_begins_anew(original, base):
    trained = change(adapted(copy.deepcopy(base)))
    lora.initialize(trained, original, DATA, overwrite=True, **QUICK)
    again = change(adapted(copy.deepcopy(base)), 0.5)
    lora.initialize(again, original, DATA, overwrite=True, **QUICK)
    assert all(torch.equal(p, adapters(trained)[n]) for n, p in adapters(again).items())
