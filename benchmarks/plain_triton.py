"""The plain-Triton kernels with and without parts of K, beside the Gluon kernel that Hopper has, for few tokens.

    python benchmarks/plain_triton.py --shapes 4096x4096 28672x4096 --tokens 1 16 32 64
    python benchmarks/plain_triton.py --group-size 32 --scale-bits 8 --json plain.json --sweep

What GPUs without Gluon run, and what formats run that Gluon does not have, timed on a Hopper GPU. Every tile is checked bit for
bit before it is timed; medians of CUDA graphs over weights that do not fit in the L2 cache together. ``--sweep`` times every
candidate of ``tune`` instead of the rules' choice alone.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from reporting import table

from intscale_compile.kernels.tile import Tile, schedule_name
from intscale_compile.kernels.tile_timing import GpuBench, Job, Shape, plain_candidates
from intscale_compile.kernels.tiles import choose, choose_tile
from intscale_compile.kernels.triton_gemm import gluon_obstacle

SHAPES = ("28672x4096", "4096x14336", "6144x4096", "4096x4096", "5120x5120", "2560x2560", "30720x3840")
REPLAYS = 7


def rule(bench: GpuBench, shape: Shape, m: int, gluon: bool) -> Tile:
    """What the rules choose, without tables."""
    return choose(m, shape.n, shape.k, *shape.format, bench.capability, "", gluon, bench.sm_count)


def tiles(bench: GpuBench, shape: Shape, m: int, sweep: bool) -> dict[str, list[Tile]]:
    """Tiles to time: Gluon's where it has the format, plain Triton's with parts of K and without."""
    obstacle = gluon_obstacle(shape.k, *shape.format, "tiled", bench.device)
    found = {"gluon": [] if obstacle else [rule(bench, shape, m, True)]}
    found["whole K"] = [choose_tile(m, shape.n, shape.k, *shape.format, bench.capability)]
    found["rule"] = [rule(bench, shape, m, False)]
    if sweep:
        found["others"] = plain_candidates(m, shape, bench.capability, sweep=True)
    return found


def main() -> None:
    """Compile, check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--tokens", nargs="*", type=int, default=(1, 16, 32, 64))
    parser.add_argument("--scale-bits", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin, bench, rows, lines = time.monotonic(), GpuBench(), [], []
    shapes = [Shape(*map(int, s.split("x")), args.group_size, args.scale_bits, args.weight_bits) for s in args.shapes]
    points = {(s, m): tiles(bench, s, m, args.sweep) for s in shapes for m in args.tokens}
    jobs = [Job(s, m, tile) for (s, m), kinds in points.items() for found in kinds.values() for tile in found]
    bench.compile(jobs, seconds=args.seconds / 2)
    seconds = time.monotonic() - begin
    print(f"{bench.device_name}, {bench.versions()}, {len(jobs)} tiles, compiled after {seconds:.0f} s")
    for (shape, m), kinds in points.items():
        if time.monotonic() - begin > args.seconds:
            break
        bench.load(shape, m)
        every = list(dict.fromkeys(tile for found in kinds.values() for tile in found))
        faults = {tile: fault for tile in every if (fault := bench.fault(tile))}
        us = bench.times([tile for tile in every if tile not in faults], REPLAYS)
        for tile, fault in faults.items():
            print(f"FAULT {shape} {m} {tile}: {fault}", flush=True)
        rows += [
            dict(n=shape.n, k=shape.k, m=m, format=shape.format, tile=vars(tile), us=round(t, 2))
            for tile, t in us.items()
        ]
        cell = {kind: min((us.get(tile, 9e9) for tile in found), default=0.0) for kind, found in kinds.items()}
        best = min((tile for tile in us if tile.kernel == "triton"), key=lambda tile: us[tile])
        name = f"{best.block_m}x{best.block_n} {best.num_warps} warps, {best.num_stages} stages, {best.split_k} parts"
        gluon, whole, chosen = cell["gluon"], cell["whole K"], cell["rule"]
        beside = [f"{gluon:.1f}", f"{whole:.1f}", f"{chosen:.1f}", f"{chosen / (gluon or 1):.2f}"]
        figures = beside if gluon else ["", *beside[1:3], ""]
        lines.append([f"{shape.n}x{shape.k}", str(m), *figures, f"{us[best]:.1f}", name])
        print(lines[-1], flush=True)
        if args.json:
            args.json.write_text(json.dumps({"device": bench.device_name, **bench.versions(), "rows": rows}))
    bench.close()
    kind = schedule_name(args.group_size, args.scale_bits, args.weight_bits)
    print(f"\n{kind}, groups of {args.group_size}, {args.scale_bits}-bit scales; us\n")
    print(table(["N x K", "tokens", "Gluon", "whole K", "rule", "times Gluon", "best", "its tile"], lines))


if __name__ == "__main__":
    main()
