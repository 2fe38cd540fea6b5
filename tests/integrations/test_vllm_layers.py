"""The plugin's layers without vLLM: loading, packing for the device, bits, and CUDA graphs on a GPU, with stand-ins for vLLM."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.errors import ConfigError
from tests.support import vllm_stand_ins

FOUND = importlib.util.find_spec("vllm")  # without a file: the folder tests/vllm
pytestmark = pytest.mark.skipif(
    FOUND is not None and FOUND.origin is not None, reason="vLLM itself is there: tests/vllm"
)
DEVICES = [
    pytest.param("cpu", torch.float32, id="cpu"),
    pytest.param(
        "cuda",
        torch.bfloat16,
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        id="cuda",
    ),
]
FORMATS = {
    "128": IntScaleConfig(),
    "32": IntScaleConfig(group_size=32),
    "channel": IntScaleConfig(group_size=-1),
    "8-bit scales": IntScaleConfig(scale_bits=8),
    "W8A8": IntScaleConfig(weight_bits=8, group_size=-1),
}


def packed(rows: int, features: int, config: IntScaleConfig, dtype: torch.dtype) -> IntScaleTensor:
    """A random weight as a checkpoint holds it."""
    return IntScaleTensor.from_hp((torch.randn(rows, features) / features**0.5).to(dtype), config)


def replayed(call, inputs, device: str):
    """What ``call`` gives for ``inputs``; on a GPU from a CUDA graph that was captured with zeros, as vLLM's of a batch size."""
    if device == "cpu":
        return call(*inputs)
    static = [torch.zeros_like(x) for x in inputs]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is prepared at the first call is no part of a graph
        call(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(*static)
    for kept, x in zip(static, inputs):
        kept.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return y


@pytest.mark.parametrize("device,dtype", DEVICES)
def test_merged_linears_have_the_bits_of_their_parts(device, dtype, monkeypatch):
    vllm_stand_ins.install(monkeypatch, device)
    torch.manual_seed(0)
    for name, config in FORMATS.items():
        parts = [packed(rows, 256, config, dtype) for rows in (256, 64, 64)]
        layer, method = vllm_stand_ins.merged_linear(parts, dtype)
        assert len(method.forms) == 1 and method.forms[0].out_features == 384, name
        assert method.forms[0].packing == ("tiled" if device == "cuda" else "plain"), name
        assert all(p.device.type == device and not p.requires_grad for p in layer.parameters()), name
        # Adapters ask for it, and latent attention; no parameter of its own.
        assert layer.weight_packed is layer.intscale0_qdata and "weight_packed" not in dict(layer.named_parameters())
        for tokens in (1, 17, 300):
            x = torch.randn(tokens, 256, device=device, dtype=dtype)
            bias = torch.randn(384, device=device, dtype=dtype)
            apart = torch.cat([F.linear(x, part.to(device)) for part in parts], dim=1)
            assert torch.equal(replayed(lambda x, m=method, la=layer: m.apply(la, x), [x], device), apart), (
                name,
                tokens,
            )
            whole = F.linear(x, torch.cat(parts).to(device), bias)
            assert torch.equal(method.apply(layer, x, bias), whole), (name, tokens)


@pytest.mark.parametrize("device,dtype", DEVICES)
def test_experts_have_the_bits_of_single_linears(device, dtype, monkeypatch):
    vllm_stand_ins.install(monkeypatch, device)
    torch.manual_seed(0)
    for name in ("128", "W8A8"):
        shapes = dict(w1=(128, 256), w3=(128, 256), w2=(256, 128))
        experts = [{key: packed(*shape, FORMATS[name], dtype) for key, shape in shapes.items()} for _ in range(4)]
        layer, method = vllm_stand_ins.routed_experts(experts)
        assert not hasattr(layer, "w13_weight") and all(p.device.type == device for p in layer.parameters())
        x = torch.randn(33, 256, device=device, dtype=dtype)
        ids = torch.stack([torch.randperm(4)[:2] for _ in range(33)]).to(device, torch.int32)
        weights = torch.rand(33, 2, device=device)
        y = replayed(lambda x, w, i, m=method, la=layer: m.apply(la, x, w, i), [x, weights, ids], device)
        every = []
        for expert in experts:
            gate, up = (F.linear(x, expert[key].to(device)) for key in ("w1", "w3"))
            every.append(F.linear(F.silu(gate) * up, expert["w2"].to(device)))
        chosen = torch.stack(every)[ids.long(), torch.arange(33, device=device)[:, None]]
        assert torch.equal(y, (chosen * weights[..., None]).sum(dim=1).to(dtype)), name


def test_a_static_scale_where_vllm_reads_the_weight_by_unit_vectors_is_refused(monkeypatch):
    vllm_stand_ins.install(monkeypatch, "cpu")
    weight = packed(64, 256, IntScaleConfig(), torch.float32)
    vllm_stand_ins.merged_linear([weight], torch.float32, "layers.0.self_attn.kv_b_proj")
    with pytest.raises(ConfigError, match="kv_b_proj has a static activation scale"):
        static = weight.with_activation_scale(0.05)
        vllm_stand_ins.merged_linear([static], torch.float32, "layers.0.self_attn.kv_b_proj")


def test_adapters_of_experts_are_refused(monkeypatch):
    vllm_stand_ins.install(monkeypatch, "cpu")
    experts = [dict.fromkeys(("w1", "w2", "w3"), packed(128, 128, IntScaleConfig(), torch.float32))] * 2
    vllm_stand_ins.routed_experts(experts)
    with pytest.raises(ConfigError, match=r"experts with LoRA adapters \(--enable-lora\) are not served quantized"):
        vllm_stand_ins.routed_experts(experts, is_lora_enabled=True)
