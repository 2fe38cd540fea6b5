"""The grouped W4A8 kernel on the experts of Mixtral-8x7B: exactness, then microseconds against bf16 grouped_mm.

    python benchmarks/grouped.py                        # both products, 2 to 4096 rows, the tiles that we choose
    python benchmarks/grouped.py --rows 2 32 --sweep    # every tile of the sweep, best first
    python benchmarks/grouped.py --experts 128 --shapes 1536x2048 2048x768      # Qwen3-30B-A3B

Rows are (token, expert) pairs: 2 rows are one token with two experts. Routing is random, the same for all that is compared.
Each call is captured into a CUDA graph once per copy of the weights, so that none of them is found in the L2 cache.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
from reporting import head, machine, number, ratio, row
from timing import alternate_ms, capture, copy_bandwidth, copy_count, environment, l2_bytes, release

ROWS = (2, 8, 32, 128, 4096)
SHAPES = ("28672x4096", "4096x14336")


def make_weight(experts: int, n: int, k: int):
    """Random codes and scales of a stack in tiled packing: ``qdata``, ``scale``, ``row_scale``."""
    qdata = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, device="cuda")
    scale = torch.randint(1, 16, (experts, n, k // 128), dtype=torch.uint8, device="cuda")
    return qdata, scale, torch.rand(experts, n, 1, device="cuda") * 1e-3


def make_routing(rows: int, experts: int, top_k: int = 2):
    """Offsets int32 ``[experts]`` and sorted expert of each row; the experts of one token differ."""
    tokens = -(-rows // top_k)
    chosen = torch.rand(tokens, experts, device="cuda").topk(min(top_k, experts)).indices.flatten()[:rows]
    ids = chosen.sort().values
    return torch.searchsorted(ids, torch.arange(experts, device="cuda"), right=True, out_int32=True), ids


def check(xq, weight, offsets, ids, form, tile) -> None:
    """Stop unless every row is, to the bit, what the kernel for single matrices gives."""
    from intscale_compile.kernels.triton_gemm import accumulate_cuda
    from intscale_compile.kernels.triton_grouped import grouped_accumulate_cuda

    qdata, scale, _ = weight
    acc = grouped_accumulate_cuda(xq, qdata, scale, offsets, form, tile=tile)
    for expert in ids.unique().tolist():
        own = ids == expert
        if not torch.equal(acc[own], accumulate_cuda(xq[own], qdata[expert], scale[expert], *form)):
            raise SystemExit(f"grouped: expert {expert} is not exact with {tile or 'the chosen tile'}")


def sweep(rows: int, experts: int, n: int, k: int, gluon: bool) -> Iterator:
    """Tiles to try for a number of rows: with ``gluon`` those of the Gluon kernels."""
    from intscale_compile.kernels.grouped_tiles import choose_grouped_tile, gluon_grouped_tiles
    from intscale_compile.kernels.tile import Tile

    if gluon:
        yield choose_grouped_tile(rows, experts, n, k, 128, 4, 4)
        yield from gluon_grouped_tiles("fold", few=rows <= 24 * experts)
        if rows > 8 * experts:
            yield from gluon_grouped_tiles("fold", few=False)
        return

    mean = rows / experts
    heights = (16,) if mean <= 8 else (16, 32, 64) if mean <= 48 else (64, 128)
    for m, n, stages, warps in itertools.product(heights, (32, 64, 128), (2, 3, 4, 5, 6), (4, 8)):
        if not (m == 128 and (n < 128 or stages > 4)) and not (m <= 32 and warps == 8 and n < 128):
            yield Tile(m, n, num_warps=warps, num_stages=stages)
    if mean > 48:
        for group_n in (1, 4, 16):
            yield Tile(128, 128, group_n=group_n)


def calls_of(weights, xq, token_scale, offsets, form, tile, indices) -> list[Callable[[], object]]:
    """One call for each copy of the weights."""
    from intscale_compile.kernels.triton_grouped import grouped_linear_cuda

    return [
        lambda w=w: grouped_linear_cuda(xq, token_scale, *w, None, offsets, form, torch.bfloat16, *indices, tile=tile)
        for w in weights
    ]


def bf16_calls(experts: int, n: int, k: int, rows: int, offsets) -> list[Callable[[], object]]:
    """``torch._grouped_mm`` on bf16 weights, one call for each copy."""
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    copies = copy_count(2 * experts * n * k, l2_bytes(), cap=8e9)
    weights = [torch.randn(experts, n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return [lambda w=w: torch._grouped_mm(x, w.transpose(-2, -1), offs=offsets) for w in weights]


def measure(args, n: int, k: int, rows: int, bandwidth: float) -> None:
    """Print one line of the table, or the whole sweep."""
    from intscale_compile.kernels.grouped_tiles import choose_grouped_tile
    from intscale_compile.kernels.triton_gemm import capability
    from intscale_compile.kernels.triton_grouped import GroupedForm, pick_grouped_tile

    form = GroupedForm(n, 128, 4, "tiled")
    copies = copy_count(args.experts * n * k // 2, l2_bytes())
    weights = [make_weight(args.experts, n, k) for _ in range(max(2, copies))]
    xq = torch.randint(-127, 128, (rows, k), dtype=torch.int8, device="cuda")
    token_scale = torch.rand(rows, 1, device="cuda")
    offsets, ids = make_routing(rows, args.experts, args.top_k)
    problem = (rows, args.experts, n, k, 128, 4, 4)
    plain = choose_grouped_tile(*problem, capability(xq.device))
    chosen = plain if args.plain else pick_grouped_tile(*problem, "tiled", xq.device)  # Gluon where this machine can
    swept = sweep(rows, args.experts, n, k, args.gluon) if args.sweep else ()
    tiles = list(dict.fromkeys([chosen, *swept]))
    indices = (None, None)
    if args.indices:  # as a layer has it: the first product takes tokens by number, the second puts rows back in order
        order = torch.randperm(rows, device="cuda").int()
        first = args.shapes.index(f"{n}x{k}") % 2 == 0
        indices = (order // args.top_k, None) if first else (None, order)
    graphs, used = {}, {}
    for tile in tiles:
        try:
            check(xq, weights[0], offsets, ids, form, tile)
            calls = calls_of(weights, xq, token_scale, offsets, form, tile, indices)
            graphs[tile], used[tile] = capture(calls), len(calls)
        except Exception as error:  # a tile that needs more shared memory than there is
            if tile == chosen:
                raise
            print(f"  skipped {tile.block_m}x{tile.block_n} stages {tile.num_stages}: {type(error).__name__}")
    bf16 = []
    if not args.no_bf16:
        bf16 = bf16_calls(args.experts, n, k, rows, offsets)
        graphs["bf16"], used["bf16"] = capture(bf16), len(bf16)
    times = {key: statistics.median(ms) * 1e3 / used[key] for key, ms in alternate_ms(graphs).items()}
    busy = len(ids.unique())
    floor = busy * (n * k / 2 + n * k / 128) / bandwidth * 1e6
    for tile in sorted((t for t in tiles if t in times), key=lambda t: times[t]):
        mark = " <- chosen" if tile == chosen and args.sweep else ""
        name = f"{tile.kernel} {tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages} g{tile.group_n}"
        if tile.kernel == "decode":
            name += f" steps {tile.steps} p{tile.programs_per_sm}"
        name += mark
        against = (number(times.get("bf16")), ratio(times.get("bf16"), times[tile]))
        share = f"{100 * floor / times[tile]:.0f} %"
        print(row([f"{n}x{k}", rows, busy, f"{times[tile]:.1f}", *against, share, name]), flush=True)
    del graphs, weights, bf16
    release()


def main(argv=None) -> None:
    """Print a Markdown table; the floor is the time to read the weights of the experts that have rows."""
    parser = argparse.ArgumentParser(prog="grouped", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="NxK of one expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--sweep", action="store_true", help="time every tile, not only the chosen one")
    parser.add_argument("--gluon", action="store_true", help="with --sweep: the tiles of the Gluon kernels")
    parser.add_argument("--plain", action="store_true", help="choose among the tiles of plain Triton")
    parser.add_argument("--indices", action="store_true", help="tokens by number and rows put back, as in a layer")
    parser.add_argument("--no-bf16", action="store_true", help="leave the comparison out")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("grouped: needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(machine(environment(), "device", "torch", "triton", "commit"))
    print(f"{args.experts} experts, top {args.top_k}; copies run at {bandwidth / 1e12:.2f} TB/s\n")
    print(head(["N x K", "rows", "experts", "W4A8 us", "bf16 us", "times", "of the floor", "tile"]))
    for shape, rows in itertools.product(args.shapes, args.rows):
        n, k = (int(size) for size in shape.split("x"))
        measure(args, n, k, rows, bandwidth)


if __name__ == "__main__":
    main()
