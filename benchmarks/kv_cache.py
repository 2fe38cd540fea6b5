"""Perplexity with an int8 key and value cache: static scales for each head, measured on text or on random tokens.

    python benchmarks/kv_cache.py                             # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/kv_cache.py FOLDER --text FILE --calibration-text FILE

Held-out and calibration text are those of accuracy.py, or pieces of two files. Attention reads all keys and values, those of the
prompt's own tokens too, out of the cache. Beside it: ``IntegerCache``, with a scale for each token and head.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import calibration_sequences, load_model
from perplexity import MODULE_LIST, default_model, held_out_sequences
from reporting import head, row
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import quantize_

from intscale_compile import IntScaleConfig, kv_cache
from intscale_compile.calibration import random_token_ids
from intscale_compile.integer_only import IntegerCache


def losses(model: nn.Module, sequences: Tensor, new_cache: Callable) -> list[float]:
    """Mean next-token loss of each sequence."""
    found = []
    for ids in sequences.split(1):
        logits = model(ids, past_key_values=new_cache(), use_cache=True).logits
        found.append(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())
    return found


def paired(found: list[float], plain: list[float]) -> str:
    """Change of perplexity with its standard error over sequences."""
    differences = [a - b for a, b in zip(found, plain)]
    error = 100 * statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return f"{100 * math.expm1(statistics.fmean(differences)):+.3f} ± {error:.3f} %"


def pieces(tokenizer, path: Path, sequences: int, tokens: int) -> Tensor:
    """The first token ids ``[sequences, tokens]`` of a text."""
    ids = tokenizer(path.read_text(encoding="utf-8")[: 8 * sequences * tokens], verbose=False).input_ids
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print a table for the float model and for the quantized one."""
    parser = argparse.ArgumentParser(prog="kv_cache", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-llama")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--calibration", type=int, default=32, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args(argv)
    tokenizer, model = load_model(args.model, "cpu")
    modules = default_model().parent / MODULE_LIST
    if args.text is None:
        held_out = held_out_sequences(tokenizer, modules, args.sequences, args.tokens)
        data = calibration_sequences(tokenizer, modules, args.calibration, args.tokens)
    else:
        held_out = pieces(tokenizer, args.text, args.sequences, args.tokens)
        data = pieces(tokenizer, args.calibration_text, args.calibration, args.tokens)
    print(head(["weights", "cache", "perplexity", "change"]))
    for name in ("fp32", "W4A8"):
        if name == "W4A8":
            quantize_(model, IntScaleConfig())
        plain = losses(model, held_out, lambda: None)
        print(row([name, "float", f"{math.exp(statistics.fmean(plain)):.3f}", ""]), flush=True)
        dynamic = losses(model, held_out, IntegerCache)
        rows = {"int8, a scale for each token and head": dynamic}
        for source, ids in (("text", data), ("random tokens", random_token_ids(model, args.calibration, args.tokens))):
            kv_cache.measure_cache(model, ids)
            rows[f"int8, static for each head, of {source}"] = losses(
                model, held_out, lambda: kv_cache.int8_cache(model)
            )
        for cache, found in rows.items():
            value = math.exp(statistics.fmean(found))
            print(row([name, cache, f"{value:.3f}", paired(found, plain)]), flush=True)


if __name__ == "__main__":
    main()
