"""Fit the constants of ``intscale_compile.kernels.tile_costs`` to what ``tile_sweep.py`` measured, and print them.

    python benchmarks/fit_tiles.py sweep.json

For each kind of tile the logarithms of prediction and measurement are brought together (Huber loss). Points at which a tile
would have rows of zeros (fewer tokens than half of it) are left out: the rules never choose such tiles.
"""

from __future__ import annotations

import argparse
import collections
import json
from pathlib import Path
from typing import Any

import torch

from intscale_compile.kernels.tile import Tile, tile_count
from intscale_compile.kernels.tile_costs import BYTES_PER_US, LAUNCH_US, Cost, partial_us

START = (3.0, 1.0, 0.3, 0.2, 1.5)  # as Cost, but by how much more a block takes with a second program
SM_COUNT = 132


def terms(row: dict[str, Any]) -> tuple[float, ...]:
    """Waves, those of two programs on a multiprocessor, blocks of a part of K, further parts, microseconds of sums and bytes."""
    t, n, k, m = row["tile"], row["n"], row["k"], row["m"]
    together = 2 if t["kernel"] == "pipelined" else t["programs_per_sm"]
    tiles = tile_count(m, t["block_m"]) * tile_count(n, t["block_n"]) * t["split_k"]
    waves, rest = divmod(tiles, SM_COUNT * together)
    shared = waves + (rest > SM_COUNT) if together == 2 else 0
    memory = LAUNCH_US + (n * k / 2 + n * k / 128 + m * k + 2 * m * n) / BYTES_PER_US
    sums = partial_us(Tile(**t), m, n)
    return waves + (rest > 0), shared, tile_count(k, 128) / t["split_k"], t["split_k"] - 1, sums, memory


def fit(rows: list[dict[str, Any]]) -> tuple[Cost, float, float]:
    """The constants of one kind of tile, and the root mean square and the largest of the logarithmic errors."""
    waves, shared, blocks, split, sums, memory = torch.tensor([terms(row) for row in rows], dtype=torch.float64).T
    measured = torch.tensor([row["us"] for row in rows], dtype=torch.float64).log()
    logs = torch.tensor(START, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=500, line_search_fn="strong_wolfe")

    def errors() -> torch.Tensor:
        start, tile, alone, more, part = logs.exp().unbind()
        time = start + part * split + sums + waves * (tile + alone * blocks) + shared * more * blocks
        return (time**8 + memory**8).log() / 8 - measured

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.huber_loss(errors(), torch.zeros_like(measured), delta=0.05)
        value = (
            value + 1e-6 * (logs - torch.tensor(START, dtype=torch.float64).log()).square().sum()
        )  # what nothing decides
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        found = errors()
    start, tile, alone, more, part = (round(x, 3) for x in logs.exp().tolist())
    cost = Cost(start, tile, alone, round(alone + more * bool(shared.any()), 3), part)
    return cost, float(found.square().mean().sqrt()), float(found.abs().max())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    kinds = collections.defaultdict(list)
    for path in parser.parse_args().paths:
        for row in json.loads(path.read_text())["rows"]:
            t = row["tile"]
            if row["us"] is not None and (t["block_m"] <= 16 or 2 * row["m"] >= t["block_m"]):
                kinds[t["kernel"], t["block_m"], t["block_n"], t["programs_per_sm"]].append(row)
    for kind, rows in sorted(kinds.items()):
        if len(rows) >= 4:
            cost, mean, most = fit(rows)
            print(f"    {kind}: Cost{tuple(cost)},  # {len(rows)} points, {mean:.1%} (rms), {most:.0%} at most")


if __name__ == "__main__":
    main()
