"""Gate and up projection of a Llama MLP: the gated op against a linear and Inductor's SiLU * mul behind it, on a GPU.

    python benchmarks/gated.py                                  # Llama-3-8B, 256 to 4096 tokens
    python benchmarks/gated.py --features 11008 --tokens 1024

Both sides include the quantization of the down projection's input, which Inductor fuses behind SiLU * mul: the linear by
itself would leave out what it saves. Each is captured into a CUDA graph once for each copy of the weight; replays take
turns. Figures of two machines do not compare.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from reporting import head, machine, row
from timing import compiled_us, copy_count, environment, l2_bytes
from torch import Tensor

from intscale_compile.kernels.tile_timing import Problem, Shape
from intscale_compile.kernels.triton_gated import gated_linear_cuda
from intscale_compile.kernels.triton_gemm import linear_cuda
from intscale_compile.ops import quantize_per_token, register_inductor


def quantize_gated(y: Tensor) -> tuple[Tensor, Tensor]:
    """SiLU * mul of ``[M, 2 I]`` and its quantization: what follows an ordinary linear."""
    gate, up = y.chunk(2, dim=-1)
    return quantize_per_token.OP(torch.nn.functional.silu(gate) * up)


def calls(p: Problem, columns: int) -> dict[str, list[Callable[[], object]]]:
    """What is timed, by name: one call for each copy of the weight."""
    options = {"split_reductions": False}
    after_linear = torch.compile(quantize_gated, options=options, dynamic=False)
    after_gated = torch.compile(quantize_per_token.OP, options=options, dynamic=False)
    form = (2 * columns, 128, 4, "tiled", torch.bfloat16)

    def linear(qdata: Tensor, scale: Tensor) -> Tensor:
        return linear_cuda(p.xq, p.token_scale, qdata, scale, p.row_scale, None, *form, overlap=True)

    def gated(qdata: Tensor, scale: Tensor) -> Tensor:
        return gated_linear_cuda(p.xq, p.token_scale, qdata, scale, p.row_scale, None, "silu", *form, overlap=True)

    kinds = {
        "linear": linear,
        "gated": gated,
        "linear, silu*mul, quantize": lambda *weight: after_linear(linear(*weight)),
        "gated, quantize": lambda *weight: after_gated(gated(*weight)),
    }
    return {name: [lambda w=w, call=call: call(*w) for w in p.weights] for name, call in kinds.items()}


def measure(tokens: int, columns: int, hidden: int) -> dict[str, float]:
    """Median microseconds of each of :func:`calls`."""
    shape = Shape(2 * columns, hidden)
    p = Problem(shape, tokens, copies=copy_count(columns * hidden, l2_bytes()))
    return compiled_us(calls(p, columns))


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--features", type=int, default=14336, help="output features of each of the two projections")
    parser.add_argument("--hidden", type=int, default=4096, help="input features")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    register_inductor()
    print(machine(environment(), "device", "torch", "triton", "date"))
    print("microseconds; whole: with SiLU * mul and the quantization of the next layer's input")
    print(head(["tokens", "linear", "gated", "whole linear", "whole gated", "saved"]))
    for tokens in args.tokens:
        times = list(measure(tokens, args.features, args.hidden).values())
        print(row([tokens, *(f"{us:.1f}" for us in times), f"{1 - times[3] / times[2]:.1%}"]), flush=True)


if __name__ == "__main__":
    main()
