"""First figures on a GPU: the fused linear against cuBLAS bf16 and fp8 rowwise, and the time to quantize.

    python benchmarks/gpu_smoke.py

GEMM only, activations quantized before; CUDA graph replay over rotating weights larger than the L2 cache, random data,
every point checked. Deep tuning and the other peers come with benchmarks/gemm.py.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.kernels.triton_gemm import linear_cuda
from intscale_compile.kernels.w4a8_linear import apply_scales, reference_accumulate

SHAPES = ((28672, 4096), (4096, 14336), (6144, 4096), (4096, 4096))
TOKENS = (1, 16, 64, 256, 1024, 4096)
L2_BYTES = 60e6


def median_us(calls, replays: int = 15) -> float:
    """Median time of one call in microseconds; ``calls`` are captured into one graph, each on other buffers."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def fp8_rowwise(x: torch.Tensor, weight: torch.Tensor):
    """Operands of ``torch._scaled_mm`` with one scale per row."""
    sx, sw = x.float().abs().amax(1, keepdim=True) / 448, weight.float().abs().amax(1, keepdim=True) / 448
    return (x / sx).to(torch.float8_e4m3fn), (weight / sw).to(torch.float8_e4m3fn), sx.float(), sw.float()


def row(n: int, k: int, m: int) -> str:
    """Time one shape and check it."""
    copies = max(2, int(L2_BYTES * 2 / (n * k / 2)) + 1)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    packed = [IntScaleTensor.from_hp(w, IntScaleConfig(scale_search="absmax")) for w in weights]
    wide = [IntScaleTensor.from_hp(w, IntScaleConfig(scale_search="absmax", scale_bits=8)) for w in weights]
    xq, token_scale = torch.ops.intscale.quantize_per_token(x)

    def w4a8(t):
        return linear_cuda(
            xq,
            token_scale,
            t.qdata,
            t.scale,
            t.row_scale,
            None,
            n,
            t.group_size,
            t.scale_bits,
            t.packing_format,
            x.dtype,
        )

    for t in (packed[0], wide[0]):
        acc = reference_accumulate(xq, t.qdata, t.scale, n, t.group_size, t.packing_format)
        expected = apply_scales(acc, token_scale, t.row_scale, None, x.dtype)
        if not torch.allclose(w4a8(t).float(), expected.float(), rtol=8e-3, atol=0):
            raise SystemExit(f"wrong result for {n} x {k}, M={m}, scale_bits={t.scale_bits}")
    eight = [fp8_rowwise(x, w) for w in weights]
    fold = median_us([lambda t=t: w4a8(t) for t in packed])
    accumulate = median_us([lambda t=t: w4a8(t) for t in wide])
    bf16 = median_us([lambda w=w: x @ w.t() for w in weights])
    fp8 = median_us(
        [lambda e=e: torch._scaled_mm(e[0], e[1].t(), scale_a=e[2], scale_b=e[3].t(), out_dtype=x.dtype) for e in eight]
    )
    return f"| {n} x {k} | {m} | {bf16:.1f} | {fp8:.1f} | {fold:.1f} | {accumulate:.1f} | {bf16 / fold:.2f} | {fp8 / fold:.2f} |"


def quantize_seconds() -> float:
    """Seconds of exhaustive search for 8 billion weights, from one 28672 x 4096 layer."""
    weight = torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16)
    IntScaleTensor.from_hp(weight[:1024])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        IntScaleTensor.from_hp(weight)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 3 * 8e9 / weight.numel()


def main(argv=None) -> None:
    """Print a Markdown table."""
    argparse.ArgumentParser(prog="gpu_smoke", description=__doc__.splitlines()[0]).parse_args(argv)
    torch.manual_seed(0)
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; us per call\n")
    print("| N x K | M | bf16 | fp8 rowwise | W4A8 fold | W4A8 accumulate (8-bit scales) | bf16 / fold | fp8 / fold |")
    print("|---|---|---|---|---|---|---|---|")
    for n, k in SHAPES:
        for m in TOKENS:
            print(row(n, k, m), flush=True)
    print(
        f"\nquantizing 8 billion weights (exhaustive search, extrapolated from 28672 x 4096): {quantize_seconds():.1f} s"
    )


if __name__ == "__main__":
    main()
