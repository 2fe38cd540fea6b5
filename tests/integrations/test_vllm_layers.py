"""The plugin's layers without vLLM: loading, packing for the device, bits, and CUDA graphs on a GPU, with stand-ins for vLLM."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from intscale_compile import IntScaleConfig, IntScaleTensor
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


def replayed(call, device: str):
    """What ``call`` gives, once from a CUDA graph on a GPU."""
    if device == "cpu":
        return call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is prepared at the first call is no part of a graph
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
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
        for tokens in (1, 17, 300):
            x = torch.randn(tokens, 256, device=device, dtype=dtype)
            bias = torch.randn(384, device=device, dtype=dtype)
            apart = torch.cat([F.linear(x, part.to(device)) for part in parts], dim=1)
            assert torch.equal(replayed(lambda x=x, m=method, la=layer: m.apply(la, x), device), apart), (name, tokens)
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
        y = replayed(lambda x=x, w=weights, i=ids, m=method, la=layer: m.apply(la, x, w, i), device)
        every = []
        for expert in experts:
            gate, up = (F.linear(x, expert[key].to(device)) for key in ("w1", "w3"))
            every.append(F.linear(F.silu(gate) * up, expert["w2"].to(device)))
        chosen = torch.stack(every)[ids.long(), torch.arange(33, device=device)[:, None]]
        assert torch.equal(y, (chosen * weights[..., None]).sum(dim=1).to(dtype)), name
