"""W4A8 against fp32 on a CPU, both compiled: single linears, and a whole model.

    python benchmarks/cpu.py                         # 4096 x 4096 linears and tiny-llama at 4 x 512 tokens
    python benchmarks/cpu.py --model FOLDER --json OUT.json

Runs of the two sides alternate; each row gives the medians and their ratio. Figures of two machines or two runs do not compare.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from reporting import head, row
from torch import nn

import intscale_compile  # noqa: F401  (fails early where it is not installed)

FEATURES = 4096
TOKENS = (1, 16, 256)


def default_model() -> Path:
    """tiny-llama in the folder that the tests use too."""
    checkout = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("INTSCALE_MODELS", checkout.parent / "shared" / "models")) / "tiny-llama"


def alternate(functions: dict, seconds: float) -> dict[str, float]:
    """Median seconds of each function; they take turns for about ``seconds``, after three turns of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = None
    while end is None or time.perf_counter() < end or len(next(iter(times.values()))) < 8:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
        if end is None and len(times[name]) == 3:
            times = {name: [] for name in functions}
            end = time.perf_counter() + seconds
    return {name: statistics.median(values) for name, values in times.items()}


def compare(label: str, module: nn.Module, x: torch.Tensor, seconds: float) -> dict:
    """Time a module compiled by Inductor in fp32 and by intscale, check them against each other, print one row."""
    torch._dynamo.reset()
    fp32 = torch.compile(module, fullgraph=True)
    w4a8 = torch.compile(module, backend="intscale", fullgraph=True)
    reference, value = (y if isinstance(y, torch.Tensor) else y.logits for y in (fp32(x), w4a8(x)))
    sqnr = (10 * torch.log10(reference.square().mean() / (reference - value).square().mean())).item()
    median = alternate({"fp32": lambda: fp32(x), "w4a8": lambda: w4a8(x)}, seconds)
    found = {
        "what": label,
        "fp32_ms": median["fp32"] * 1e3,
        "w4a8_ms": median["w4a8"] * 1e3,
        "speedup": median["fp32"] / median["w4a8"],
        "sqnr_db": sqnr,
    }
    figures = [f"{found[name]:.2f}" for name in ("fp32_ms", "w4a8_ms", "speedup")]
    print(row([label, *figures, f"{sqnr:.1f}"]), flush=True)
    return found


def main(argv=None) -> None:
    """Print a Markdown table; with ``--json`` also write it."""
    parser = argparse.ArgumentParser(prog="cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_model(), help="folder of a causal language model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(head(["what", "fp32 ms", "W4A8 ms", "speedup", "SQNR dB"]))
    rows = []
    with torch.no_grad():
        linear = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        for tokens in TOKENS:
            rows.append(
                compare(
                    f"linear {FEATURES} x {FEATURES}, M={tokens}", linear, torch.randn(tokens, FEATURES), args.seconds
                )
            )
        if (args.model / "config.json").is_file():
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval().requires_grad_(False)
            model.config.use_cache = False
            ids = torch.randint(0, model.config.vocab_size, (args.batch, args.tokens))
            rows.append(
                compare(f"{args.model.name}, {args.batch} x {args.tokens} tokens", model, ids, args.seconds * 4)
            )
        else:
            print(f"cpu: no model in {args.model}, left out", file=sys.stderr)
    if args.json:
        args.json.write_text(
            json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
