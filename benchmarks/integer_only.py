"""Integer-only models against the float form of the same weights, both compiled by intscale: time of prefill and of decoding.

    python benchmarks/integer_only.py                               # tiny-llama, 4 x 512 tokens, on a CPU
    python benchmarks/integer_only.py --device cuda --random 4096 --layers 2 --batch 1 --tokens 2048 --decode 1 16

Runs of the two sides alternate; each row gives the medians and their ratio. A decoding step attends to ``--tokens`` keys: the
float form's in a cache of its dtype, the integer form's in an int8 cache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from cpu import default_model
from reporting import head, row
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, integer_only


def load(folder: Path, random: int | None, layers: int | None, dtype: torch.dtype, device: str):
    """A model of a folder, or one of this width with random weights, quantized where it is to run."""
    if random is None:
        more = {} if layers is None else {"num_hidden_layers": layers}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    else:
        config = transformers.LlamaConfig(
            vocab_size=8192, hidden_size=random, intermediate_size=random * 7 // 2, num_hidden_layers=layers or 4,
            num_attention_heads=random // 128, num_key_value_heads=max(1, random // 512),
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(dtype)
    model = model.to(device).eval().requires_grad_(False)
    quantize_(model, IntScaleConfig())
    return model


def alternate(functions: dict[str, Callable], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of each function; they take turns for about ``seconds``, after three turns of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = None
    while end is None or time.perf_counter() < end or len(next(iter(times.values()))) < 8:
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        if end is None and len(times[name]) == 3:
            times = {name: [] for name in functions}
            end = time.perf_counter() + seconds
    return {name: statistics.median(values) for name, values in times.items()}


def steps(run: Callable, ids: torch.Tensor, cache) -> Callable:
    """A decoding step behind the tokens ``ids``, from one state of the cache each time."""
    run(ids, past_key_values=cache, use_cache=True)
    token = ids[:, -1:].contiguous()
    return lambda: run(token, past_key_values=cache_of(cache), use_cache=True)


def cache_of(cache):
    """A copy of a cache that shares its tensors: what a step appends is not seen by the next."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def report(label: str, functions: dict[str, Callable], args) -> None:
    """Time both sides and print one row."""
    median = alternate(functions, args.seconds, args.device)
    ratio = median["integer"] / median["float"]
    print(row([label, f"{median['float'] * 1e3:.2f}", f"{median['integer'] * 1e3:.2f}", f"{ratio:.2f}"]), flush=True)


def main(argv=None) -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(prog="integer_only", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_model(), help="folder of a causal language model")
    parser.add_argument("--random", type=int, help="in its place: a Llama of this width with random weights")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--decode", type=int, nargs="*", default=[], help="batches of decoding steps")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each row")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = load(args.model, args.random, args.layers, dtype, args.device)
    ids = torch.randint(0, model.config.vocab_size, (max([args.batch, *args.decode]), args.tokens), device=args.device)
    print(head(["", "float, ms", "integer-only, ms", "ratio"]))
    with torch.no_grad():
        # One model each: Dynamo keeps what it compiled by the function that it compiled.
        sides = {"float": ({}, model), "integer": (integer_only.OPTIONS, copy.deepcopy(model))}
        runs = {name: torch.compile(one, backend="intscale", options=options) for name, (options, one) in sides.items()}
        prompt = ids[: args.batch].contiguous()
        prefill = {name: (lambda run=run: run(prompt, use_cache=False)) for name, run in runs.items()}
        report(f"prefill {args.batch} x {args.tokens}", prefill, args)
        for batch in args.decode:
            prompt = ids[:batch].contiguous()
            caches = {"float": transformers.DynamicCache(), "integer": integer_only.IntegerCache()}
            report(f"a token, batch {batch}", {n: steps(run, prompt, caches[n]) for n, run in runs.items()}, args)


if __name__ == "__main__":
    main()
