"""Decode attention on a GPU: near fp64, the same in every batch, in CUDA graphs, and in a whole model that decodes."""

from __future__ import annotations

import copy

import pytest
import torch

from intscale_compile.kernels.decode_attention import OP
from intscale_compile.ops import KERNEL_ABI
from tests.support.graphs import count

pytestmark = pytest.mark.gpu
H, KH, D = 32, 8, 128
SCALE = D**-0.5
PROMPT, STEPS = 48, 20
needs_pdl = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (9, 0),
    reason="programmatic dependent launch came with capability 9.0",
)


def attend(q, k, v, mask=None, overlap=False):
    return OP(q, k, v, mask, SCALE, KERNEL_ABI, overlap)


def operands(batch, keys, heads=H, key_heads=KH, features=D, dtype=torch.bfloat16):
    q = torch.randn(batch, 1, heads, features, device="cuda", dtype=dtype).transpose(1, 2)
    return q, *(torch.randn(batch, key_heads, keys, features, device="cuda", dtype=dtype) for _ in range(2))


def static_cache_mask(batch, keys):
    """Each sequence sees a beginning of the cache, one of them all of it."""
    lengths = torch.randint(1, keys + 1, (batch, 1), device="cuda")
    lengths[-1] = keys
    return (torch.arange(keys, device="cuda") < lengths)[:, None, None]


def assert_near(y, q, k, v, mask=None):
    """Not further from fp64 than a rounding of the result, and one of the weights, to the operands' dtype."""
    step = torch.finfo(q.dtype).eps
    for i in range(len(q)):  # one sequence at a time: fp64 copies of a cache are large
        own = None if mask is None else mask.expand(len(q), -1, -1, -1)[i : i + 1]
        own = own if own is None or own.dtype is torch.bool else own.double()
        one = (x[i : i + 1].double() for x in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*one, own, scale=SCALE, enable_gqa=True)
        error = (y[i : i + 1].double() - expected).abs().max()
        assert error <= step * expected.abs().max(), (i, error)


@pytest.mark.parametrize("keys", [1, 63, 200, 1024, 8192])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_near_fp64(batch, keys):
    q, k, v = operands(batch, keys)
    mask = static_cache_mask(batch, keys)
    for one in (None, mask, torch.zeros(mask.shape, device="cuda").masked_fill(~mask, float("-inf"))):
        assert_near(attend(q, k, v, one), q, k, v, one)


@pytest.mark.parametrize("heads, key_heads", [(8, 8), (8, 1), (64, 8), (14, 2), (64, 1)])
@pytest.mark.parametrize("features", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_layouts(heads, key_heads, features, dtype):
    q, k, v = operands(3, 300, heads, key_heads, features, dtype)
    per_head = torch.rand(3, heads, 1, 300, device="cuda") > 0.3
    per_head[..., 0] = True
    for mask in (None, per_head, static_cache_mask(3, 300)):
        assert_near(attend(q, k, v, mask), q, k, v, mask)


def test_nothing_visible_gives_zeros():
    for keys in (40, 3000):
        mask = torch.ones(2, 1, 1, keys, dtype=torch.bool, device="cuda")
        mask[1] = False
        y = attend(*operands(2, keys), mask)
        assert not y[1].any() and y[0].isfinite().all() and y[0].any()


@pytest.mark.parametrize("keys", [63, 1024, 8192])
def test_a_sequence_is_the_same_in_every_batch(keys):
    q, k, v = operands(64, keys)
    mask = static_cache_mask(64, keys)
    for one in (None, mask):
        whole = attend(q, k, v, one)
        for rows in (slice(0, 1), slice(63, 64), slice(5, 21), slice(0, 63)):
            own = None if one is None else one[rows]
            assert torch.equal(attend(q[rows], k[rows], v[rows], own), whole[rows])


@needs_pdl
@pytest.mark.parametrize("keys", [63, 1024, 8192])
def test_overlap_changes_nothing(keys):
    """Operands written by the kernel just before, many times over."""
    q, k, v = operands(4, keys)
    mask = static_cache_mask(4, keys)
    expected = [attend(q * i, k, v, mask) for i in range(20)]
    torch.cuda.synchronize()
    for _ in range(5):
        found = [attend(q * i, k, v, mask, overlap=True) for i in range(20)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("keys", [63, 2000])
def test_cuda_graph_replay_with_another_mask(keys, overlap):
    q, k, v = operands(3, keys)
    mask = static_cache_mask(3, keys)
    attend(q, k, v, mask, overlap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = attend(q, k, v, mask, overlap)
    for _ in range(4):
        mask.copy_(static_cache_mask(3, keys))
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(y, attend(q, k, v, mask))


def test_compiled_equals_eager_on_strided_caches():
    """A static cache of which the graph reads a part."""
    torch._dynamo.reset()
    q, k, v = operands(2, 512)
    mask = static_cache_mask(2, 300)
    expected = attend(q, k[:, :, :300], v[:, :, :300], mask)
    run = torch.compile(lambda q, k, v, mask: attend(q + 0, k[:, :, :300], v[:, :, :300], mask) * 2)
    assert torch.equal(run(q, k, v, mask), expected * 2)


@pytest.fixture(scope="module")
def llama():
    """Random, 4 layers, heads of 64; quantized with its head, so that every linear layer is the same in every batch."""
    transformers = pytest.importorskip("transformers")
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=64, vocab_size=1024, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # sharper than what the constructor draws: the tokens then differ from each other
            parameter.mul_(3.0)
    quantize_(model, IntScaleConfig(), filter_fn=lambda module, name: isinstance(module, torch.nn.Linear))
    return model


def decode(model, ids, steps=STEPS, **compile_options):
    """Tokens ``[batch, steps]`` and logits ``[steps, batch, vocabulary]`` of greedy decoding with a static cache."""
    from transformers import StaticCache

    torch._dynamo.reset()
    step = torch.compile(model, backend="intscale", fullgraph=True, dynamic=False, **compile_options)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + steps)
    tokens, logits = [], []

    def position(i):
        return torch.full((1, 1), i, device=ids.device)

    with torch.no_grad():
        # The first call makes the cache: not compiled, or CUDA graphs would own it. Token by token: a prompt in one call
        # goes through PyTorch's attention, whose sums may depend on the batch.
        model(ids[:, :1], past_key_values=cache, position_ids=position(0))
        for i in range(1, PROMPT - 1):
            torch.compiler.cudagraph_mark_step_begin()
            step(ids[:, i : i + 1].clone(), past_key_values=cache, position_ids=position(i))
        token = ids[:, -1:]
        for i in range(PROMPT - 1, PROMPT - 1 + steps):
            torch.compiler.cudagraph_mark_step_begin()
            last = step(token.clone(), past_key_values=cache, position_ids=position(i)).logits[:, -1].clone()
            token = last.argmax(-1, keepdim=True)
            tokens.append(token)
            logits.append(last)
    return torch.cat(tokens, 1), torch.stack(logits)


def test_decoding_in_cuda_graphs_gives_the_same_tokens(llama):
    ids = torch.randint(0, 1024, (4, PROMPT), device="cuda")
    tokens, logits = decode(llama, ids)
    in_graphs, graph_logits = decode(llama, ids, mode="reduce-overhead")
    assert torch.equal(in_graphs, tokens) and torch.equal(graph_logits, logits)
    assert len(tokens.unique()) > 5  # the model says something


def test_attention_is_replaced_in_every_layer(llama, monkeypatch):
    from intscale_compile import backend

    rewrites, original = [], backend.rewrite_graph

    def spy(*arguments):
        rewrite = original(*arguments)
        rewrites.append((rewrite.counts["decode_attention"], count(rewrite, OP)))
        return rewrite

    monkeypatch.setattr(backend, "rewrite_graph", spy)
    decode(llama, torch.randint(0, 1024, (2, PROMPT), device="cuda"), steps=2)
    assert set(rewrites) == {(4, 4)}


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_sequence_alone_gives_the_same_tokens_as_in_a_batch(llama, mode):
    """The prompts are equally long: there is no padding, and one position for all."""
    ids = torch.randint(0, 1024, (16, PROMPT), device="cuda")
    whole, _ = decode(llama, ids, mode=mode)
    for i in (0, 7, 15):
        alone, _ = decode(llama, ids[i : i + 1], mode=mode)
        assert torch.equal(alone[0], whole[i]), f"sequence {i}"


@needs_pdl
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("off", ["triton.enable_pdl", "combo_kernels"])
def test_launch_settings_change_no_bit(llama, off, mode):
    from torch._inductor import list_mode_options

    ids = torch.randint(0, 1024, (4, PROMPT), device="cuda")
    # torch.compile takes a mode or options, not both.
    options = dict(list_mode_options(mode)) if mode else {}
    _, logits = decode(llama, ids, options=options)
    _, without = decode(llama, ids, options={**options, off: False})
    assert torch.equal(logits, without)


def test_the_option_changes_little(llama):
    ids = torch.randint(0, 1024, (4, PROMPT), device="cuda")
    _, ours = decode(copy.deepcopy(llama), ids, steps=1)
    _, theirs = decode(llama, ids, steps=1, options={"intscale.disable_passes": ["decode_attention"]})
    assert (ours - theirs).float().norm() < 0.03 * theirs.float().norm()


@pytest.mark.parametrize("length", [128, 2048])
def test_prefill_without_a_mask(length, llama):
    """The causal attention pass on CUDA: flash attention over shared heads, near the call with its mask."""
    ids = torch.randint(0, 1024, (2, length), device="cuda")
    logits = []
    for disabled in ([], ["causal_attention"]):
        torch._dynamo.reset()
        options = {"intscale.disable_passes": disabled}
        run = torch.compile(llama, backend="intscale", fullgraph=True, dynamic=False, options=options)
        with torch.no_grad():
            logits.append(run(ids, use_cache=False).logits.float())
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[1].norm()
