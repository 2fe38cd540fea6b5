"""Whole models in integers: the same bits however they are computed, what that costs, and what is refused."""

import math

import pytest
import torch
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, IntScaleTensor, integer_only
from intscale_compile.errors import IntegerOnlyError
from tests.support.benchmarks import load as load_benchmark

pytestmark = pytest.mark.generated

transformers = pytest.importorskip("transformers")
bench = load_benchmark(("perplexity",)).perplexity
GOLDEN = (
    "cff307b1aea99d7ac9e461e5877b56e848ea0a9bd95bf3fe51e6094490179930"  # of 12 logits of tiny-llama with two layers
)


def load(folder, layers=None, **config):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    model = model.eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(**config))
    return model


@pytest.fixture(scope="module")
def short(models_dir):
    """tiny-llama with two of its layers, quantized."""
    return load(models_dir / "tiny-llama", layers=2)


@pytest.fixture(scope="module")
def texts(models_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_dir / "tiny-llama")
    return bench.held_out_sequences(tokenizer, models_dir / "heldout_stdlib_modules.txt", 24, 512)


@pytest.fixture(scope="module")
def eager(short):
    """The reference, and its logits of one batch of eight texts with 24 tokens."""
    return integer_only.run_eagerly(short)


@pytest.fixture(scope="module")
def ids(texts):
    return texts[:8, :24].contiguous()


@pytest.fixture(scope="module")
def expected(eager, ids):
    with torch.no_grad():
        return eager(ids, use_cache=False).logits


LAYERS = [1, pytest.param(2, marks=pytest.mark.slow)]  # a second layer is the same code again, and takes as long


@pytest.fixture(scope="module", params=LAYERS)
def small(models_dir, request):
    """tiny-llama with some of its layers, quantized."""
    return load(models_dir / "tiny-llama", layers=request.param)


@pytest.fixture(scope="module")
def run(small):
    """Its reference."""
    return integer_only.run_eagerly(small)


@pytest.fixture(scope="module")
def whole(run, ids):
    """Its logits of eight texts with 24 tokens."""
    with torch.no_grad():
        return run(ids, use_cache=False).logits


@pytest.mark.parametrize("layers", LAYERS)
def test_compiled_is_eager(models_dir, ids, layers):
    """Also with two threads; compilation takes most of the time."""
    model = load(models_dir / "tiny-llama", layers=layers)
    compiled = torch.compile(model, backend="intscale", options=integer_only.OPTIONS, fullgraph=True)
    with torch.no_grad():
        expected = integer_only.run_eagerly(model)(ids, use_cache=False).logits
        torch.manual_seed(3)
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert torch.equal(compiled(ids, use_cache=False).logits, expected)
        finally:
            torch.set_num_threads(threads)


def test_golden_hash(expected):
    """The arithmetic is what it was: a change of this hash is a change of what users get."""
    assert integer_only.hash_logits(expected[0, -1, :12]) == GOLDEN


def test_batch_prefix_and_padding(run, ids, whole):
    with torch.no_grad():
        for batch in (1, 2):
            assert torch.equal(run(ids[:batch], use_cache=False).logits, whole[:batch])
        assert torch.equal(run(ids[:2, :9], use_cache=False).logits, whole[:2, :9])
        for left in (True, False):
            more = ids[:2, :5].flip(0)
            padded = torch.cat([more, ids[:2]] if left else [ids[:2], more], 1)
            mask = torch.ones_like(padded)
            mask[:, :5] = 0
            mask = mask if left else mask.flip(1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            found = run(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
            assert torch.equal(found[:, 5:] if left else found[:, :-5], whole[:2])


def in_chunks(run, ids, sizes):
    cache, parts, start = integer_only.IntegerCache(), [], 0
    for size in sizes:
        parts.append(run(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    return torch.cat(parts, 1), cache


def test_chunked_prefill_and_decoding(run, ids, whole):
    with torch.no_grad():
        found, cache = in_chunks(run, ids[:2], (7, 9, 1, 1, 1, 5))
    assert torch.equal(found, whole[:2])
    layer = cache.layers[0]
    assert (layer.keys.dtype, layer.key_scales.dtype) == (torch.int8, torch.int32)
    assert tuple(layer.keys.shape) == (2, 2, 24, 64) and cache.get_seq_length() == 24


def test_generate_follows_the_whole_text(small, run, ids):
    """Greedy tokens of ``generate`` are those that the whole text without a cache gives, alone and padded in a batch."""
    forward = small.forward
    try:
        small.forward = torch.compile(forward, backend=integer_only.eager_backend(), fullgraph=True)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        prompts = ids[:2, :12].clone()
        mask = torch.ones_like(prompts)
        prompts[1, :4], mask[1, :4] = 0, 0
        cache = integer_only.IntegerCache()
        out = small.generate(prompts, attention_mask=mask, past_key_values=cache, **options)
    finally:
        small.forward = forward
    for row, start in ((0, 0), (1, 4)):
        text = out[row : row + 1, start:]
        with torch.no_grad():
            logits = run(text, use_cache=False).logits
        assert logits[0, -7:-1].argmax(-1).tolist() == text[0, -6:].tolist()


def test_integer_cache_in_a_float_model(short, ids):
    with torch.no_grad():
        float_logits = short(ids[:1], use_cache=False).logits
        found = short(ids[:1], past_key_values=integer_only.IntegerCache()).logits
    assert (found - float_logits).abs().max() < 0.3 * float_logits.std()


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(run, *args, **kwargs):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught, torch.no_grad():
        run(*args, **kwargs)
    error = caught.value.inner_exception
    assert isinstance(error, IntegerOnlyError) and error.nodes
    return str(error)


def test_float_cache_is_refused(eager, ids):
    assert "IntegerCache()" in refusal(eager, ids[:1], use_cache=True)


class Odd(torch.nn.Module):
    """A residual block around a linear layer, with an operation that has no integer form."""

    def __init__(self, middle):
        super().__init__()
        self.table, self.linear, self.middle = torch.nn.Embedding(50, 128), torch.nn.Linear(128, 128), middle

    def forward(self, ids):
        x = self.table(ids)
        return x + self.linear(self.middle(x))


@pytest.mark.parametrize(
    "middle, words",
    [
        (torch.tanh, ("tanh at test_integer_models.py", "return x + self.linear(self.middle(x))", "soft-capping")),
        (lambda x: x.softmax(-1), ("softmax", 'attn_implementation="sdpa"')),
        (lambda x: x * 0.5, ("mul",)),
        (lambda x: x @ torch.ones(128, 128), ("matmul",)),
    ],
    ids=["tanh", "softmax", "factor", "product"],
)
def test_float_nodes_are_named(middle, words):
    model = Odd(middle).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    text = refusal(integer_only.run_eagerly(model), torch.arange(4)[None])
    assert all(word in text for word in words), text


def test_linear_that_is_not_quantized_is_named():
    model = Odd(torch.nn.Sequential(torch.nn.Linear(128, 128))).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(), filter_fn=lambda module, name: name == "linear")
    assert "a linear layer that is not quantized" in refusal(integer_only.run_eagerly(model), torch.arange(4)[None])


def test_training_is_refused():
    model = Odd(torch.nn.Dropout(0.5)).train().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    assert "model.eval()" in refusal(integer_only.run_eagerly(model), torch.arange(4)[None])


def test_autocast_is_refused():
    model = Odd(torch.nn.Identity()).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    with torch.autocast("cpu", torch.bfloat16):
        assert "outside of autocast" in refusal(integer_only.run_eagerly(model), torch.arange(4)[None])


def test_rotated_weights_are_near_their_float_form():
    model = Odd(torch.nn.LayerNorm(128)).eval().requires_grad_(False)
    rotated = torch.ops.intscale.hadamard(model.linear.weight.detach(), 64)
    weight = IntScaleTensor.from_hp(rotated, IntScaleConfig(group_size=64)).replaced(rotation=64)
    model.linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected, found = model(ids), integer_only.run_eagerly(model)(ids)
    assert (found - expected).abs().max() < 0.06 * expected.std()


def test_sequence_longer_than_the_table_of_positions(short, ids):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="intscale.positions"), torch.no_grad():
        integer_only.run_eagerly(short, positions=8)(ids, use_cache=False)


# --- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, bar", [({}, 15.70), ({"weight_bits": 8, "group_size": -1}, 14.60)], ids=["w4a8", "w8a8"]
)
def test_perplexity(models_dir, texts, config, bar):
    model = load(models_dir / "tiny-llama", **config)
    run = torch.compile(model, backend="intscale", options=integer_only.OPTIONS)
    value = perplexity(run, texts)
    print(f"integer-only perplexity of tiny-llama: {value:.3f}")
    assert value <= bar


@pytest.mark.slow
def test_perplexity_of_the_paper_widths(models_dir, texts):
    """8 bits for probabilities and sigmoids cost 2 to 3 %."""
    value = perplexity(integer_only.run_eagerly(load(models_dir / "tiny-llama"), widths="paper"), texts)
    assert 15.8 <= value <= 16.1


def perplexity(run, texts):
    losses = []
    with torch.no_grad():
        for batch in texts.split(4):
            logits = run(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).item())
    return math.exp(sum(losses) / len(losses))
