"""Weights that became row slices of a merged one: copied, saved and loaded like any other."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from intscale_compile import IntScaleTensor, load_safetensors, save_safetensors
from tests.support.joined import NAMES, QUICK, Attention, X, live_bytes, memory_of, rewritten


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def used():
    model = Attention()
    rewritten(model)(X)
    assert memory_of(model.q.weight.qdata) == memory_of(model.k.weight.qdata)
    return model


def test_deepcopy_of_a_layer_takes_only_its_rows():
    model = used()
    layer, whole = copy.deepcopy(model.k), copy.deepcopy(model)
    assert layer.weight.qdata.untyped_storage().nbytes() == model.k.weight.qdata.nbytes
    assert isinstance(layer.weight, nn.Parameter) and isinstance(layer.weight, IntScaleTensor)
    expected = model(X)
    model.k.weight.qdata.fill_(0x88)
    assert torch.equal(whole(X), expected) and torch.equal(rewritten(whole)(X), expected)
    assert torch.equal(layer(X), expected[:, 128:192])


def test_torch_save_stores_merged_weights_once(tmp_path):
    fresh, model = io.BytesIO(), io.BytesIO()
    one = Attention()
    torch.save(one.state_dict(), fresh)
    rewritten(one)(X)
    torch.save(one.state_dict(), model)
    assert model.tell() < fresh.tell() * 1.1 + 4096
    model.seek(0)
    loaded = Attention()
    loaded.load_state_dict(torch.load(model, weights_only=True), assign=True)
    expected, before = one(X), live_bytes()
    run = rewritten(loaded)
    assert torch.equal(loaded(X), expected) and torch.equal(run(X), expected)
    assert live_bytes() - before < 4096  # the slices of one file are joined as they lie
    loaded.k.weight.qdata.fill_(0x88)
    assert torch.equal(run(X), loaded(X))


def test_safetensors_after_merging(tmp_path):
    model = used()
    save_safetensors(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        fresh = Attention(config=None)
    fresh.load_state_dict(load_safetensors(tmp_path / "m.safetensors"), assign=True)
    assert torch.equal(fresh(X), model(X)) and torch.equal(rewritten(fresh)(X), model(X))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_save_pretrained_after_a_compiled_run(shard, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from intscale_compile import save_pretrained

    torch.manual_seed(1)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **size)).eval()
    quantize_(model, QUICK)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        rewritten(lambda tokens: model(tokens, use_cache=False).logits)(tokens)
        attention = model.model.layers[0].self_attn
        assert memory_of(attention.q_proj.weight.qdata) == memory_of(attention.v_proj.weight.qdata)
        save_pretrained(model, tmp_path, max_shard_size=shard)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        if isinstance(tensor, IntScaleTensor):
            assert all(torch.equal(getattr(found, part), getattr(tensor, part)) for part in NAMES), name
