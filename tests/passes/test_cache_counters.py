"""The pass that advances the counters of a static cache together: what it takes, and every order that it must respect."""

from __future__ import annotations

import pytest
import torch

from intscale_compile.passes import GraphRewrite, apply_passes
from intscale_compile.passes.model.cache_counters import CACHE_COUNTERS
from tests.support.graphs import arguments, assert_true_metadata, capture, count, run


def counters(number=3, dtype=torch.int64):
    return [torch.tensor(5 + i, dtype=dtype) for i in range(number)]


def rewritten(model, inputs) -> GraphRewrite:
    rewrite = capture(model, *inputs)
    apply_passes(rewrite, (CACHE_COUNTERS,))
    return rewrite


def assert_same_effect(rewrite, model, inputs) -> None:
    """Results, and what is written into the inputs, equal those of the model itself."""
    before = [x.clone() for x in inputs]
    expected = model(*inputs)
    written = [x.clone() for x in inputs]
    for x, value in zip(inputs, before):
        x.copy_(value)
    found = run(rewrite)  # on the inputs that the graph was captured with
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(inputs, written))


def advance(x, *lengths):
    """As transformers' StaticCache: the position is computed first."""
    out = []
    for length in lengths:
        position = torch.arange(1) + length
        length.add_(1)
        out.append(x + position)
    return out


def test_counters_are_advanced_together():
    inputs = [torch.randn(4), *counters()]
    rewrite = rewritten(advance, inputs)
    assert rewrite.counts["cache_counters"] == 3
    assert count(rewrite, torch._foreach_add_) == 1 and "add_" not in {n.target for n in rewrite.graph.nodes}
    assert_true_metadata(rewrite)
    assert_same_effect(rewrite, advance, inputs)
    again = GraphRewrite(rewrite.gm, arguments(rewrite), rewrite.settings)
    apply_passes(again, (CACHE_COUNTERS,))
    assert again.counts["cache_counters"] == 0


def test_amounts_and_dtypes_are_kept_apart():
    def model(x, a, b, c, d, e):
        a.add_(1)
        b.add_(2)
        c.add_(1)
        d.add_(2)
        e.add_(1)
        return [x + 1]

    inputs = [torch.randn(4), *counters(4), torch.tensor(3, dtype=torch.int32)]
    rewrite = rewritten(model, inputs)
    assert rewrite.counts["cache_counters"] == 4 and count(rewrite, torch._foreach_add_) == 2
    assert_same_effect(rewrite, model, inputs)


def read_later(x, a, b, c):
    a.add_(1), b.add_(1), c.add_(1)
    return [x + a]


def read_through_a_view(x, a, b, c):
    view = a.view(1)
    a.add_(1), b.add_(1), c.add_(1)
    return [x + view]


def returned_from_the_addition(x, a, b, c):
    b.add_(1), c.add_(1)
    return [a.add_(1) * 1, x + 1]


def advanced_twice(x, a, b, c):
    a.add_(1), b.add_(1), c.add_(1)
    a.add_(1)
    return [x + 1]


def written_later(x, a, b, c):
    a.add_(1), b.add_(1), c.add_(1)
    a.mul_(2)
    return [x + 1]


@pytest.mark.parametrize(
    "model, taken",
    [
        (read_later, 2),
        (read_through_a_view, 2),
        (returned_from_the_addition, 2),
        (advanced_twice, 3),  # the second addition: nothing reads after it
        (written_later, 2),
    ],
)
def test_the_order_of_reads_and_writes_is_kept(model, taken):
    inputs = [torch.randn(4), *counters()]
    rewrite = rewritten(model, inputs)
    assert rewrite.counts["cache_counters"] == taken
    assert_same_effect(rewrite, model, inputs)


def test_inputs_that_share_memory_are_left_alone():
    memory = torch.arange(2)

    def model(x, a, b, c, d):
        a.add_(1), c.add_(1), d.add_(1)
        return [x + b]

    rewrite = rewritten(model, [torch.randn(4), memory[0], memory[0:1], *counters(2)])
    assert rewrite.counts["cache_counters"] == 2


@pytest.mark.parametrize(
    "make", [lambda: torch.tensor(1.0), lambda: torch.zeros(4, dtype=torch.int64)], ids=["float", "many elements"]
)
def test_other_tensors_are_left_alone(make):
    def model(x, a, b):
        a.add_(1), b.add_(1)
        return [x + 1]

    assert rewritten(model, [torch.randn(4), make(), make()]).counts["cache_counters"] == 0


def test_one_counter_alone_stays_where_it_is():
    rewrite = rewritten(advance, [torch.randn(4), *counters(1)])
    assert rewrite.counts["cache_counters"] == 0 and count(rewrite, torch._foreach_add_) == 0


def test_every_layer_of_a_whole_model():
    """One step of transformers' own code, as Dynamo sees it: the same logits, and each counter advanced once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, vocab_size=64
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    model(torch.ones(1, 4, dtype=torch.long), past_key_values=cache)

    def step(token, position):
        return model(token, past_key_values=cache, position_ids=position).logits

    rewrite = rewritten(step, [torch.tensor([[5]]), torch.tensor([[4]])])  # runs once, unchanged
    assert rewrite.counts["cache_counters"] == 3 and count(rewrite, torch._foreach_add_) == 1
    for layer in cache.layers:
        assert int(layer.cumulative_length) == 5
        layer.cumulative_length.sub_(1)
    (logits,) = run(rewrite)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [5, 5, 5]
    for layer in cache.layers:
        layer.cumulative_length.sub_(1)
    torch.testing.assert_close(logits, step(torch.tensor([[5]]), torch.tensor([[4]])))
