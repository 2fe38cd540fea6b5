"""Seconds that quantizing 8 billion weights takes on a GPU, extrapolated from one layer.

python benchmarks/quantize_time.py
"""

from __future__ import annotations

import argparse
import time

import torch

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.config import SCALE_SEARCHES

WEIGHTS = 8e9


def seconds(weight: torch.Tensor, config: IntScaleConfig, repeats: int = 3) -> float:
    """Mean seconds to quantize ``weight``, kernels compiled before."""
    IntScaleTensor.from_hp(weight[:1024], config)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        IntScaleTensor.from_hp(weight, config)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main(argv: list[str] | None = None) -> None:
    """Print one line for each way to choose scales."""
    parser = argparse.ArgumentParser(prog="quantize_time", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[28672, 4096], metavar=("N", "K"))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("quantize_time: no CUDA device")
    torch.manual_seed(0)
    weight = torch.randn(args.shape, device="cuda", dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {args.shape[0]} x {args.shape[1]}, bf16")
    for search in SCALE_SEARCHES:
        taken = seconds(weight, IntScaleConfig(scale_search=search))
        print(f"{search}: {taken:.4f} s, {taken * WEIGHTS / weight.numel():.1f} s for {WEIGHTS:.0e} weights")


if __name__ == "__main__":
    main()
