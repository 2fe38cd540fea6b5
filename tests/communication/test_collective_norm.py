"""A lossless sum with the residual, RMSNorm and quantization that follow it: what the pass matches, and the arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig
from intscale_compile.communication.choice import Plan
from intscale_compile.communication.fused_norm import ALL_REDUCE_NORM_QUANTIZE, norm_quantize
from intscale_compile.debug import last_compilation
from intscale_compile.passes import quantize_collectives


class Norm(nn.Module):
    """RMSNorm as transformers writes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        values = x.to(torch.float32)
        return self.weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    """A sum over ranks, a residual and a quantized product of its norm; ``other``: the norm has another reader."""

    def __init__(self, other=False):
        super().__init__()
        self.norm, self.other = Norm(), other
        self.proj = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x, residual):
        residual = residual + fc.all_reduce(x * 2, "sum", dist.group.WORLD)
        y = self.norm(residual)
        out = self.proj(y) + residual
        return out + y if self.other else out


@pytest.fixture
def group(monkeypatch):
    """A group of four ranks of which only this one exists, between which one step is the fastest."""
    torch._dynamo.reset()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    monkeypatch.setattr(quantize_collectives, "plan", lambda *_: Plan(((0, "one_shot"),), "measured"))
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch._dynamo.reset()


def compiled(model, *inputs, **options):
    """Result, how the collective was decided and the generated code."""
    torch._dynamo.reset()
    forced = {"intscale.force_passes": ["collective_norm"]}
    options = {"intscale.communication": "auto", "fx_graph_cache": False, **forced, **options}
    out = torch.compile(model, backend="intscale", options=options, dynamic=False)(*inputs)
    found = last_compilation()[-1]
    return out, found.collectives[0].decision, "".join(kernel.code for kernel in found.kernels)


def test_a_sum_takes_along_what_follows_it(group):
    model, (x, residual) = Block(), torch.randn(2, 3, 64).bfloat16()
    quantize_(model, IntScaleConfig(32))
    out, decision, code = compiled(model, x, residual)
    assert decision == "one_shot with norm"
    assert "all_reduce_norm_quantize.default(" in code and "planned_all_reduce.default(" not in code
    for off in ({"intscale.disable_passes": ["collective_norm"]}, {"intscale.force_passes": []}):
        apart, decision, code = compiled(model, x, residual, **off)
        assert decision == "one_shot" and "all_reduce_norm_quantize" not in code
    assert (out - apart).float().norm() < 0.01 * apart.float().norm()  # a code at a half may be rounded the other way


def test_a_norm_with_another_reader_stays(group):
    model, (x, residual) = Block(other=True), torch.randn(2, 3, 64).bfloat16()
    quantize_(model, IntScaleConfig(32))
    assert compiled(model, x, residual)[1] == "one_shot"


def test_the_op_without_symmetric_memory(group):
    x, residual, weight = torch.randn(3, 4, 64).bfloat16().unbind(0)
    torch.library.opcheck(ALL_REDUCE_NORM_QUANTIZE, (x, residual, weight[0], 1e-5, group.group_name))
    found = ALL_REDUCE_NORM_QUANTIZE(x, residual, weight[0], 1e-5, group.group_name)
    assert all(torch.equal(one, other) for one, other in zip(found, norm_quantize(x, residual, weight[0], 1e-5)))
    added, codes, scale = found
    assert torch.equal(added, residual + x) and codes.abs().amax(-1).eq(127).all() and scale.shape == (4, 1)
    y = torch.nn.functional.rms_norm(added.float(), (64,), eps=1e-5) * weight[0].float()
    assert ((codes * scale - y).norm() / y.norm()) < 0.02
