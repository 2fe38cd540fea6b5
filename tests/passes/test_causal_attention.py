"""The causal attention pass: masks that it proves or computes, those that it leaves alone, and equal results."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from intscale_compile import backend
from intscale_compile.compile.binding import bind
from intscale_compile.compile.options import parse_options
from intscale_compile.passes import GraphRewrite, apply_passes
from intscale_compile.passes.model import causal_attention, constant_mask
from intscale_compile.passes.model.affine_mask import is_causal
from intscale_compile.passes.model.causal_attention import CAUSAL_ATTENTION
from intscale_compile.passes.model.decode_attention import ATTENTION
from tests.support.graphs import arguments, assert_true_metadata, capture, run

B, H, KH, Q, D = 2, 4, 2, 20, 32


def operands(q_len=Q, keys=Q, heads=KH, dtype=torch.float32, batch=B):
    shapes = ((batch, H, q_len, D), (batch, heads, keys, D), (batch, heads, keys, D))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def repeat(x):
    batch, heads, keys, features = x.shape
    return x[:, :, None].expand(batch, heads, H // heads, keys, features).reshape(batch, H, keys, features)


def attend(mask):
    """A model whose mask is ``mask(q, k)``."""
    return lambda q, k, v: sdpa(q, repeat(k), repeat(v), attn_mask=mask(q, k), scale=0.3)


def rewritten(model, *inputs, dynamic=None, **options) -> GraphRewrite:
    rewrite = capture(model, *inputs, dynamic=dynamic, **options)
    apply_passes(rewrite, (CAUSAL_ATTENTION,))
    return rewrite


def attentions(rewrite: GraphRewrite) -> list[torch.fx.Node]:
    return [n for n in rewrite.graph.nodes if n.target in ATTENTION]


def the_call(rewrite: GraphRewrite) -> dict:
    """Arguments of the one attention of a graph."""
    (node,) = attentions(rewrite)
    return dict(zip(causal_attention.ARGUMENTS, node.args)) | dict(node.kwargs)


def assert_idempotent(rewrite: GraphRewrite) -> None:
    code = rewrite.gm.code
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (CAUSAL_ATTENTION,))
    assert again.counts["causal_attention"] == 0 and again.gm.code == code


def positions(n):
    return torch.arange(n)


def transformers_like(q, k):
    """With the search for packed sequences that transformers makes where the caller passes no mask."""
    batch, n = q.shape[0], q.shape[2]
    ids = (torch.arange(n) + 0).unsqueeze(0)
    rows = ids.expand(batch, -1)
    packed = (torch.diff(rows, prepend=rows[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    b = torch.arange(batch)[:, None, None, None]
    i, j = (torch.arange(n) + 0)[None, None, :, None], (torch.arange(n) + 0)[None, None, None, :]
    result = i.new_ones((), dtype=torch.bool)
    result = result & (packed[b, i] == packed[b, j]).to(q.device)
    return (result & (rows[b, j] <= rows[b, i]).to(q.device)).expand(batch, -1, n, n)


PROVED = {
    "transformers": transformers_like,
    "compared": lambda q, k: (positions(k.shape[2])[None, :] <= positions(q.shape[2])[:, None])[None, None],
    "greater-or-equal": lambda q, k: positions(q.shape[2]).unsqueeze(-1) >= positions(k.shape[2]),
    "less-than-next": lambda q, k: positions(k.shape[2]) < positions(q.shape[2])[:, None] + 1,
    "difference": lambda q, k: positions(q.shape[2])[:, None] - positions(k.shape[2]) > -1,
    "moved": lambda q, k: torch.arange(3, q.shape[2] + 3)[:, None] >= torch.arange(3, k.shape[2] + 3),
}
COMPUTED = {
    "tril": lambda q, k: torch.ones(Q, Q, dtype=torch.bool).tril(),
    "not-triu": lambda q, k: ~torch.ones(Q, Q, dtype=torch.bool).triu(1),
    "infinite": lambda q, k: torch.full((1, 1, Q, Q), float("-inf")).triu(1),
    "least": lambda q, k: torch.zeros(Q, Q).masked_fill(torch.ones(Q, Q).tril() == 0, torch.finfo(torch.float32).min),
    "where": lambda q, k: torch.where(positions(Q)[:, None] >= positions(Q), 0.0, float("-inf")),
    "wide-window": lambda q, k: (
        (positions(Q) <= positions(Q)[:, None]) & (positions(Q) > positions(Q)[:, None] - 4 * Q)
    ),
    "ones-like": lambda q, k: torch.ones_like(q[0, 0] @ k[0, 0].t(), dtype=torch.bool).tril(),
}
ALL = {
    "ones": lambda q, k: torch.ones(B, 1, Q, k.shape[2], dtype=torch.bool),
    "row": lambda q, k: q.new_ones(1, 1, 1, k.shape[2], dtype=torch.bool),
    "zeros": lambda q, k: torch.zeros(Q, k.shape[2]),
}


def assert_no_mask_is_left(rewrite: GraphRewrite) -> None:
    left = {constant_mask.function_name(n) for n in rewrite.graph.nodes}
    assert not left & {"arange", "ones", "full", "where", "tril", "triu", "diff", "cumsum", "new_ones", "ones_like"}


def assert_simplified(rewrite, model, inputs, causal: bool) -> None:
    """One call without mask, nothing left of the mask, true metadata, the same result, no second match."""
    call = the_call(rewrite)
    assert rewrite.counts["causal_attention"] == 1
    assert (call["attn_mask"], call["is_causal"], call["scale"]) == (None, causal, 0.3)
    assert_no_mask_is_left(rewrite)
    assert_true_metadata(rewrite)
    torch.testing.assert_close(run(rewrite)[0], model(*inputs), rtol=1e-5, atol=1e-6)
    assert_idempotent(rewrite)


def each(masks):
    """A model that attends with each mask in turn, all in one graph."""
    return lambda q, k, v: [attend(mask)(q, k, v) for mask in masks.values()]


def assert_all_simplified(masks, inputs, causal: bool) -> None:
    """As ``assert_simplified``, of many masks in one graph."""
    rewrite = rewritten(each(masks), *inputs)
    calls = [dict(zip(causal_attention.ARGUMENTS, n.args)) | dict(n.kwargs) for n in attentions(rewrite)]
    found = {
        name: (call["attn_mask"], call["is_causal"], call["scale"]) for name, call in zip(masks, calls, strict=True)
    }
    assert found == dict.fromkeys(masks, (None, causal, 0.3)) and rewrite.counts["causal_attention"] == len(masks)
    assert_no_mask_is_left(rewrite)
    assert_true_metadata(rewrite)
    for y, wanted in zip(run(rewrite), each(masks)(*inputs), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    assert_idempotent(rewrite)


@pytest.mark.parametrize("dynamic", [None, True])
def test_causal_masks_of_any_size(dynamic):
    model, inputs = each(PROVED), operands()
    rewrite = capture(model, *inputs, dynamic=dynamic)
    assert [is_causal(n.kwargs["attn_mask"]) for n in attentions(rewrite)] == [True] * len(PROVED)
    if not dynamic:
        return assert_all_simplified(PROVED, inputs, True)
    apply_passes(rewrite, (CAUSAL_ATTENTION,))
    assert {(n.kwargs["attn_mask"], n.kwargs["is_causal"]) for n in attentions(rewrite)} == {(None, True)}
    sizes_and_tensors = [x if isinstance(x, torch.Tensor) else int(x) for x in arguments(rewrite)]
    for y, wanted in zip(rewrite.gm(*sizes_and_tensors), model(*inputs), strict=True):
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)


def test_causal_masks_of_static_size():
    assert_all_simplified(COMPUTED, operands(), True)


@pytest.mark.parametrize("keys", [Q, 33])
def test_masks_that_hide_nothing(keys):
    assert_all_simplified(ALL, operands(keys=keys), False)


def test_positional_arguments():
    def model(q, k, v):
        return sdpa(q, k, v, transformers_like(q, k), 0.0, False, scale=0.3)

    inputs = operands(heads=H)
    assert_simplified(rewritten(model, *inputs), model, inputs, True)


def compare(offset=0, window=None, prefix=None):
    """``k <= q + offset`` within a window, or in a prefix."""

    def mask(q, k):
        i, j = positions(q.shape[2])[:, None], positions(k.shape[2])[None, :]
        result = j <= i + offset
        result = result if window is None else result & (j > i - window)
        return result if prefix is None else result | (j < prefix)

    return mask


def written_through_a_view(q, k):
    mask = torch.ones(Q, Q, dtype=torch.bool).tril()
    mask.view(-1)[:7].fill_(True)
    return mask


def written_by_index(q, k):
    mask = torch.ones(Q, Q, dtype=torch.bool).tril()
    mask[2, 5] = True
    return mask


def written_positions(q, k):
    i = torch.arange(Q)
    j = i.unsqueeze(0)
    i[3:].add_(1)
    return j <= torch.arange(Q)[:, None]


def gathered_backwards(q, k):
    i = torch.arange(Q)
    return i[Q - 1 - i][None, :] <= i[:, None]


def packed(q, k):
    ids = torch.cat([torch.arange(12), torch.arange(Q - 12)])[None]
    document = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)[0]
    return (document[:, None] == document) & (positions(Q) <= positions(Q)[:, None])


NEVER = {
    "sliding-window": (compare(window=5), {}),
    "next-token-too": (compare(offset=1), {}),
    "strictly-before": (compare(offset=-1), {}),
    "prefix": (compare(prefix=4), {}),
    "packed": (packed, {}),
    "wide": (compare(), dict(keys=Q + 5)),
    "wide-bottom-right": (compare(offset=5), dict(keys=Q + 5)),
    "tall": (compare(), dict(q_len=Q + 5)),
    "float-bias": (lambda q, k: -(positions(Q)[:, None] - positions(Q)).abs().float(), {}),
    "barely-hidden": (lambda q, k: torch.full((Q, Q), -1e4).triu(1), {}),
    "random": (lambda q, k: torch.rand(Q, Q) > 2, {}),
    "of-the-data": (lambda q, k: (q[:, :1, :, :1] * 0 == 0) & compare()(q, k), {}),
    "view-written": (written_through_a_view, {}),
    "index-written": (written_by_index, {}),
    "positions-written": (written_positions, {}),
    "backwards": (gathered_backwards, {}),
    "off": (compare(), {"intscale.disable_passes": ["causal_attention"]}),
}


@pytest.mark.parametrize("dynamic", [None, True])
def test_left_alone(dynamic):
    """All masks of one size in one graph."""
    sizes = {(rest.get("q_len", Q), rest.get("keys", Q)) for _, rest in NEVER.values()}
    for q_len, keys in sizes:
        masks = {
            name: mask
            for name, (mask, rest) in NEVER.items()
            if (rest.get("q_len", Q), rest.get("keys", Q)) == (q_len, keys) and name != "off"
        }
        rewrite = capture(each(masks), *operands(q_len, keys), dynamic=dynamic)
        before = rewrite.gm.code
        apply_passes(rewrite, (CAUSAL_ATTENTION,))
        still = {name for name, n in zip(masks, attentions(rewrite), strict=True) if n.kwargs["attn_mask"] is not None}
        assert still == set(masks)
        assert rewrite.counts["causal_attention"] == 0 and rewrite.gm.code == before


def test_off():
    mask, options = NEVER["off"]
    rewrite = rewritten(attend(mask), *operands(), **options)
    assert rewrite.counts["causal_attention"] == 0 and the_call(rewrite)["attn_mask"] is not None


@pytest.mark.parametrize("change", ["argument", "position_ids"])
def test_a_mask_that_the_caller_decides_is_left_alone(change):
    def model(q, k, v, given):
        i = torch.arange(Q)
        mask = (i <= i[:, None]) & given if change == "argument" else given <= given[:, None]
        return sdpa(q, k, v, mask)

    given = torch.ones(Q, dtype=torch.bool) if change == "argument" else torch.arange(Q)
    rewrite = rewritten(model, *operands(heads=H), given)
    assert rewrite.counts["causal_attention"] == 0 and the_call(rewrite)["attn_mask"] is not None


def test_one_query_is_left_alone():
    rewrite = rewritten(attend(lambda q, k: torch.ones(1, Q, dtype=torch.bool)), *operands(q_len=1))
    assert rewrite.counts["causal_attention"] == 0


def test_large_masks_are_not_computed(monkeypatch):
    monkeypatch.setattr(constant_mask, "MOST_ELEMENTS", Q * Q - 1)
    assert rewritten(attend(COMPUTED["tril"]), *operands()).counts["causal_attention"] == 0
    assert rewritten(attend(PROVED["transformers"]), *operands()).counts["causal_attention"] == 1


def test_one_mask_of_many_layers_is_computed_once(monkeypatch):
    kinds = []
    original = constant_mask.kind_of
    monkeypatch.setattr(constant_mask, "kind_of", lambda mask: kinds.append(original(mask)) or kinds[-1])

    def model(q, k, v):
        mask = COMPUTED["tril"](q, k)
        for _ in range(3):
            q = sdpa(q, repeat(k), repeat(v), mask)
        return q, mask

    rewrite = rewritten(model, *operands())
    assert rewrite.counts["causal_attention"] == 3 and kinds == ["causal"]
    assert torch.equal(run(rewrite)[1], COMPUTED["tril"](None, None))  # still read by the output


def test_shared_heads_are_not_copied_where_flash_attention_runs(monkeypatch):
    monkeypatch.setattr(causal_attention, "_flash_can_read", lambda x: True)
    model, inputs = attend(transformers_like), operands()
    rewrite = rewritten(model, *inputs)
    call = the_call(rewrite)
    assert [call[name].op for name in ("query", "key", "value")] == ["placeholder"] * 3 and call["enable_gqa"] is True
    assert not any("expand" in n.name or "reshape" in n.name for n in rewrite.graph.nodes)
    assert_simplified(rewrite, model, inputs, True)


def test_flash_attention_is_only_expected_on_nvidia():
    from tests.support.fake_cuda import fake_cuda, fake_inputs

    (bf16, wide, fp32), mode = fake_inputs(
        [((1, 2, 8, 128), torch.bfloat16), ((1, 2, 8, 512), torch.bfloat16), ((1, 2, 8, 64), torch.float32)]
    )
    with fake_cuda():
        able = [causal_attention._flash_can_read(x) for x in (bf16, wide, fp32, torch.empty(1))]
    assert able == [True, False, False, False]


@pytest.mark.generated
def test_gradients_are_the_same():
    q, k, v = (x.requires_grad_() for x in operands())
    model, gradients = attend(transformers_like), []
    for call in (model, torch.compile(model, backend=backend.intscale, fullgraph=True, dynamic=True)):
        call(q, k, v).square().sum().backward()
        gradients.append([x.grad.clone() for x in (q, k, v)])
        for x in (q, k, v):
            x.grad = None
    torch._dynamo.reset()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def op_by_op(gm, inputs, options=None):
    """The backend without Inductor."""
    rewrite = backend.rewrite_graph(gm, inputs, parse_options(None, options)[0])
    return bind(rewrite, lambda graph, _: graph.forward)


ALL_FORMS = [(family, dynamic) for family in ("Llama", "Mistral") for dynamic in (False, True)]


@pytest.mark.parametrize(
    "family, dynamic, compiler",
    [
        ("Llama", True, op_by_op),
        *(pytest.param(*form, backend.intscale, marks=pytest.mark.slow) for form in ALL_FORMS),
    ],
)
def test_whole_model(family, dynamic, compiler, monkeypatch):
    """Mistral's window of 8 is shorter than the text: there nothing may change."""
    transformers = pytest.importorskip("transformers")
    window = {"sliding_window": 8} if family == "Mistral" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, use_cache=False, attn_implementation="sdpa", **window,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    original, counts = backend.rewrite_graph, []

    def spy(*arguments):
        rewrite = original(*arguments)
        counts.append(rewrite.counts["causal_attention"])
        return rewrite

    monkeypatch.setattr(backend, "rewrite_graph", spy)
    torch._dynamo.reset()
    compiled = functools.partial(compiler, options={"intscale.quantize_plain": False})
    run_model = torch.compile(model, backend=compiled, fullgraph=True, dynamic=dynamic)
    for length in (24, 40) if dynamic else (24,):
        ids = torch.randint(0, 128, (2, length))
        with torch.no_grad():
            torch.testing.assert_close(run_model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert set(counts) == {int(family == "Llama")}
