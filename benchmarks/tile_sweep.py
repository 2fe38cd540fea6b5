"""Times of many tiles for many shapes and numbers of tokens, as JSON: what the rules for tiles are fitted to.

    python benchmarks/tile_sweep.py --path sweep.json --shapes 5120x5120 28672x4096 --seconds 240

Every tile is checked against the first one of its problem, element by element, before it is timed; times are medians of CUDA
graphs over weights that do not fit in the L2 cache together. fp8 (per row, fast accumulation) is timed beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from intscale_compile.kernels.gluon_tiles import choose_gluon_tile, deepest, illegal
from intscale_compile.kernels.tile import Tile, tile_count
from intscale_compile.kernels.tile_timing import GpuBench, Job, Shape, replay_ms

SHAPES = (
    "28672x4096", "4096x14336", "6144x4096", "4096x4096", "5120x5120", "34816x5120", "2560x2560", "18432x2560",
    "24576x4096", "4096x12288", "30720x3840",
)  # fmt: skip
TOKENS = (1, 3, 8, 16, 17, 33, 48, 65, 100, 129, 192, 256, 300, 512, 600, 1000, 2048, 3000, 4096)
REPLAYS = 7
MOST_WAVES = 24  # a tile that needs more is not worth a try


def tiles(m: int, n: int, k: int, schedule: str, sms: int = 132) -> list[Tile]:
    """Tiles to time for a problem, the rule's choice first; ``schedule`` as tables key it."""
    schedule = schedule.partition("/")[0]
    found = [choose_gluon_tile(m, n, k, schedule, sms), *_specialized(m, n, k, sms), *_large(m, n, k, sms)]
    fitted = [deepest(tile, schedule) for tile in found]
    return [tile for tile in dict.fromkeys(fitted) if illegal(tile, schedule, k) is None]


def _splits(count: int, k: int, sms: int) -> Iterator[int]:
    for split in (1, 2, 4, 8):
        if split == 1 or (count * split <= 1.1 * sms and k // 128 // split >= 8):
            yield split


def _specialized(m: int, n: int, k: int, sms: int) -> Iterator[Tile]:
    natural = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    for bm, bn in itertools.product({natural, max(32, natural // 2)}, (64, 128)):
        count = tile_count(m, bm) * tile_count(n, bn)
        if count > MOST_WAVES * sms or m > 1024:
            continue
        for split in _splits(count, k, sms):
            yield Tile(bm, bn, kernel="specialized", split_k=split)
        if bm * bn < 128 * 128 and count > sms:
            yield Tile(bm, bn, kernel="specialized", programs_per_sm=2)


def _large(m: int, n: int, k: int, sms: int) -> Iterator[Tile]:
    if m <= 64:
        return
    for bm, bn in ((64, 128), (128, 64), (128, 128)):
        if tile_count(m, bm) * tile_count(n, bn) > sms // 2:
            yield Tile(bm, bn, kernel="pipelined", group_n=16 if m >= 512 else 8)
    for bm, bn, warps in ((128, 128, 8), (256, 128, 8), (128, 256, 8), (128, 192, 12)):
        count = tile_count(m, bm) * tile_count(n, bn)
        for split in _splits(count, k, sms) if m > bm // 2 else ():
            yield Tile(bm, bn, warps, 8, kernel="cooperative", split_k=split)


def fp8_us(m: int, n: int, k: int, copies: int = 3) -> float:
    """Microseconds of ``torch._scaled_mm`` with one scale a row and fast accumulation."""
    x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    weights = [torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    rows, columns = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")

    def call(i: int) -> torch.Tensor:
        return torch._scaled_mm(x, weights[i].t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    call(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    samples = sorted(replay_ms(graph) for _ in range(REPLAYS + 2))
    return samples[len(samples) // 2] * 1e3 / copies


def measure(bench: GpuBench, shape: Shape, m: int) -> list[dict]:
    """Rows of JSON for one problem."""
    bench.load(shape, m)
    problem = bench._loaded()
    good, rows, expected = [], [], None
    for tile in tiles(m, shape.n, shape.k, shape.schedule, bench.sm_count):
        where = dict(n=shape.n, k=shape.k, m=m, schedule=shape.schedule, tile=vars(tile))
        try:
            for _ in range(2):  # the counters of split K have to be zero again after the first
                y = problem.linear(tile, 0)
            torch.cuda.synchronize()
            expected = y.clone() if expected is None else expected
            if not torch.equal(y, expected):
                rows.append(where | {"us": None, "fault": f"{(y != expected).float().mean().item():.4f} differ"})
                continue
        except Exception as error:  # noqa: BLE001
            rows.append(where | {"us": None, "fault": str(error).splitlines()[0][:200]})
            continue
        good.append((tile, where))
    times = bench.times([tile for tile, _ in good], REPLAYS)
    return rows + [where | {"us": round(times[tile], 2)} for tile, where in good]


def main() -> None:
    """Compile, check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--tokens", nargs="*", type=int, default=TOKENS)
    parser.add_argument("--scale-bits", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    begin, bench, rows = time.monotonic(), GpuBench(), []
    shapes = [
        Shape(*map(int, text.split("x")), args.group_size, args.scale_bits, args.weight_bits) for text in args.shapes
    ]
    jobs = [
        Job(s, m, tile) for s in shapes for m in args.tokens for tile in tiles(m, s.n, s.k, s.schedule, bench.sm_count)
    ]
    print(f"{len(jobs)} problems, {len({job.small() for job in jobs})} kernels", flush=True)
    bench.compile(jobs, seconds=args.seconds / 2)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for shape in shapes:
        for m in args.tokens:
            if time.monotonic() - begin > args.seconds:
                break
            found = measure(bench, shape, m)
            peer = fp8_us(m, shape.n, shape.k)
            rows += [row | {"fp8_us": round(peer, 2)} for row in found]
            faults = [row for row in found if row["us"] is None]
            best = min((row for row in found if row["us"] is not None), key=lambda row: row["us"], default=None)
            rule = next((row["us"] for row in found if row["us"] is not None), None)
            if best is not None:
                t = best["tile"]
                name = f"{t['kernel']} {t['block_m']}x{t['block_n']} st{t['num_stages']} sk{t['split_k']} p{t['programs_per_sm']}"
                print(
                    f"{shape.n}x{shape.k} {m}: fp8 {peer:.1f} rule {rule:.1f} best {best['us']:.1f} {name}", flush=True
                )
            for row in faults[:2]:
                print("  FAULT", row["tile"], row["fault"], flush=True)
        header = {"device": bench.device_name, **bench.versions(), "rows": rows}
        args.path.write_text(json.dumps(header))
    bench.close()


if __name__ == "__main__":
    main()
