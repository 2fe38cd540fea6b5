"""Forms of a W4A8 linear layer that gemm.py does not time: zero points, static activation scales, the online Hadamard transform.

    python benchmarks/variants.py                                          # a GPU; 1, 16, 256 and 2048 tokens
    python benchmarks/variants.py --shapes 28672x4096 --tokens 1 64 --json OUT.json
    python benchmarks/variants.py --device cpu --shapes 256x512 --tokens 4  # only shows that it runs

Three tables for each shape: products of int8 activations; the same with the quantization before them, as kernels of one graph,
which is what a layer costs whose input nothing is fused with; and the quantizations alone, per token and static ones as Inductor
compiles them. Groups of 128. Weights with zero points are made from codes and have 8-bit group scales, as imported AWQ
checkpoints do; symmetric ones with 8-bit scales stand beside them. The transform's blocks are the largest power of two that
divides K. Every output is checked before it is timed: the product against the exact integers, quantizations against the
reference on a CPU. CUDA graphs over copies of each weight that together exceed twice the L2 cache; replays take turns.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gemm_peers.base import WrongResult, ends
from reporting import machine
from reporting import table as markdown
from timing import alternate_ms, capture, copy_count, environment, l2_bytes, release, replay_ms
from torch import Tensor

from intscale_compile import IntScaleConfig, IntScaleTensor
from intscale_compile.compile.inductor_settings import code_generation
from intscale_compile.kernels.hadamard import HADAMARD_QUANTIZE_OP
from intscale_compile.kernels.quantize_per_token import OP as QUANTIZE_OP
from intscale_compile.kernels.quantize_static import STATIC_OP
from intscale_compile.kernels.w4a8_linear import LINEAR_OP, apply_scales, reference_accumulate
from intscale_compile.ops import KERNEL_ABI, register_inductor

GROUP_SIZE = 128
STATIC_SCALE = 4.0 / 127  # of normal activations
CHECKED = 64  # tokens and output features, the first and the last of them
BF16, SYMMETRIC, PER_TOKEN = "bf16", "symmetric", "per token"
KINDS = ("product", "quantization and product", "quantization")
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Row:
    """Median microseconds of one form of one shape."""

    out_features: int
    in_features: int
    tokens: int
    kind: str
    form: str
    us: float


def weights(shape: tuple[int, int], device: str) -> dict[str, IntScaleTensor]:
    """Random weights ``[N, K]`` in each form."""
    dense = torch.randn(shape, device=device, dtype=torch.bfloat16)
    codes = torch.randint(-8, 8, shape, device=device, dtype=torch.int8)
    groups = (shape[0], -(-shape[1] // GROUP_SIZE))
    zero_point = torch.randint(-8, 8, groups, device=device, dtype=torch.int8)
    scale = 0.01 + 0.02 * torch.rand(groups, device=device)
    return {
        SYMMETRIC: IntScaleTensor.from_hp(dense, IntScaleConfig(GROUP_SIZE)),
        "symmetric, 8-bit scales": IntScaleTensor.from_hp(dense, IntScaleConfig(GROUP_SIZE, scale_bits=8)),
        "zero points, 8-bit scales": IntScaleTensor.from_codes(
            codes, scale, group_size=GROUP_SIZE, zero_point=zero_point
        ),
    }


def quantizers(in_features: int, device: str) -> dict[str, Quantize]:
    """Ways to quantize a bf16 activation, as a compiled graph runs them."""
    static, size = torch.full((1, 1), STATIC_SCALE, device=device), in_features & -in_features
    fixed: Quantize = lambda x: STATIC_OP(x, static)  # noqa: E731
    inductor: Callable[[Any], Quantize] = lambda call: call  # noqa: E731
    if device == "cuda":
        inductor = lambda call: torch.compile(call, options={"split_reductions": False}, dynamic=False)  # noqa: E731
    return {
        PER_TOKEN: inductor(QUANTIZE_OP),
        "static": inductor(fixed),
        f"Hadamard of {size}, per token": lambda x: HADAMARD_QUANTIZE_OP(x, size, None),
        f"Hadamard of {size}, static": lambda x: HADAMARD_QUANTIZE_OP(x, size, static),
    }


def product(weight: IntScaleTensor, xq: Tensor, token_scale: Tensor) -> Tensor:
    """The op as the passes launch it: a kernel begins to read its weight while the one before it ends."""
    return LINEAR_OP(
        xq, token_scale, weight.qdata, weight.scale, weight.row_scale, None, weight.out_features, weight.group_size,
        weight.scale_bits, weight.packing_format, torch.bfloat16, KERNEL_ABI, overlap=True, zero_point=weight.zero_point,
    )  # fmt: skip


def check_product(weight: IntScaleTensor, xq: Tensor, token_scale: Tensor) -> None:
    """Raise ``WrongResult`` unless a sample of the output is within one ulp of the exact integers times the scales."""
    rows, columns = (ends(size, CHECKED, xq.device) for size in (xq.shape[0], weight.out_features))
    out = product(weight, xq, token_scale)[rows][:, columns].double()
    plain = weight.to_packing("plain")
    zero_point = None if plain.zero_point is None else plain.zero_point[columns]
    parts = plain.qdata[columns], plain.scale[columns], len(columns), weight.group_size, "plain", zero_point
    acc = reference_accumulate(xq[rows], *parts)
    expected = apply_scales(acc, token_scale[rows], plain.row_scale[columns], None, torch.bfloat16).double()
    if not bool(((out - expected).abs() <= 2.0**-7 * expected.abs()).all()):
        raise WrongResult(f"{tuple(weight.shape)}, {xq.shape[0]} tokens: the product is wrong")


def check_quantizer(name: str, quantize: Quantize, x: Tensor) -> None:
    """Raise ``WrongResult`` unless the result is that of the reference on a CPU, bit for bit."""
    rows = ends(len(x), CHECKED, x.device)
    found, expected = quantize(x), quantizers(x.shape[1], "cpu")[name](x[rows].cpu())
    if not all(torch.equal(f[rows].cpu(), e) for f, e in zip(found, expected, strict=True)):
        raise WrongResult(f"{tuple(x.shape)}, {name}: the quantized activation is wrong")


def right(check: Callable[..., None], *operands: Any) -> bool:
    """Whether a check passes; what does not is not timed, and named on stderr."""
    try:
        check(*operands)
    except WrongResult as error:
        print(f"variants: {error}", file=sys.stderr)
        return False
    return True


def copies(tensor: Tensor, nbytes: int) -> list[Tensor]:
    """As many copies of a weight as exceed the L2 cache; one without a GPU."""
    count = copy_count(nbytes, l2_bytes()) if tensor.is_cuda else 1
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def forms(x: Tensor, dense: list[Tensor], packed: dict[str, list[Any]]) -> dict[tuple[str, str], list[Callable]]:
    """What is timed, checked: calls for each copy of the weight, by kind and form."""
    ways = quantizers(x.shape[1], x.device.type)
    xq, token_scale = QUANTIZE_OP(x)
    found: dict[tuple[str, str], list[Callable]] = {}
    found["product", BF16] = [lambda w=w: torch.nn.functional.linear(x, w) for w in dense]
    for name, tensors in packed.items():
        if not right(check_product, tensors[0], xq, token_scale):
            continue
        found["product", name] = [lambda w=w: product(w, xq, token_scale) for w in tensors]
    for name, quantize in ways.items():
        if not right(check_quantizer, name, quantize, x):
            continue
        found["quantization", name] = [lambda q=quantize: q(x)]
        whole = [lambda q=quantize, w=w: product(w, *q(x)) for w in packed[SYMMETRIC]]
        found["quantization and product", f"{SYMMETRIC}, {name}"] = whole
    for name, tensors in packed.items():
        if name.startswith("zero") and ("product", name) in found:
            both = [lambda w=w: product(w, *ways[PER_TOKEN](x)) for w in tensors]
            found["quantization and product", f"{name}, {PER_TOKEN}"] = both
    return found


def measure(calls: dict[tuple[str, str], list[Callable]], device: str) -> dict[tuple[str, str], float]:
    """Median microseconds of one call."""
    if device == "cuda":
        graphs: dict[Any, Any] = {key: capture(each) for key, each in calls.items()}
        times = alternate_ms(graphs, clock=replay_ms)
    else:
        times = alternate_ms(calls, budget_ms=5.0, least=2, clock=_cpu_ms)  # type: ignore[arg-type]
    return {key: statistics.median(ms) * 1e3 / len(calls[key]) for key, ms in times.items()}


def _cpu_ms(calls: list[Callable]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e3


def measure_shape(shape: tuple[int, int], tokens: list[int], device: str) -> list[Row]:
    """Every form of one shape."""
    dense = torch.randn(shape, device=device, dtype=torch.bfloat16)
    packed = {name: copies(w, w.nbytes_packed()) for name, w in weights(shape, device).items()}
    dense_copies, rows = copies(dense, dense.nbytes), []
    for m in tokens:
        torch._dynamo.reset()
        x = torch.randn(m, shape[1], device=device, dtype=torch.bfloat16)
        with code_generation():
            times = measure(forms(x, dense_copies, packed), device)
        rows += [Row(*shape, m, kind, form, us) for (kind, form), us in times.items()]
    return rows


def table(rows: list[Row], kind: str) -> str:
    """Markdown: microseconds, and in brackets the ratios to bf16 and to the symmetric form (its product, or per token)."""
    rows = [row for row in rows if row.kind in (kind, "product")]
    tokens = sorted({row.tokens for row in rows})
    us = {(row.kind, row.form, row.tokens): row.us for row in rows}
    own = list(dict.fromkeys(row.form for row in rows if row.kind == kind))
    base = next(form for form in own if form in (SYMMETRIC, PER_TOKEN, f"{SYMMETRIC}, {PER_TOKEN}"))
    lines = []
    for form in own:
        cells = [form]
        for m in tokens:
            time_us = us[kind, form, m]
            ratios = [] if kind == "quantization" else [us["product", BF16, m] / time_us]
            ratios += [us[kind, base, m] / time_us]
            cells.append(f"{time_us:.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")
        lines.append(cells)
    return markdown([kind, *(f"{m} tokens" for m in tokens)], lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="variants", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "28672x4096", "4096x14336"], metavar="NxK")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048], metavar="M")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: wall clock, to try the script")
    parser.add_argument("--json", type=Path, help="every median")
    args = parser.parse_args(argv)
    for word in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", word):
            parser.error(f"--shapes {word!r} is not NxK")
    if min(args.tokens) < 1:
        parser.error("--tokens must be at least 1")
    args.shapes = [tuple(map(int, word.split("x"))) for word in args.shapes]
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    args = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("variants: no CUDA device; --device cpu only shows that the script runs")
    register_inductor()
    torch.manual_seed(0)
    facts, rows = environment(), []
    print(machine(facts, "device", "torch", "triton", "date"))
    print("microseconds (times as fast as the bf16 product, as the first form without bf16)")
    with torch.no_grad():
        for shape in args.shapes:
            found = measure_shape(shape, args.tokens, args.device)
            rows += found
            print(f"\n{shape[0]} x {shape[1]}\n")
            print("\n\n".join(table(found, kind) for kind in KINDS), flush=True)
            if args.json:
                args.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1))
            if args.device == "cuda":
                release()


if __name__ == "__main__":
    main()
