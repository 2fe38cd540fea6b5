"""Perplexity of a model that is sharded over several ranks, with plain collectives and with low-bit ones; CPU or GPU.

    python benchmarks/perplexity_parallel.py                                 # tiny-llama, 2 ranks, gloo
    python benchmarks/perplexity_parallel.py --backend nccl --wires int8 int6 int5 int4

The text is that of perplexity.py. All forms are one W4A8 model, sharded by ``intscale_compile.tensor_parallel`` and compiled
with different ``intscale.communication``; every message is quantized, however short. Starts its ranks itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from perplexity import MODULE_LIST, default_model, held_out_sequences, perplexity
from ranks import agreed, is_rank, join, launch
from reporting import head, row
from timing import environment
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, tensor_parallel


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perplexity_parallel", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="gloo")
    parser.add_argument("--group-size", type=int, default=64, help="of the weights; the shards' features are cut there")
    parser.add_argument("--wires", nargs="+", default=["int8", "int6", "int5", "int4"], metavar="FORMAT")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=1800.0, help="after which the ranks are killed")
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args(argv)


def rank_main(args: argparse.Namespace) -> int:
    """What one rank does."""
    import transformers

    device = join(args.backend, "nvlink")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sequences = held_out_sequences(tokenizer, args.model.parent / MODULE_LIST, args.sequences, args.tokens).to(device)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    quantize_(
        model.requires_grad_(False), IntScaleConfig(args.group_size), filter_fn=intscale_compile.linears_and_experts
    )
    model = tensor_parallel.parallelize(model)
    first, rows, status = dist.get_rank() == 0, [], 0
    for wire in (None, *args.wires):
        options = {"intscale.communication": wire, "intscale.communication_min_bytes": 0} if wire else {}
        torch._dynamo.reset()
        value = perplexity(torch.compile(model, backend="intscale", options=options, fullgraph=True), sequences)
        values = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(args.ranks)]
        dist.all_gather(values, torch.tensor([value], dtype=torch.float64, device=device))
        if not agreed(all(float(other) == value for other in values), device):
            status = 1
            print(f"perplexity_parallel: {wire}: the ranks differ: {[float(v) for v in values]}", file=sys.stderr)
        rows.append(
            {"wire": wire, "perplexity": value, "change": value / (rows[0]["perplexity"] if rows else value) - 1}
        )
        if first:
            if wire is None:
                print(head(["messages", "perplexity", "change"]))
            print(row([wire or "plain", f"{value:.4f}", f"{rows[-1]['change']:+.3%}"]), flush=True)
    if first and args.json:
        args.json.write_text(json.dumps({"model": args.model.name, **environment(), "rows": rows}, indent=1))
    dist.destroy_process_group()
    return status


def main(argv: list[str] | None = None) -> int:
    """Start the ranks, or be one."""
    args = parse(argv)
    return rank_main(args) if is_rank() else launch(args.ranks, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
