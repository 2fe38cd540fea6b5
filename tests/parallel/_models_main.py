"""One rank: trained models of transformers, divided by our function and by transformers' own loading."""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import math
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torchao.quantization import quantize_  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig  # noqa: E402

import intscale_compile  # noqa: E402
from intscale_compile import IntScaleConfig, IntScaleTensor, tensor_parallel  # noqa: E402
from intscale_compile.communication import all_reduce  # noqa: E402
from intscale_compile.errors import IntScaleError  # noqa: E402
from intscale_compile.parallel.sharding import shard  # noqa: E402
from tests.support.benchmarks import load  # noqa: E402
from tests.support.ranks import main  # noqa: E402

bench = load(("perplexity",)).perplexity

LENGTH = 128


def load(folder: Path, layers: int | None = None, **options):
    more = {} if layers is None else {"num_hidden_layers": layers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # tp_plan= gives way to distributed_config=
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more, **options).eval()


@functools.cache
def _quantized(folder: Path, layers: int | None, group_size: int, search: str):
    model = load(folder, layers).requires_grad_(False)
    quantize_(model, IntScaleConfig(group_size, scale_search=search), filter_fn=intscale_compile.linears_and_experts)
    return model


def quantized(folder: Path, layers: int | None = None, group_size: int = 64, search: str = "absmax"):
    """A copy of a quantized model. Without a search of the scales, which takes longer and shows the same here."""
    return copy.deepcopy(_quantized(folder, layers, group_size, search))


def perplexity(model, ids: torch.Tensor) -> float:
    logits = model(ids).logits
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp())


class LowBitSums(TorchDispatchMode):
    """What the compiler's pass does to the sums of the ranks, to those of a model that is not compiled."""

    def __init__(self, wire: str):
        super().__init__()
        self.wire, self.replaced = wire, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops._c10d_functional.all_reduce.default:
            self.replaced += 1
            return all_reduce(args[0], self.wire)
        return op(*args, **(kwargs or {}))


class DividedByHand(nn.Module):
    """A row-parallel layer as the ranks compute it, one after another."""

    def __init__(self, linear: nn.Linear, ranks: int):
        super().__init__()
        self.shards = [shard(linear.weight, 1, rank, ranks) for rank in range(ranks)]

    def forward(self, x):
        pieces = x.chunk(len(self.shards), -1)
        return sum(nn.functional.linear(piece, weight) for piece, weight in zip(pieces, self.shards))


def divided_by_hand(model, ranks: int):
    for layer in model.model.layers:
        layer.self_attn.o_proj = DividedByHand(layer.self_attn.o_proj, ranks)
        layer.mlp.down_proj = DividedByHand(layer.mlp.down_proj, ranks)
    return model


def error_of(function) -> str:
    try:
        function()
    except (IntScaleError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def same_file(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors and say the same of them."""
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (one, other)]
    keys = [sorted(file.keys()) for file in files]
    same = all(torch.equal(files[0].get_tensor(key), files[1].get_tensor(key)) for key in keys[0] if key in keys[1])
    return same and keys[0] == keys[1] and files[0].metadata() == files[1].metadata()


def packed_bytes(model) -> int:
    return sum(p.nbytes_packed() for p in model.parameters() if isinstance(p, IntScaleTensor))


def our_function(llama: Path, ids: torch.Tensor, ranks: int, seen: dict) -> None:
    whole = quantized(llama)
    bytes_of_all = packed_bytes(whole)
    seen["perplexity"] = perplexity(whole, ids)
    divided = tensor_parallel.parallelize(copy.deepcopy(whole))
    seen["perplexity divided"] = perplexity(divided, ids)
    seen["by hand"] = relative(divided(ids).logits, divided_by_hand(whole, ranks)(ids).logits)
    seen["packed bytes"], seen["packed bytes of all"] = packed_bytes(divided), bytes_of_all
    seen["cut"] = error_of(lambda: tensor_parallel.parallelize(quantized(llama, 1, 128)))


def low_bit_sums(model, llama: Path, sequences: int, seen: dict) -> None:
    """Perplexity on held-out text with quantized collectives over that with plain ones, less 1."""
    tokens = bench.held_out_sequences(
        AutoTokenizer.from_pretrained(llama), llama.parent / bench.MODULE_LIST, sequences, 512
    )
    parts = tokens.split(4)
    plain = math.fsum(math.log(perplexity(model, ids)) for ids in parts)
    for wire in ("int8", "int6"):
        with LowBitSums(wire) as sums:
            found = math.fsum(math.log(perplexity(model, ids)) for ids in parts)
        seen[f"change {wire}"] = math.expm1((found - plain) / len(parts))
        seen[f"sums {wire}"] = sums.replaced


def compiled(llama: Path, ids: torch.Tensor, seen: dict) -> None:
    model = tensor_parallel.parallelize(quantized(llama, 1))
    call = torch.compile(model, backend="intscale", fullgraph=True)
    seen["compiled"] = relative(call(ids).logits, model(ids).logits)
    report = intscale_compile.explain(model, ids)
    seen["gemms"] = (report.gemms, [layer.shape for layer in report.layers if layer.quantized])


def transformers_loading(llama: Path, folder: Path, ids: torch.Tensor, ranks: int, seen: dict) -> None:
    divide = {"tp_plan": "auto", "tp_size": ranks}
    if dist.get_rank() == 0:
        for group in (64, 128):
            saved = quantized(llama, 1, group)
            intscale_compile.save_pretrained(saved, folder / f"group{group}")
    dist.barrier()
    expected = tensor_parallel.parallelize(quantized(llama, 1))(ids).logits
    model = load(folder / "group64", **divide)
    seen["checkpoint"] = relative(model(ids).logits, expected)
    local = [p.to_local() for p in model.parameters() if isinstance(getattr(p, "_local_tensor", None), IntScaleTensor)]
    seen["checkpoint shapes"] = [tuple(p.shape) for p in local]
    call = torch.compile(model, backend="intscale", fullgraph=True)
    seen["checkpoint compiled"] = relative(call(ids).logits, model(ids).logits)
    report = intscale_compile.explain(model, ids)
    seen["checkpoint gemms"] = (
        report.gemms,
        report.pass_counts["local_shards"],
        [x.shape for x in report.layers if x.quantized],
    )
    # Every rank; the first one writes. transformers cannot revert how it read a torchao checkpoint, divided or not.
    model.save_pretrained(folder / "again", save_original_format=False)
    divided = tensor_parallel.parallelize(quantized(llama, 1))
    intscale_compile.save_pretrained(divided, folder / "divided")
    dist.barrier()
    seen["saved again"] = [same_file(folder / name, folder / "group64") for name in ("again", "divided")]
    flying = load(llama, 1, quantization_config=TorchAoConfig(IntScaleConfig(64, scale_search="absmax")), **divide)
    whole = quantized(llama, 1)(ids).logits
    seen["on the fly"] = (relative(flying(ids).logits, whole), relative(expected, whole))
    seen["on the fly saved"] = error_of(lambda: flying.save_pretrained(folder / "flying", save_original_format=False))
    seen["on the fly shapes"] = [tuple(p.shape) for p in flying.parameters() if isinstance(p, IntScaleTensor)]
    seen["checkpoint cut"] = error_of(lambda: load(folder / "group128", **divide))


def experts(mixtral: Path, folder: Path, ids: torch.Tensor, ranks: int, seen: dict) -> None:
    whole = quantized(mixtral, 2)
    expected = whole(ids).logits
    seen["experts perplexity"] = perplexity(whole, ids)
    divided = tensor_parallel.parallelize(quantized(mixtral, 2))
    seen["experts"] = relative(divided(ids).logits, expected)
    seen["experts perplexity divided"] = perplexity(divided, ids)
    stacks = {n.rpartition(".")[2]: tuple(p.shape) for n, p in divided.named_parameters() if "experts" in n}
    seen["experts shapes"] = stacks
    if dist.get_rank() == 0:
        intscale_compile.save_pretrained(whole, folder / "experts")
    dist.barrier()
    loaded = load(folder / "experts", tp_plan="auto", tp_size=ranks)
    seen["experts checkpoint"] = relative(loaded(ids).logits, divided(ids).logits)


def run(models: str, folder: str, sequences: str = "") -> dict:
    """All of it; with ``sequences`` only the perplexity over quantized collectives, of so many."""
    torch.set_num_threads(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    llama, mixtral = Path(models) / "tiny-llama", Path(models) / "tiny-mixtral"
    seen: dict = {}
    if sequences:
        with torch.no_grad():
            low_bit_sums(tensor_parallel.parallelize(quantized(llama, search="mse")), llama, int(sequences), seen)
        return seen
    text = inspect.getsource(argparse)
    ids = torch.tensor(AutoTokenizer.from_pretrained(llama)(text).input_ids[: 2 * LENGTH]).view(2, LENGTH)
    with torch.no_grad():
        our_function(llama, ids, ranks, seen)
        compiled(llama, ids, seen)
        transformers_loading(llama, Path(folder), ids, ranks, seen)
        experts(mixtral, Path(folder), ids, ranks, seen)
    return seen


if __name__ == "__main__":
    main(run)
