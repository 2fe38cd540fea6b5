"""One rank: PyTorch's own tensor parallelism and ours on a small module. Prints nothing; returns what was seen."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402, F401 (once, before the ranks are forked)
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module  # noqa: E402
from torchao.quantization import quantize_  # noqa: E402

import intscale_compile  # noqa: E402
from intscale_compile import IntScaleConfig, IntScaleTensor, tensor_parallel  # noqa: E402
from intscale_compile.errors import IntScaleError  # noqa: E402
from intscale_compile.parallel.sharding import shard  # noqa: E402
from intscale_compile.versions import version_of  # noqa: E402
from tests.support.ranks import main  # noqa: E402

STYLES = {"gate": ColwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}
PLAN = {"gate": "colwise", "up": "colwise", "down": "rowwise"}


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.gate, self.up = nn.Linear(256, 512, bias), nn.Linear(256, 512, bias=False)
        self.down = nn.Linear(512, 256, bias)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fused, self.mix = nn.Linear(256, 512), nn.Linear(256, 256)
        self.head = nn.Linear(256, 192)

    def forward(self, x):
        gate, up = self.fused(x).chunk(2, -1)
        return self.head(self.mix(x) + nn.functional.silu(gate).sum(-1, keepdim=True) * up.mean(-1, keepdim=True))


def quantized(seed: int = 0, **config) -> MLP:
    torch.manual_seed(seed)
    model = MLP().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(**config))
    return model


def divided_by_hand(model: MLP, x: torch.Tensor, ranks: int, spread: bool) -> torch.Tensor:
    """What the ranks compute, one after another. ``spread``: the bias is divided among them, else the first adds it."""
    total = 0
    for rank in range(ranks):
        rows = slice(rank * 512 // ranks, (rank + 1) * 512 // ranks)
        gate = nn.functional.linear(x, shard(model.gate.weight, 0, rank, ranks), model.gate.bias[rows])
        up = nn.functional.linear(x, shard(model.up.weight, 0, rank, ranks))
        bias = model.down.bias / ranks if spread else model.down.bias * (rank == 0)
        total = total + nn.functional.linear(
            nn.functional.silu(gate) * up, shard(model.down.weight, 1, rank, ranks), bias
        )
    return total


def caught(function) -> str:
    try:
        function()
    except IntScaleError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def torch_engine(mesh, x, seen: dict) -> None:
    ranks = mesh.size()
    whole = quantized()
    expected = divided_by_hand(whole, x, ranks, spread=True)
    for source in (0, None):
        model = quantized(seed=dist.get_rank() if source == 0 else 0)  # what rank 0 has is sent
        model = parallelize_module(model, mesh, {n: s() for n, s in STYLES.items()}, src_data_rank=source)
        assert all(isinstance(m.weight, DTensor) for m in (model.gate, model.up, model.down))
        seen[f"local type {source}"] = type(model.gate.weight.to_local()).__name__
        seen[f"eager {source}"] = torch.equal(model(x), expected)
        with torch.inference_mode():
            found = caught(lambda: seen.update({f"inference mode {source}": torch.equal(model(x), expected)}))  # noqa: B023
        if version_of("torch") >= (2, 14):  # DTensor would give each rank other columns of the weight
            assert "torch.no_grad() instead of torch.inference_mode()" in found, found
            seen[f"inference mode {source}"] = True
    seen["unsharded"] = float((expected - whole(x)).norm() / whole(x).norm())
    with torch.no_grad():
        compiled = torch.compile(model, backend="intscale", fullgraph=True)
        difference = compiled(x) - expected
        seen["compiled"] = float(difference.norm() / expected.norm())
        model.down.weight.to_local().per_tensor_scale.mul_(2)  # compiled graphs see writes to the shards
        again = (compiled(x) - whole.down.bias) - 2 * (expected - whole.down.bias)
        seen["compiled after a write"] = float(again.norm() / expected.norm())
        model.down.weight.to_local().per_tensor_scale.div_(2)
    report = intscale_compile.explain(model, x)
    seen["layers"] = [(layer.name, layer.shape, layer.quantized) for layer in report.layers]
    seen["gemms"], seen["passes"] = report.gemms, report.pass_counts
    seen["fraction"] = (report.quantized_parameters, report.parameters)


def with_gradients(mesh, x, seen: dict) -> None:
    """Sharded models are for inference: a gradient is refused, never wrong."""
    model = parallelize_module(quantized(), mesh, {n: s() for n, s in STYLES.items()}, src_data_rank=None)
    local = tensor_parallel.parallelize(quantized(), mesh, PLAN)
    seen["trained"] = any(p.requires_grad for p in local.parameters())
    leaf = x.clone().requires_grad_()
    seen["gradient of a DTensor"] = caught(lambda: model(leaf).sum().backward())
    seen["gradient of a shard"] = caught(lambda: local(leaf))
    compiled = torch.compile(model, backend="intscale", fullgraph=True)
    with torch.no_grad():
        seen["no gradient wanted"] = float((compiled(leaf) - model(x)).norm() / model(x).norm())


def distributed(mesh, seen: dict) -> None:
    torch.manual_seed(0)
    weight = IntScaleTensor.from_hp(torch.randn(64, 192), IntScaleConfig(64))
    seen["cut by distribute_tensor"] = caught(lambda: distribute_tensor(weight, mesh, [Shard(1)], src_data_rank=None))
    copy = distribute_tensor(weight if dist.get_rank() == 0 else weight.clone(), mesh, [Replicate()])
    seen["replicated"] = torch.equal(copy.to_local().qdata, weight.qdata)
    x = torch.randn(4, 192)
    on_mesh = DTensor.from_local(x, mesh, [Replicate()])
    seen["replicated product"] = torch.equal((on_mesh @ copy.t()).to_local(), x @ weight.t())
    wide = IntScaleTensor.from_hp(torch.randn(64, 192), IntScaleConfig(64, scale_bits=8))
    sent = wide.replaced(scale_bits=4) if dist.get_rank() else wide
    message = caught(lambda: distribute_tensor(sent, mesh, [Replicate()]))
    seen["ranks that disagree"] = message if dist.get_rank() else "rank 0 sends"


def own_engine(mesh, x, folder: Path, seen: dict) -> None:
    ranks = mesh.size()
    model = quantized()
    expected = divided_by_hand(model, x, ranks, spread=False)
    path = folder / "mlp.safetensors"
    if dist.get_rank() == 0:
        intscale_compile.save_safetensors(model, path)
    dist.barrier()
    for group in (None, mesh, mesh.get_group()):
        local = tensor_parallel.parallelize(quantized(), group, PLAN)
        seen[f"own {type(group).__name__}"] = torch.equal(local(x), expected)
    with torch.no_grad():
        compiled = torch.compile(local, backend="intscale", fullgraph=True)
        seen["own compiled"] = float((compiled(x) - expected).norm() / expected.norm())
    with torch.device("meta"):
        empty = MLP().eval()
    loaded = tensor_parallel.from_safetensors(empty, path, mesh, PLAN)
    seen["loaded"] = torch.equal(loaded(x), expected)
    seen["loaded shapes"] = [tuple(p.shape) for p in loaded.parameters()]
    torch.manual_seed(1)
    head = Head().eval().requires_grad_(False)
    quantize_(head, IntScaleConfig(64))
    reference = head(x)
    plan = {"fused": "packed_colwise", "head": "colwise_gather_output", "mix": "rowwise_split_input"}
    output = tensor_parallel.parallelize(head, mesh, {k: v for k, v in plan.items() if k != "fused"})(x)
    seen["gathered"] = float((output - reference).norm() / reference.norm())
    fused = tensor_parallel.parallelize(quantized_fused(), mesh, {"fused": "packed_colwise"}).fused
    both = quantized_fused().fused
    half = 256 // ranks
    rank = dist.get_rank()
    rows = [*range(rank * half, (rank + 1) * half), *range(256 + rank * half, 256 + (rank + 1) * half)]
    seen["packed"] = torch.equal(fused(x), both(x)[..., rows])


def quantized_fused() -> Head:
    torch.manual_seed(1)
    head = Head().eval().requires_grad_(False)
    quantize_(head, IntScaleConfig(64))
    return head


def refused(mesh, folder: Path, seen: dict) -> None:
    model = quantized(group_size=256)
    model.down = nn.Linear(768, 256)
    quantize_(model.down, IntScaleConfig(256))
    before = {name: id(p) for name, p in model.named_parameters()}
    seen["cut"] = caught(lambda: tensor_parallel.parallelize(model, mesh, PLAN))
    seen["untouched"] = before == {name: id(p) for name, p in model.named_parameters()}
    seen["style"] = caught(lambda: tensor_parallel.parallelize(model, mesh, {"gate": "columns"}))
    seen["name"] = caught(lambda: tensor_parallel.parallelize(model, mesh, {"gates": "colwise"}))
    seen["no plan"] = caught(lambda: tensor_parallel.parallelize(model, mesh))
    seen["module"] = caught(lambda: tensor_parallel.parallelize(nn.Sequential(nn.SiLU()), mesh, {"0": "colwise"}))
    wide = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))
    seen["mesh"] = caught(lambda: tensor_parallel.parallelize(model, wide, PLAN))
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    seen["one rank"] = type(tensor_parallel.parallelize(quantized(), alone, PLAN).gate._forward_hooks).__name__
    seen["lacking"] = caught(
        lambda: tensor_parallel.from_safetensors(MLP(False), folder / "mlp.safetensors", mesh, PLAN)
    )


def run(folder: str) -> dict:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(5)
    x = torch.randn(2, 8, 256)
    seen: dict = {}
    torch_engine(mesh, x, seen)
    with_gradients(mesh, x, seen)
    distributed(mesh, seen)
    own_engine(mesh, x, Path(folder), seen)
    refused(mesh, Path(folder), seen)
    return seen


if __name__ == "__main__":
    main(run)
