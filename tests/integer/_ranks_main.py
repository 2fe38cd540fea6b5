"""One rank of an integer-only model that is divided: are its integers those of one rank? Returns what was seen."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torchao.quantization import quantize_  # noqa: E402

from intscale_compile import IntScaleConfig, IntScaleTensor, integer_only, tensor_parallel  # noqa: E402
from tests.support.ranks import main  # noqa: E402

PLAN = {"gate": "colwise", "up": "colwise", "down": "rowwise", "wide": "colwise", "narrow": "rowwise"}


class Block(nn.Module):
    """A gated layer, one with GELU and a bias, and one without an activation, each divided by its features."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 128), nn.RMSNorm(128)
        self.gate, self.up = (nn.Linear(128, 256, bias=False) for _ in range(2))
        self.down, self.wide, self.narrow = nn.Linear(256, 128), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, ids):
        x = self.table(ids)
        h = self.norm(x)
        x = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        return x + self.narrow(self.wide(x))


def quantized(rotation: int) -> Block:
    torch.manual_seed(0)
    model = Block().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(64))
    for linear in (model.down, model.narrow) if rotation else ():
        weight = torch.ops.intscale.hadamard(torch.randn(128, 256), rotation)
        rotated = IntScaleTensor.from_hp(weight, IntScaleConfig(64)).replaced(rotation=rotation)
        linear.weight = nn.Parameter(rotated, requires_grad=False)
    return model


def run(device: str, compiled: str) -> dict:
    """``device``: cpu, over gloo, or cuda, one GPU for each rank, over NCCL. Expected is what one rank computes on a CPU."""
    torch.set_num_threads(1)
    seen: dict = {}
    group = None
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
        group = dist.new_group(backend="nccl")
    ids = torch.arange(24).view(3, 8)
    for rotation in (0, 32):
        whole = quantized(rotation)
        divided = tensor_parallel.parallelize(copy.deepcopy(whole).to(device), group, PLAN)
        on_device = ids.to(device)
        with torch.no_grad():
            expected = integer_only.run_eagerly(whole)(ids)
            seen[f"eager {rotation}"] = torch.equal(integer_only.run_eagerly(divided)(on_device).cpu(), expected)
            seen[f"another sum would differ {rotation}"] = not torch.equal(divided(on_device).cpu(), whole(ids))
            if compiled == "compiled":
                run = torch.compile(divided, backend="intscale", options=integer_only.OPTIONS, fullgraph=True)
                seen[f"compiled {rotation}"] = torch.equal(run(on_device).cpu(), expected)
    seen["hash"] = integer_only.hash_logits(expected)
    return seen


if __name__ == "__main__":
    main(run, generated=True)
