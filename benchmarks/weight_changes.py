"""What it costs a decoding step to find out whether weights have changed.

    python benchmarks/weight_changes.py                       # on a CPU
    python benchmarks/weight_changes.py --device cuda --hidden 4096 --layers 32 --cuda-graphs

A Llama with plain weights, compiled as a whole: every weight is a copy in the graph. Calls with the comparison and without
it alternate. Also in microseconds, since the comparison costs the same however long the step is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

CALLS = 40


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="weight_changes", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cuda-graphs", action="store_true", help="compile with mode='reduce-overhead'")
    parser.add_argument("--quantized", action="store_true", help="call quantize_ first: only copies are looked at")
    parser.add_argument("--json", help="write the figures to this file")
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> torch.nn.Module:
    """Decoder layers without attention: the seven linears of a Llama layer, two norms and a residual each."""
    torch.manual_seed(0)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    layers = [Layer(args.hidden) for _ in range(args.layers)]
    model = torch.nn.Sequential(*layers).to(args.device, dtype).eval().requires_grad_(False)
    if args.quantized:
        from torchao.quantization import quantize_

        import intscale_compile

        quantize_(model, intscale_compile.IntScaleConfig(scale_search="absmax"))
    return model


class Layer(torch.nn.Module):
    """q/k/v with biases, o, gate, up and down."""

    def __init__(self, hidden: int):
        super().__init__()
        linear = torch.nn.Linear
        self.q, self.k, self.v = linear(hidden, hidden), linear(hidden, hidden // 4), linear(hidden, hidden // 4)
        self.o = linear(hidden, hidden, bias=False)
        self.gate, self.up = linear(hidden, 3 * hidden, bias=False), linear(hidden, 3 * hidden, bias=False)
        self.down = linear(3 * hidden, hidden, bias=False)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[M, hidden]`` to the same."""
        y = self.norms[0](x)
        x = x + self.o(self.q(y) * torch.cat([self.k(y), self.v(y)], -1).repeat(1, 2))
        y = self.norms[1](x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def timed(call: Callable[[], Any], device: str) -> float:
    """Microseconds of one call, with the GPU waited for."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Medians of alternating calls, and the time of the comparison alone on the host."""
    from intscale_compile import IntScaleConfig
    from intscale_compile.compile.binding import _Binding

    model = build(args)
    config = {"intscale.config": IntScaleConfig(scale_search="absmax")}
    options = config | ({"triton.cudagraphs": True} if args.cuda_graphs else {})
    run = torch.compile(model, backend="intscale", options=options)
    x = torch.randn(1, args.hidden, device=args.device, dtype=next(model.parameters()).dtype)
    compare, spent = _Binding.holds, []

    def holds(self: Any, given: Any) -> bool:
        start = time.perf_counter()
        result = compare(self, given)
        spent.append((time.perf_counter() - start) * 1e6)
        return result

    with torch.no_grad():
        for _ in range(5):
            run(x)
        times: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(CALLS):
            for name, function in (("with", compare), ("without", lambda *_: True)):
                _Binding.holds = function  # type: ignore[method-assign]
                times[name].append(timed(lambda: run(x), args.device))
        _Binding.holds = holds  # type: ignore[method-assign]
        for _ in range(CALLS):
            timed(lambda: run(x), args.device)
        _Binding.holds = compare  # type: ignore[method-assign]
    step, without = (statistics.median(times[name]) for name in ("with", "without"))
    host = statistics.median(spent)
    return dict(
        vars(args), threads=torch.get_num_threads(), step_us=step, step_without_us=without, comparison_us=host,
        percent=100 * host / without,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    found = measure(args)
    print(f"step {found['step_us']:.0f} us, without comparison {found['step_without_us']:.0f} us")
    print(f"comparison on the host {found['comparison_us']:.1f} us: {found['percent']:.2f} % of a step")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
