"""The two trained models: what is matched, perplexity, and that both doors agree to the bit."""

import copy

import pytest
import torch
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig
from tests.support.benchmarks import load

bench = load(("perplexity",)).perplexity

transformers = pytest.importorskip("transformers")


def load(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny_llama(models_dir):
    return load(models_dir / "tiny-llama")


@pytest.fixture(scope="module")
def sequences(models_dir):
    """A third of the text of benchmarks/perplexity.py, which repeats the figures of the README."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "tiny-llama")
    return bench.held_out_sequences(tokenizer, models_dir / "heldout_stdlib_modules.txt", 24, 512)[::3]


def test_every_linear_of_tiny_llama_is_matched_and_merged(tiny_llama, sequences):
    report = intscale_compile.explain(tiny_llama, sequences[:1])
    assert report.graphs == 1
    assert sum(layer.quantized for layer in report.layers) == 56
    assert [(layer.name, layer.reason) for layer in report.fallbacks] == [
        ("model.embed_tokens.weight", "TIED_EMBEDDING")
    ]
    assert (report.gemms, report.activation_quantizations) == (32, 32)
    assert report.quantized_parameters == 12_582_912 and report.parameters == 15_735_168
    assert min(layer.headroom_bits for layer in report.layers if layer.quantized) > 8
    text = str(report)
    assert "model.layers.0..7.mlp.down_proj.weight" in text and "56 of 57" in text and "80.0%" in text


def test_doors_agree_to_the_bit_and_perplexity_is_kept(tiny_llama, sequences):
    quantized = copy.deepcopy(tiny_llama)
    quantize_(quantized, IntScaleConfig())
    torch._dynamo.reset()
    plain_door = torch.compile(tiny_llama, backend="intscale", fullgraph=True)
    tensor_door = torch.compile(quantized, backend="intscale", fullgraph=True)
    assert torch.equal(plain_door(sequences[:1]).logits, tensor_door(sequences[:1]).logits)
    before, value = (
        bench.perplexity(tiny_llama, sequences),
        bench.perplexity(tensor_door, sequences),
    )
    print(f"tiny-llama perplexity: fp32 {before:.3f}, integer scale {value:.3f}")
    assert before < value < 1.085 * before
    eager = bench.perplexity(quantized, sequences[:4])
    assert eager == pytest.approx(bench.perplexity(tensor_door, sequences[:4]), rel=0.005)


def test_tiny_mixtral_with_every_expert(models_dir, sequences):
    """All experts and the attention; the router and the tied embedding stay. Both doors give the same model."""
    model = load(models_dir / "tiny-mixtral")
    report = intscale_compile.explain(model, sequences[:1])
    assert (report.graphs, report.gemms, report.activation_quantizations) == (1, 16, 16)
    reasons = [layer.reason for layer in report.fallbacks]
    assert sorted(reasons) == ["ROUTER"] * 4 + ["TIED_EMBEDDING"]
    stacks = [layer for layer in report.layers if layer.experts]
    assert [layer.shape for layer in stacks] == [(1024, 256), (256, 512)] * 4 and all(s.quantized for s in stacks)
    embedding = model.get_input_embeddings().weight.numel()
    assert report.quantized_parameters / (report.parameters - embedding) > 0.998
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig(), filter_fn=intscale_compile.linears_and_experts)
    torch._dynamo.reset()
    plain_door = torch.compile(model, backend="intscale", fullgraph=True)
    tensor_door = torch.compile(quantized, backend="intscale", fullgraph=True)
    assert torch.equal(plain_door(sequences[:1]).logits, tensor_door(sequences[:1]).logits)
    before, value = (
        bench.perplexity(model, sequences),
        bench.perplexity(tensor_door, sequences),
    )
    print(f"tiny-mixtral perplexity: fp32 {before:.3f}, integer scale {value:.3f}")
    assert before < value < 1.032 * before
    quantized.set_experts_implementation("intscale")
    eager = bench.perplexity(quantized, sequences[:2])
    assert eager == pytest.approx(bench.perplexity(tensor_door, sequences[:2]), rel=0.005)


@pytest.mark.slow
def test_gpt2_convolutions_by_both_doors():
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=128, bos_token_id=0, eos_token_id=1, use_cache=False
    )
    model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    ids = torch.arange(40).view(2, 20)
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig(), filter_fn=lambda m, name: type(m).__name__ == "Conv1D")
    for one in (model, quantized):
        report = intscale_compile.explain(one, ids)
        assert report.gemms == 8 and [layer.reason for layer in report.fallbacks] == ["TIED_EMBEDDING"]
    torch._dynamo.reset()
    results = [torch.compile(one, backend="intscale", fullgraph=True)(ids).logits for one in (model, quantized)]
    assert torch.equal(*results)
