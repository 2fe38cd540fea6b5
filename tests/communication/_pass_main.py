"""One of three ranks of ``test_pass``: every form of collective in one compiled graph, beside the plain ones."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch._inductor.compile_fx  # noqa: F401 (once, before the ranks are forked)
import torch._inductor.config
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import intscale_compile  # noqa: E402
from intscale_compile.communication import tune_link  # noqa: E402
from tests.support.ranks import main  # noqa: E402

FEATURES = 96
OPTIONS = {"intscale.quantize_plain": False, "intscale.communication_min_bytes": 0}


class Forms(nn.Module):
    """Functional, raw and DTensor collectives; 7 tokens of 96 features divide by no number of ranks."""

    def __init__(self, group):
        super().__init__()
        ranks = group.size()
        mesh = DeviceMesh.from_group(group, "cpu")
        torch.manual_seed(0)
        hidden = 12 * ranks
        mlp = nn.Sequential(nn.Linear(FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, FEATURES)).requires_grad_(False)
        self.mlp = parallelize_module(mlp, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        self.weight = nn.Parameter(torch.randn(FEATURES, FEATURES) * 0.1, requires_grad=False)
        self.group = group

    def forward(self, x, own):
        functional = fc.all_reduce(own @ self.weight, "sum", self.group)
        raw = own * 2 @ self.weight
        dist.all_reduce(raw, group=self.group)
        rows = self.group.size()
        scattered = fc.reduce_scatter_tensor((own @ self.weight).repeat(rows, 1), "sum", 0, self.group)
        gathered = fc.all_gather_tensor(own * 3, 0, self.group) @ self.weight
        logits = fc.all_gather_tensor(own @ self.weight, 0, self.group)
        return functional, raw, self.mlp(x), scattered, gathered, logits


def forms(*wires: str) -> dict:
    """Results by number of ranks, from two on; of the groups that this rank is in."""
    groups = [dist.new_group(list(range(2 + i))) for i in range(len(wires))]
    results = {}
    for group, wire in zip(groups, wires):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            results[group.size()] = _forms(group, wire)
    if groups[0] != dist.GroupMember.NON_GROUP_MEMBER:
        results[2] |= {"by_size": by_size(groups[0]), "tuned": tuned(groups[0])}
    return results


def _forms(group, wire: str) -> dict:
    torch._inductor.config.fallback_by_default = group.size() > 2  # C++ once
    model = Forms(group)
    x = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(1))
    own = torch.randn(7, FEATURES, generator=torch.Generator().manual_seed(2 + group.rank()))
    with torch.no_grad():
        plain = [y + 0 for y in model(x, own)]  # waits for what eager collectives left under way
        options = {**OPTIONS, "intscale.communication": wire}
        quantized = torch.compile(model, backend="intscale", fullgraph=True, options=options)(x, own)
    found = intscale_compile.debug.last_compilation()[-1]
    return {"plain": plain, "quantized": quantized, "collectives": found.collectives, "counts": dict(found.pass_counts)}


def by_size(group) -> list:
    """One graph for any number of tokens: below the threshold the plain sum, to the bit."""

    def f(own):
        return fc.all_reduce(own, "sum", group)

    threshold = 16 * FEATURES * 4
    options = {**OPTIONS, "intscale.communication": "int8", "intscale.communication_min_bytes": threshold}
    compiled = torch.compile(f, backend="intscale", fullgraph=True, dynamic=True, options=options)
    found, before = [], len(intscale_compile.debug.last_compilation())
    for tokens in (15, 16, 33):
        own = torch.randn(tokens, FEATURES, generator=torch.Generator().manual_seed(5 + group.rank()))
        found.append((tokens, compiled(own), f(own) + 0))
    return [len(intscale_compile.debug.last_compilation()) - before, found]


def tuned(group) -> dict:
    return tune_link(group, wires=["int8"], sizes=[4096, 65536], ops=["all_reduce", "all_gather"], progress=False)


if __name__ == "__main__":
    main(forms, generated=True)
