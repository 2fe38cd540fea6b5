"""The decode attention pass: the forms that it takes, what it leaves alone, and results equal to PyTorch's attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from intscale_compile import backend
from intscale_compile.compile.binding import copied
from intscale_compile.kernels.decode_attention import OP
from intscale_compile.passes import GraphRewrite, apply_passes
from intscale_compile.passes.model.decode_attention import ATTENTION, DECODE_ATTENTION
from intscale_compile.passes.settings import Settings
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run

B, H, KH, L, D = 3, 8, 2, 40, 64
ON = {"intscale.force_passes": ["decode_attention"]}


def repeat_getitem(x, groups):
    """As in transformers."""
    return x[:, :, None, :, :].expand(B, x.shape[1], groups, L, D).reshape(B, x.shape[1] * groups, L, D)


REPEATS = {
    "getitem": repeat_getitem,
    "short-getitem": lambda x, n: x[:, :, None].expand(B, x.shape[1], n, L, D).reshape(B, x.shape[1] * n, L, D),
    "unsqueeze": lambda x, n: x.unsqueeze(2).expand(-1, -1, n, -1, -1).reshape(B, x.shape[1] * n, L, D),
    "repeat_interleave": lambda x, n: x.repeat_interleave(n, 1),
    "function": lambda x, n: torch.repeat_interleave(x, n, dim=-3),
    "keywords": lambda x, n: torch.repeat_interleave(x, repeats=n, dim=1),
}
MASKS = {
    "none": lambda: None,
    "one-for-all": lambda: visible(1, 1),
    "one-a-sequence": lambda: visible(B, 1),
    "one-a-head": lambda: visible(B, H),
    "float": lambda: torch.randn(B, 1, 1, L, dtype=torch.bfloat16),
}


def visible(batch: int, heads: int) -> torch.Tensor:
    mask = torch.rand(batch, heads, 1, L) > 0.5
    mask[..., 0] = True
    return mask


def operands(key_heads: int = KH, q_len: int = 1, dtype=torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """q, k and v; the query is strided as a view of a linear layer's output."""
    q = torch.randn(B, q_len, H, D, dtype=dtype).transpose(1, 2)
    return q, torch.randn(B, key_heads, L, D, dtype=dtype), torch.randn(B, key_heads, L, D, dtype=dtype)


def rewritten(model, *inputs, **options) -> GraphRewrite:
    rewrite = capture(model, *inputs, **{**ON, **options})
    apply_passes(rewrite, (DECODE_ATTENTION,))
    return rewrite


def assert_replaced(rewrite: GraphRewrite, model, *inputs) -> None:
    """One call of the op, nothing of the repeat left, true metadata, the result of ``model``, and no second match."""
    assert rewrite.counts["decode_attention"] == count(rewrite, OP) == 1
    names = {str(node.target) for node in rewrite.graph.nodes if node.op != "placeholder"}
    assert not any(name in text for text in names for name in ("expand", "reshape", "repeat", "getitem", "dot_product"))
    assert_true_metadata(rewrite)
    (y,), expected = run(rewrite), model(*inputs)
    assert y.shape == expected.shape and y.dtype is expected.dtype and y.is_contiguous()
    torch.testing.assert_close(y.float(), expected.float(), rtol=2.0**-7, atol=2.0**-8)
    code = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (DECODE_ATTENTION,))
    assert again.counts["decode_attention"] == 0 and again.gm.code == code


@pytest.mark.parametrize(
    "repeat, mask", [*((repeat, "one-a-sequence") for repeat in REPEATS), *(("getitem", mask) for mask in MASKS)]
)
def test_repeated_heads_are_not_copied(repeat, mask):
    copy, mask = REPEATS[repeat], MASKS[mask]()

    def model(q, k, v):
        return sdpa(q, copy(k, H // KH), copy(v, H // KH), attn_mask=mask, scale=0.2)

    inputs = operands()
    assert_replaced(rewritten(model, *inputs), model, *inputs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_heads", [1, KH, H], ids=["multi-query", "grouped", "multi-head"])
def test_caches_that_are_not_repeated(key_heads, mask):
    mask = MASKS[mask]()

    def model(q, k, v):
        return sdpa(q, k, v, mask, enable_gqa=key_heads != H)

    inputs = operands(key_heads)
    rewrite = rewritten(model, *inputs)
    (call,) = [node for node in rewrite.graph.nodes if node.target is OP]
    assert call.args[4] == D**-0.5
    assert_replaced(rewrite, model, *inputs)


def test_a_repeat_with_another_reader_stays():
    def model(q, k, v):
        keys = repeat_getitem(k, H // KH)
        return sdpa(q, keys, repeat_getitem(v, H // KH)), keys

    inputs = operands()
    rewrite = rewritten(model, *inputs)
    y, keys = run(rewrite)
    (call,) = [node for node in rewrite.graph.nodes if node.target is OP]
    assert [node.op for node in call.args[:3]] == ["placeholder"] * 3
    assert torch.equal(keys, repeat_getitem(inputs[1], H // KH))
    torch.testing.assert_close(y.float(), model(*inputs)[0].float(), rtol=2.0**-7, atol=2.0**-8)


def tiled(x, groups):
    """The heads in another order than GQA's: not a repeat of each head."""
    return x.repeat(1, groups, 1, 1)


def flattened(x, groups):
    """The shape of a repeat, but of another dimension."""
    return x[:, None].expand(B, groups, KH, L, D).reshape(B, KH * groups, L, D)


@pytest.mark.parametrize("copy", [tiled, flattened])
def test_other_copies_are_taken_as_they_are(copy):
    """The op reads the copy: the result is right, only nothing is saved."""

    def model(q, k, v):
        return sdpa(q, copy(k, H // KH), copy(v, H // KH))

    inputs = operands()
    rewrite = rewritten(model, *inputs)
    (call,) = [node for node in rewrite.graph.nodes if node.target is OP]
    assert call.args[1].op != "placeholder" and call.args[2].op != "placeholder"
    torch.testing.assert_close(run(rewrite)[0].float(), model(*inputs).float(), rtol=2.0**-7, atol=2.0**-8)


def attention(**options):
    return lambda q, k, v: sdpa(q, k, v, **options)


LEFT_ALONE = {
    "several-queries": (attention(), dict(q_len=2), {}),
    "causal": (attention(is_causal=True), {}, {}),
    "dropout": (attention(dropout_p=0.1), {}, {}),
    "fp32": (attention(), dict(dtype=torch.float32), {}),
    "two-dimensional-mask": (attention(attn_mask=torch.ones(1, L, dtype=torch.bool)), {}, {}),
    "cpu-by-default": (attention(), {}, {"intscale.force_passes": []}),
    "off": (attention(), {}, {"intscale.disable_passes": ["decode_attention"]}),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    model, sizes, options = LEFT_ALONE[case]
    rewrite = capture(model, *operands(H, **sizes), **{**ON, **options})
    before = rewrite.gm.code
    apply_passes(rewrite, (DECODE_ATTENTION,))
    assert rewrite.counts["decode_attention"] == count(rewrite, OP) == 0 and rewrite.gm.code == before


def test_a_call_that_autograd_watches_is_left_alone():
    q, k, v = (x.detach().requires_grad_() for x in operands(H))
    seen = []

    def spy(gm, inputs):
        rewrite = GraphRewrite(copied(gm), inputs, Settings(force_passes=("decode_attention",)))
        apply_passes(rewrite, (DECODE_ATTENTION,))
        seen.append(rewrite.counts["decode_attention"])
        return gm.forward

    torch._dynamo.reset()
    torch.compile(attention(), backend=spy)(q, k, v)
    assert seen == [0]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_tiny_llama_decodes_the_same_with_the_option_on_and_off(dynamic, monkeypatch):
    transformers = pytest.importorskip("transformers")
    layers = 2
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(torch.bfloat16)
    ids = torch.randint(0, 128, (B, 12))
    original, rewrites = backend.rewrite_graph, []

    def spy(*arguments):
        rewrite = original(*arguments)
        left = sum(node.target in ATTENTION for node in rewrite.graph.nodes)
        rewrites.append((rewrite.counts["decode_attention"], left))
        return rewrite

    monkeypatch.setattr(backend, "rewrite_graph", spy)
    logits = {}
    for option in ("force", "disable"):
        torch._dynamo.reset()
        rewrites.clear()
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        options = {f"intscale.{option}_passes": ["decode_attention"], "intscale.quantize_plain": False}
        step = torch.compile(model, backend=backend.intscale, dynamic=dynamic, options=options)
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache)
            logits[option] = torch.stack([
                step(ids[:, i : i + 1], past_key_values=cache, position_ids=torch.tensor([[i]])).logits.float()
                for i in range(8, 12)
            ])  # fmt: skip
        assert set(rewrites) == {(layers, 0) if option == "force" else (0, layers)}
    torch._dynamo.reset()
    difference = (logits["force"] - logits["disable"]).norm() / logits["disable"].norm()
    assert difference < 0.02, difference
