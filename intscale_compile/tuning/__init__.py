"""``tune``: time the kernels' tiles on this GPU and store the fastest as the user's table. Nothing tunes by itself.

As a command: ``python -m intscale_compile.tuning --shapes 28672x4096 4096x14336 --tokens 1 16 256 --seconds 60``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Protocol, Union

from torch import nn

from ..config import IntScaleConfig
from ..errors import ConfigError, IntScaleError
from ..kernels import tile_tables
from ..kernels.tile import Tile
from ..kernels.tile_timing import GpuBench, Job, Shape
from ..tensors.intscale_tensor import IntScaleTensor

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LLAMA_8B = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))  # gate and up, down, q k v, o
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # that one GEMM computes
FINALISTS = 4
QUICK_REPLAYS = 3
FINAL_MS = 20.0  # of replays for each finalist, in 7 to 40 of them


class Bench(Protocol):
    """What tuning needs of a GPU; see ``GpuBench``."""

    device_name: str

    def candidates(self, shape: Shape, m: int) -> list[Tile]: ...  # noqa: D102
    def compile(self, jobs: Iterable[Job], seconds: Optional[float] = None) -> None: ...  # noqa: D102
    def load(self, shape: Shape, m: int) -> None: ...  # noqa: D102
    def fault(self, tile: Tile) -> Optional[str]: ...  # noqa: D102
    def times(self, tiles: Sequence[Tile], replays: int) -> dict[Tile, float]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
    def clock(self) -> float: ...  # noqa: D102
    def versions(self) -> dict[str, Any]: ...  # noqa: D102


def tune(
    shapes_or_model: Union[None, nn.Module, Iterable[tuple[int, int]]] = None,
    tokens: Sequence[int] = TOKENS,
    *,
    config: Optional[IntScaleConfig] = None,
    path: Union[None, str, os.PathLike] = None,
    seconds: Optional[float] = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Find the fastest tile for each weight shape and number of tokens on the current GPU, and store them as a table.

    Every candidate's int32 accumulator is compared bit for bit with that of the plain-Triton kernel before it is timed.
    Candidates compile in parallel processes: a script that calls this needs ``if __name__ == "__main__":``. Compiled
    models choose their tiles when they are compiled: compile them after tuning.

    Args:
        shapes_or_model: pairs ``(out_features, in_features)`` of the weights as they are multiplied, siblings (q, k, v;
            gate, up) together; or a quantized model, whose 2-D weights of type ``IntScaleTensor`` give the shapes and
            formats. Of a model, siblings are recognized by their names in Llama-like models; those that go by other names
            are tuned one by one. The default is the four shapes of Llama 3 8B.
        tokens: rows of the activation; other numbers use the entry of the next greater one.
        config: format of the weights where shapes are given; the default is ``IntScaleConfig()``.
        path: file to write, merged with what it holds; the default is the one that is read, ``$INTSCALE_TILES`` or
            ``~/.cache/intscale/<GPU>.json``.
        seconds: budget for all of it. What is left out is said; the table keeps its former entries for it.
        progress: print a line for each shape and number of tokens.

    Returns:
        The entries written, as in the table.

    Raises:
        ConfigError: there is no GPU, a shape or number of tokens is not positive, the model has no quantized weights, or
            the table to merge with is malformed or of another GPU.
    """
    shapes = _shapes(shapes_or_model, config)
    tokens = _positive(sorted(set(tokens)), "tokens")
    bench = GpuBench()
    try:
        return run(bench, shapes, tokens, path=path, seconds=seconds, progress=progress)
    finally:
        bench.close()


def _positive(numbers: Sequence[int], name: str) -> Sequence[int]:
    if not numbers or not all(isinstance(i, int) and not isinstance(i, bool) and i > 0 for i in numbers):
        raise ConfigError(f"tune: {name}={numbers!r} is not supported: use positive integers.")
    return numbers


def _shapes(source: Union[None, nn.Module, Iterable[tuple[int, int]]], config: Optional[IntScaleConfig]) -> list[Shape]:
    """Distinct shapes to tune, in order."""
    if isinstance(source, nn.Module):
        shapes = list(dict.fromkeys(model_shapes(source)))
        if not shapes:
            raise ConfigError("tune: the model has no IntScaleTensor weights: quantize it first, or give shapes.")
        return shapes
    config = config or IntScaleConfig()
    pairs = list(LLAMA_8B if source is None else source)
    if not pairs or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"tune: shapes={pairs!r} are not supported: use pairs (out_features, in_features).")
    form = (config.effective_group_size, config.scale_bits, config.weight_bits)
    for pair in pairs:
        _positive(pair, "shape")
    return list(dict.fromkeys(Shape(n, k, *form) for n, k in pairs))


def model_shapes(model: nn.Module) -> list[Shape]:
    """Shapes of a model's 2-D quantized weights; siblings by name count as one weight."""
    shapes: list[Shape] = []
    for module in model.modules():
        weights = {name: getattr(child, "weight", None) for name, child in module.named_children()}
        found = {
            name: _weight_shape(w) for name, w in weights.items() if isinstance(w, IntScaleTensor) and w.dim() == 2
        }
        for names in SIBLINGS:
            parts = [found[name] for name in names if name in found]
            formats = {(part.k, part.group_size, part.weight_bits) for part in parts}
            if len(parts) == len(names) and len(formats) == 1:
                n, bits = sum(part.n for part in parts), max(part.scale_bits for part in parts)
                shapes.append(Shape(n, parts[0].k, parts[0].group_size, bits, parts[0].weight_bits))
                found = {name: shape for name, shape in found.items() if name not in names}
        shapes += found.values()
    return shapes


def _weight_shape(weight: IntScaleTensor) -> Shape:
    form = (weight.group_size, weight.scale_bits, weight.weight_bits)
    return Shape(weight.out_features, weight.in_features, *form)


def run(
    bench: Bench,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    *,
    path: Union[None, str, os.PathLike] = None,
    seconds: Optional[float] = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """:func:`tune` on a given bench; the table is written after each shape."""
    target = tile_tables.user_path(bench.device_name) if path is None else Path(path)
    header = {"device": re.escape(bench.device_name), **bench.versions()}
    header["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    tile_tables.read_for(target, header["device"])  # a table that cannot be merged is refused before the work
    end = None if seconds is None else bench.clock() + seconds
    entries: list[dict[str, Any]] = []
    left: list[str] = []
    for shape in shapes:
        found = _tune_shape(bench, shape, tokens, end, progress, left)
        if found:
            tile_tables.write_table(target, header, found)
        entries += found
    if left:
        message = f"tune: the {seconds} s are over; left out: {', '.join(left)}"
        print(message, flush=True) if progress else warnings.warn(message, stacklevel=3)
    if progress:
        print(f"tune: {len(entries)} entries written to {target}", flush=True)
    return entries


def _tune_shape(
    bench: Bench, shape: Shape, tokens: Sequence[int], end: Optional[float], progress: bool, left: list[str]
) -> list[dict[str, Any]]:
    def seconds_left() -> Optional[float]:
        return None if end is None else end - bench.clock()

    def is_over() -> bool:
        remaining = seconds_left()
        return remaining is not None and remaining <= 0

    names = {m: f"{shape.n}x{shape.k} {shape.schedule} M={m}" for m in tokens}
    candidates: dict[int, list[Tile]] = {}
    if not is_over():
        candidates = {m: bench.candidates(shape, m) for m in tokens}
        jobs = [Job(shape, m, tile) for m, tiles in candidates.items() for tile in tiles]
        bench.compile(jobs, seconds_left())
    entries = []
    for m in tokens:
        if is_over():
            left.append(names[m])
            continue
        bench.load(shape, m)
        entry, line = _tune_point(bench, shape, m, candidates[m])
        entries += [entry] if entry else []
        if progress:
            print(f"{names[m]}: {line}", flush=True)
    return entries


def _tune_point(bench: Bench, shape: Shape, m: int, candidates: Sequence[Tile]) -> tuple[Optional[dict[str, Any]], str]:
    """The entry of one loaded problem and what to print; None where no candidate can be used."""
    faults = {tile: bench.fault(tile) for tile in candidates}
    usable = [tile for tile in candidates if faults[tile] is None]
    refused = [f"{_words(tile)}: {fault}" for tile, fault in faults.items() if fault is not None]
    if not usable:
        return None, f"no usable tile; {'; '.join(refused[:3])}"
    quick = bench.times(usable, QUICK_REPLAYS)
    best = sorted(usable, key=quick.__getitem__)[:FINALISTS]
    replays = max(7, min(40, int(FINAL_MS * 1e3 / max(quick[best[0]], 1e-3) / FINALISTS)))
    final = bench.times(best, replays)
    tile = min(best, key=final.__getitem__)
    us = round(final[tile], 2)
    key = {"schedule": shape.schedule, "n": shape.n, "k": shape.k, "m": m}
    line = f"{us:.2f} us, {_words(tile)}; best of {len(usable)}"
    if candidates[0] in quick and tile != candidates[0]:
        line += f", the rule's {quick[candidates[0]]:.2f} us"
    line += f"; {len(refused)} refused, first {refused[0]}" if refused else ""
    return {**key, "us": us, "tile": tile_tables.compact(tile)}, line


def _words(tile: Tile) -> str:
    words = f"{tile.kernel} {tile.block_m}x{tile.block_n} warps {tile.num_warps} stages {tile.num_stages}"
    extra = {"split_k": tile.split_k, "programs_per_sm": tile.programs_per_sm}
    return words + "".join(f" {name} {value}" for name, value in extra.items() if value > 1)


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 28672x4096")
    return int(match[1]), int(match[2])


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Command line of :func:`tune`."""
    defaults = IntScaleConfig()
    parser = argparse.ArgumentParser(prog="python -m intscale_compile.tuning", description="Time tiles on this GPU.")
    parser.add_argument("--shapes", nargs="+", type=_pair, metavar="NxK", help="default: those of Llama 3 8B")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--path", help="table to write; default: the one that is read")
    parser.add_argument("--seconds", type=float, help="budget")
    for field in ("group_size", "scale_bits", "weight_bits"):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=getattr(defaults, field))
    args = parser.parse_args(arguments)
    try:
        config = IntScaleConfig(args.group_size, args.weight_bits, args.scale_bits)
        tune(args.shapes, args.tokens, config=config, path=args.path, seconds=args.seconds)
    except IntScaleError as error:
        sys.exit(f"error: {error}")
