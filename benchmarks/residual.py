"""A linear, the residual, the norm and the quantization behind it: the addition in the GEMM's epilogue or in the norm's kernel.

    python benchmarks/residual.py                               # Llama-3-8B: output and down projection, 256 to 8192 tokens
    python benchmarks/residual.py --shapes 5120x13824 --tokens 1024

Both sides end with the sum, which the next residual needs, and with the quantized input of the next linear. Each is captured
into a CUDA graph once for each copy of the weight and the residual; replays take turns. Figures of two machines do not compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from reporting import head, machine, row
from timing import compiled_us, copy_count, environment, l2_bytes
from torch import Tensor

from intscale_compile.kernels.tile_timing import Problem, Shape
from intscale_compile.kernels.triton_gemm import linear_cuda
from intscale_compile.ops import quantize_per_token, register_inductor

EPSILON = 1e-5


def norm_quantize(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``[M, N]`` as in Llama, and its quantization."""
    wide = total.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(total.dtype)
    return quantize_per_token.OP(weight * normed)


def add_norm_quantize(y: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What follows a linear that adds nothing."""
    total = residual + y
    return total, norm_quantize(total, weight)


def calls(p: Problem, residuals: list[Tensor]) -> dict[str, list[Callable[[], object]]]:
    """What is timed, by name: one call for each copy of the weight."""
    options, form = {"split_reductions": False}, (p.shape.n, 128, 4, "tiled", torch.bfloat16)
    after_linear = torch.compile(add_norm_quantize, options=options, dynamic=False)
    after_sum = torch.compile(norm_quantize, options=options, dynamic=False)
    weight = torch.ones(p.shape.n, device="cuda", dtype=torch.bfloat16)

    def linear(qdata: Tensor, scale: Tensor, residual: Tensor | None = None) -> Tensor:
        operands = (p.xq, p.token_scale, qdata, scale, p.row_scale, None)
        return linear_cuda(*operands, *form, overlap=True, residual=residual)

    kinds: dict[str, Callable[..., object]] = {
        "linear": lambda *packed, residual: linear(*packed),
        "linear + residual": linear,
        "whole, added by the norm": lambda *packed, residual: after_linear(linear(*packed), residual, weight),
        "whole, added by the GEMM": lambda *packed, residual: after_sum(linear(*packed, residual=residual), weight),
    }
    return {
        name: [lambda w=w, r=r, call=call: call(*w, residual=r) for w, r in zip(p.weights, residuals, strict=True)]
        for name, call in kinds.items()
    }


def check(p: Problem, residual: Tensor) -> None:
    """Raise unless the GEMM's sum has the bits of the linear and an addition."""
    form = (p.xq, p.token_scale, *p.weights[0], p.row_scale, None, p.shape.n, 128, 4, "tiled", torch.bfloat16)
    if not torch.equal(linear_cuda(*form, residual=residual), linear_cuda(*form) + residual):
        raise SystemExit(f"residual: wrong sum at {p.shape}, {len(residual)} tokens")


def measure(tokens: int, n: int, k: int) -> dict[str, float]:
    """Median microseconds of each of :func:`calls`."""
    p = Problem(Shape(n, k), tokens, copies=copy_count(n * k // 2, l2_bytes()))
    residuals = [torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for _ in p.weights]
    check(p, residuals[0])
    return compiled_us(calls(p, residuals))


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row for each shape and number of tokens."""
    parser = argparse.ArgumentParser(prog="residual", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336"], metavar="NxK")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("residual: no CUDA device")
    register_inductor()
    print(machine(environment(), "device", "torch", "triton", "date"))
    print("microseconds; whole: with the residual, the norm and the quantization of the next layer's input\n")
    print(head(["shape", "tokens", "linear", "linear + residual", "whole, added by the norm", "by the GEMM", "saved"]))
    for shape in args.shapes:
        for tokens in args.tokens:
            times = list(measure(tokens, *map(int, shape.split("x"))).values())
            saved = f"{1 - times[3] / times[2]:.1%}"
            print(row([shape, tokens, *(f"{us:.1f}" for us in times), saved]), flush=True)


if __name__ == "__main__":
    main()
