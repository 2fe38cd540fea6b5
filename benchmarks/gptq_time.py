"""Seconds that calibrating one decoder layer of an 8-billion-parameter Llama with GPTQ takes on a GPU, part by part.

    python benchmarks/gptq_time.py
    python benchmarks/gptq_time.py --tokens 262144 --sweeps 1

Random bf16 weights of the real shapes; activations are random with channels that correlate and differ in size. Statistics
are those of ``calibrate``; running the layer itself, to get the activations, is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from reporting import table
from torch import Tensor

from intscale_compile import CalibrationConfig
from intscale_compile.calibration.capture import second_moments
from intscale_compile.calibration.clipping import choose_steps
from intscale_compile.calibration.gptq import feedback, gptq_codes
from intscale_compile.calibration.solve import Codes, importance_of

LAYERS = {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
PARTS = ("statistics", "scales", "factorization", "rounding", "packing")


def activations(tokens: int, channels: int, generator: torch.Generator) -> Tensor:
    """bf16 ``[tokens, channels]``: a quarter as many independent sources, mixed, plus noise; channel sizes vary."""
    sources = torch.randn(tokens, channels // 4, device="cuda", dtype=torch.bfloat16, generator=generator)
    mixing = torch.randn(channels // 4, channels, device="cuda", dtype=torch.bfloat16, generator=generator)
    size = torch.randn(channels, device="cuda", generator=generator).exp().bfloat16()
    noise = torch.randn(tokens, channels, device="cuda", dtype=torch.bfloat16, generator=generator)
    return (sources @ mixing / (channels / 4) ** 0.5 + noise) * size


def timed(part: Callable):
    """Result and seconds of a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = part()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def layer_seconds(shape: tuple[int, int], tokens: int, chosen: CalibrationConfig) -> dict[str, float]:
    """Seconds of each part for one weight. The factorization is timed alone and taken off the rounding, which has it."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows, columns = shape
    x = activations(min(tokens, 16384), columns, generator)
    weight = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, generator=generator) * 0.02
    seconds = {}

    def statistics() -> Tensor:
        total = torch.zeros(columns, columns, device="cuda")
        for _ in range(-(-tokens // len(x))):
            total += second_moments(x)
        return total

    hessian, seconds["statistics"] = timed(statistics)
    wide, config = weight.float(), chosen.base_config
    steps, seconds["scales"] = timed(lambda: choose_steps(wide, config, importance_of(hessian), integer=True))
    _, seconds["factorization"] = timed(lambda: feedback(hessian, chosen.damping))
    options = dict(act_order=chosen.act_order, damping=chosen.damping, sweeps=chosen.sweeps)
    codes, both = timed(lambda: gptq_codes(wide, steps, hessian, **options))
    seconds["rounding"] = both - seconds["factorization"]
    _, seconds["packing"] = timed(lambda: Codes(codes, steps, config, weight.dtype).tensor("weight"))
    return seconds


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row for each weight."""
    parser = argparse.ArgumentParser(prog="gptq_time", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="calibration tokens (default: 128 x 2048)")
    parser.add_argument("--sweeps", type=int, default=0, help="sweeps of coordinate descent after GPTQ")
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("gptq_time: no CUDA device")
    chosen = CalibrationConfig(sweeps=args.sweeps)
    layer_seconds((256, 256), 1024, chosen)  # compiles the kernels
    layer_seconds((256, 512), 1024, chosen)
    found = {name: layer_seconds(shape, args.tokens, chosen) for name, shape in LAYERS.items()}
    total = {part: sum(row[part] for row in found.values()) for part in PARTS}
    if args.json:
        device = torch.cuda.get_device_name()
        print(json.dumps({"device": device, "tokens": args.tokens, "seconds": found, "total": sum(total.values())}))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.tokens} tokens, sweeps {args.sweeps}\n")
    rows = []
    for name, parts in (*found.items(), ("layer", total)):
        shape = " x ".join(map(str, LAYERS.get(name, ())))
        rows.append([name, shape, *(f"{parts[part]:.3f}" for part in PARTS), f"{sum(parts.values()):.3f}"])
    print(table(["", "N x K", *PARTS, "sum"], rows))


if __name__ == "__main__":
    main()
