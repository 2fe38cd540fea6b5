"""Attention of one new token over a static cache: ours against PyTorch's kernels, in one run on one GPU.

    python benchmarks/decode_attention.py                                    # Llama-3-8B's heads
    python benchmarks/decode_attention.py --points 1x8192 16x8192 --room 128 --most-parts 32 64 128

A point is BATCHxTOKENS; the cache has ``--room`` places more, which the mask hides. ``flash`` and ``cudnn`` get the filled part
alone, without a mask, which a static cache cannot give them, ``cudnn, mask`` the whole cache; ``masked`` is what transformers'
``sdpa`` does: keys and values repeated for every query head, and the mask. Outputs are compared first. Microseconds: medians of
CUDA graphs over caches that do not fit in the L2 cache together.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from reporting import head, machine, row
from timing import alternate_ms, capture, copy_count, environment, l2_bytes, release
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention

from intscale_compile.kernels import triton_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="decode_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("QUERY", "KEY", "FEATURES"))
    parser.add_argument("--points", nargs="+", default=["1x1024", "1x2048", "1x8192", "1x32768", "16x2048", "16x8192"])
    parser.add_argument("--room", type=int, default=128, help="places of the cache behind the tokens")
    parser.add_argument(
        "--most-parts", type=int, nargs="+", help="parts of the keys; default: by their number, as shipped"
    )
    return parser.parse_args(argv)


def peers(batch: int, tokens: int, args: argparse.Namespace) -> dict[str, list[Callable[[], Any]]]:
    """A call for each copy of the cache, by name."""
    query_heads, key_heads, features = args.heads
    length, scale = tokens + args.room, features**-0.5
    nbytes = 2 * batch * key_heads * length * features * 2
    options = dict(device="cuda", dtype=torch.bfloat16)
    caches = [
        tuple(torch.randn(batch, key_heads, length, features, **options) for _ in range(2))
        for _ in range(copy_count(nbytes, l2_bytes()))
    ]
    q = torch.randn(batch, query_heads, 1, features, **options)
    mask = (torch.arange(length, device="cuda") < tokens).expand(batch, 1, 1, length)
    repeats = query_heads // key_heads

    def ours(most: int | None, k: Any, v: Any) -> Any:
        if most is not None:
            triton_attention.FEW_PARTS = triton_attention.MOST_PARTS = most
        return triton_attention.decode_attention_cuda(q, k, v, mask, scale)

    def masked(k: Any, v: Any) -> Any:
        return attention(
            q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), attn_mask=mask, scale=scale
        )

    def filled(backend: SDPBackend, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return attention(q, k[:, :, :tokens], v[:, :, :tokens], scale=scale, enable_gqa=True)

    def cudnn_masked(k: Any, v: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    kinds: dict[str, Callable[..., Any]] = {
        f"ours, {n} parts": lambda k, v, n=n: ours(n, k, v) for n in args.most_parts
    }
    kinds |= {name: lambda k, v, b=backend: filled(b, k, v) for name, backend in BACKENDS.items()}
    kinds["cudnn, mask"] = cudnn_masked
    kinds["masked"] = masked
    return {name: [lambda c=cache, f=call: f(*c) for cache in caches] for name, call in kinds.items()}


def measure(batch: int, tokens: int, args: argparse.Namespace) -> dict[str, float | str]:
    """Microseconds of each peer, or why there are none."""
    found: dict[str, float | str] = {}
    graphs, count = {}, 1
    with torch.no_grad():
        calls = peers(batch, tokens, args)
        reference = calls["masked"][0]().float()
        for name, each in calls.items():
            try:
                error = ((each[0]().float() - reference).norm() / reference.norm()).item()
                if not error < 0.01:
                    raise ArithmeticError(f"relative error {error:.3f}")
                graphs[name], count = capture(each), len(each)
            except (RuntimeError, ArithmeticError) as problem:
                found[name] = str(problem).splitlines()[0][:60]
        for name, times in alternate_ms(graphs).items():
            found[name] = statistics.median(times) * 1e3 / count
    return {name: found[name] for name in calls}


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    args = parse(argv)
    print(f"{machine(environment())}, heads {args.heads}\n")
    for i, point in enumerate(args.points):
        batch, tokens = map(int, point.split("x"))
        found = measure(batch, tokens, args)
        release()
        query_heads, key_heads, features = args.heads
        nbytes = 4 * batch * key_heads * tokens * features
        if i == 0:
            print(head(["point", "MB", *found]))
        cells = [value if isinstance(value, str) else f"{value:.1f}" for value in found.values()]
        print(row([point, f"{nbytes / 1e6:.1f}", *cells]), flush=True)


if __name__ == "__main__":
    main()
