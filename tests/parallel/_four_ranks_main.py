"""One rank of four: sequence parallelism on a mesh of 2 x 2, saving of divided models, fewer key heads than ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch._inductor.compile_fx  # noqa: E402, F401 (once, before the ranks are forked)
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torchao.quantization import quantize_  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import intscale_compile  # noqa: E402
from intscale_compile import IntScaleConfig, IntScaleTensor, tensor_parallel  # noqa: E402
from intscale_compile.errors import IntScaleError  # noqa: E402
from tests.support.ranks import main  # noqa: E402

WIDTH, TOKENS = 128, 16


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 256, bias=bias), nn.Linear(WIDTH, 256, bias=False)
        self.down = nn.Linear(256, WIDTH, bias)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Norms on each rank's tokens, products on all of them."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.mlp, self.head = MLP(), nn.Linear(WIDTH, 64, bias=False)

    def forward(self, x):
        return self.head(self.last(x + self.mlp(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


SEQUENCE_PLAN = {
    "block": lambda: PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
    "block.norm": SequenceParallel,
    "block.mlp": lambda: PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "block.mlp.gate": ColwiseParallel,
    "block.mlp.up": ColwiseParallel,
    "block.mlp.down": lambda: RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "block.last": SequenceParallel,
    "block.head": lambda: ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def quantized(seed: int = 0, kind: Callable[[], nn.Module] = Model, group_size: int = 32) -> nn.Module:
    torch.manual_seed(seed)
    model = kind().eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(group_size))
    return model


def sequence_parallel(mesh, seed: int = 0) -> nn.Module:
    plan = {name: style() for name, style in SEQUENCE_PLAN.items()}
    return parallelize_module(quantized(seed), mesh, plan, src_data_rank=None)


def caught(function) -> str:
    try:
        function()
    except (IntScaleError, RuntimeError, dcp.api.CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


def same_bits(found: dict, wanted: dict) -> bool:
    def parts(value):
        if not isinstance(value, IntScaleTensor):
            return [value]
        return [getattr(value, name) for name in value.data_names]

    def alike(a, b):
        if isinstance(b, IntScaleTensor) and a.__tensor_flatten__() != b.__tensor_flatten__():
            return False
        return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(parts(a), parts(b), strict=True))

    return list(found) == list(wanted) and all(alike(found[name], wanted[name]) for name in wanted)


def sequence(mesh, seen: dict) -> None:
    """Each pair of ranks has tokens of its own; the second pair also compiles, with quantized collectives."""
    pair = mesh["dp"].get_local_rank()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(pair))
    model = sequence_parallel(mesh["tp"])
    eager = model(x)
    seen["sequence"] = relative(eager, quantized()(x))
    if pair:
        options = {"intscale.communication": "int8", "intscale.communication_min_bytes": 0}
        before = len(intscale_compile.debug.last_compilation())
        compiled = torch.compile(model, backend="intscale", fullgraph=True, options=options)(x)
        (found,) = intscale_compile.debug.last_compilation()[before:]
        seen["compiled"] = relative(compiled, eager)
        seen["collectives"] = [(one.kind, one.ranks, one.decision) for one in found.collectives]
        seen["group"] = {one.group for one in found.collectives} == {mesh["tp"].get_group().group_name}
        seen["passes"] = dict(found.pass_counts)


def saved_dtensors(mesh, folder: Path, seen: dict) -> None:
    model, whole = sequence_parallel(mesh["tp"]), quantized().state_dict()
    state = tensor_parallel.gather_shards(model)
    seen["gathered DTensors"] = same_bits(state, whole) if state else "empty"
    tensor_parallel.save_shards(model, folder / "shards")
    other = tensor_parallel.load_shards(sequence_parallel(mesh["tp"], seed=1), folder / "shards")
    again = tensor_parallel.gather_shards(other)
    seen["loaded DTensors"] = same_bits(again, whole) if again else "empty"
    weight = model.block.mlp.down.weight
    seen["full_tensor"] = caught(weight.full_tensor)
    seen["plain dcp"] = caught(lambda: dcp.save(model.state_dict(), checkpoint_id=folder / "plain"))
    seen["not divided so"] = caught(lambda: tensor_parallel.load_shards(quantized(), folder / "shards"))
    seen["quantized otherwise"] = caught(
        lambda: tensor_parallel.load_shards(
            parallelize_module(
                quantized(0, Model, 64),
                mesh["tp"],
                {f"block.mlp.{n}": s() for n, s in (("up", ColwiseParallel), ("gate", ColwiseParallel))}
                | {"block.mlp.down": RowwiseParallel(), "block.head": ColwiseParallel()},
                src_data_rank=None,
            ),
            folder / "shards",
        )
    )
    seen["no checkpoint"] = caught(lambda: tensor_parallel.load_shards(model, folder / "nothing"))
    apart = sequence_parallel(mesh["tp"], seed=mesh["tp"].get_local_rank())
    seen["quantized apart"] = caught(lambda: tensor_parallel.gather_shards(apart))
    both = distribute_tensor(whole["block.head.weight"], mesh, [Shard(0), Shard(1)], src_data_rank=None)
    model.block.head.weight = nn.Parameter(both, requires_grad=False)
    seen["two dimensions"] = caught(lambda: tensor_parallel.gather_shards(model))


def saved_local_shards(mesh, folder: Path, seen: dict) -> None:
    plan = {"gate": "packed_colwise", "up": "colwise", "down": "rowwise"}

    def divided(seed: int, scale: float, bias: bool):
        model = quantized(seed, lambda: MLP(bias))
        static = model.gate.weight.with_activation_scale(scale)
        model.gate.weight = nn.Parameter(static, requires_grad=False)
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
        if bias and dist.get_rank() == 0:
            intscale_compile.save_safetensors(model, folder / "before.safetensors")
        return tensor_parallel.parallelize(model, mesh["tp"], plan), wanted

    model, wanted = divided(0, 0.02, bias=True)
    state = tensor_parallel.gather_shards(model)
    seen["gathered shards"] = same_bits(state, wanted) if state else "empty"
    intscale_compile.save_safetensors(
        nn.ModuleDict({"deep": nn.ModuleDict({"er": model})}), folder / "after.safetensors"
    )
    seen["bias"] = caught(lambda: tensor_parallel.save_shards(model, folder / "bias"))
    model, _ = divided(0, 0.02, bias=False)
    other, _ = divided(1, 0.5, bias=False)
    seen["before loading"] = same_bits(other.state_dict(), model.state_dict())
    tensor_parallel.save_shards(model, folder / "local")
    tensor_parallel.load_shards(other, folder / "local")
    seen["after loading"] = same_bits(other.state_dict(), model.state_dict())


def llama(heads: int, keys: int, width: int = 256) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=512, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=keys,
        head_dim=32, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig(32))
    return model


def fewer_heads(folder: Path, seen: dict) -> None:
    """Eight query heads and two key heads over four ranks: each key head is on two of them."""
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = llama(8, 2)
    expected, wanted = whole(ids).logits, {n: v.clone() for n, v in whole.state_dict().items()}
    if dist.get_rank() == 0:
        intscale_compile.save_safetensors(whole, folder / "llama.safetensors")
    model = tensor_parallel.parallelize(whole)
    attention = model.model.layers[0].self_attn
    seen["head shapes"] = [tuple(getattr(attention, f"{n}_proj").weight.shape) for n in "qkvo"]
    logits = model(ids).logits
    seen["heads"] = relative(logits, expected)
    state = tensor_parallel.gather_shards(model)
    seen["gathered heads"] = same_bits(state, wanted) if state else "empty"
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config).eval()
    empty.model.rotary_emb = model.model.rotary_emb
    loaded = tensor_parallel.from_safetensors(empty, folder / "llama.safetensors")
    seen["loaded heads"] = torch.equal(loaded(ids).logits, logits)
    seen["uneven heads"] = caught(lambda: tensor_parallel.parallelize(llama(12, 3, 192)))
    seen["too few queries"] = caught(lambda: tensor_parallel.parallelize(llama(2, 2)))


def wide_scales(mesh, seen: dict) -> None:
    """Group scales of more than 8 bits: int16, which no backend sends."""
    torch.manual_seed(4)
    weight = IntScaleTensor.from_hp(torch.randn(64, 128), IntScaleConfig(32))
    weight = weight.replaced(scale=weight.scale.to(torch.int16) * 20, scale_bits=9)
    sent = distribute_tensor(weight if mesh["tp"].get_local_rank() == 0 else weight.clone(), mesh["tp"], [Shard(0)])
    rows = weight.scale.chunk(2)[mesh["tp"].get_local_rank()]
    seen["int16"] = sent.to_local().scale.dtype == torch.int16 and torch.equal(sent.to_local().scale, rows)


def run(folder: str) -> dict:
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    seen: dict = {}
    with torch.no_grad():
        sequence(mesh, seen)
        saved_dtensors(mesh, Path(folder), seen)
        saved_local_shards(mesh, Path(folder), seen)
        fewer_heads(Path(folder), seen)
        wide_scales(mesh, seen)
    return seen


if __name__ == "__main__":
    main(run)
