"""What adapters make up for: perplexity of a quantized model with LoRA adapters that begin in different ways.

    python benchmarks/adapters.py                                    # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/adapters.py FOLDER --base quantize gptq --methods none svd apiq-lw apiq --rank 16
    python benchmarks/adapters.py --text train.txt --test-text test.txt --tune 50

``--base quantize`` rounds without data, other bases are presets of ``calibrate``. The adapter rests in bf16 or fp32 beside the
weights and is not merged. With ``--tune`` the adapters are trained for some steps on other text afterwards, from each start alike
and from zero, and the perplexity is that on the test text. Held-out and calibration text are those of accuracy.py.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
import transformers
from accuracy import calibration_sequences
from peft import LoraConfig, get_peft_model
from perplexity import MODULE_LIST, default_model, held_out_sequences, perplexity
from reporting import head, row
from torch import Tensor, nn

from intscale_compile import IntScaleConfig, calibrate, lora, quantize


def quantized(original: nn.Module, base: str, data: Tensor, group_size: int) -> nn.Module:
    """A copy of the original, quantized."""
    model = copy.deepcopy(original)
    if base == "quantize":
        return quantize(model, IntScaleConfig(group_size=group_size))
    calibrate(model, data, base, progress=False)
    return model


def with_adapter(model: nn.Module, rank: int):
    """The model under a new adapter on all of its linear layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config).eval()


def tune(peft_model, sequences: Tensor, steps: int, lr: float) -> None:
    """Train an adapter on token ids ``[S, T]``, two sequences a step."""
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for step in range(steps):
        ids = sequences[torch.arange(2 * step, 2 * step + 2).remainder(len(sequences))]
        with torch.enable_grad():
            loss = peft_model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


def text_sequences(tokenizer, path: str, sequences: int, tokens: int) -> Tensor:
    """The first ids of a text file, ``[sequences, tokens]``."""
    ids = tokenizer(Path(path).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--base", nargs="+", default=["quantize", "gptq"])
    parser.add_argument("--methods", nargs="+", default=["none", "svd", "apiq-lw", "apiq"])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=24, help="held out")
    parser.add_argument("--calibration", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--text", help="file: calibration and tuning text instead of Python's standard library")
    parser.add_argument("--test-text", help="file: held-out text")
    parser.add_argument("--tune", type=int, default=0, help="steps on --tune-text, from each start")
    parser.add_argument("--tune-text", help="file")
    parser.add_argument("--tune-test", help="file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = arguments(argv)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    modules = args.model.parent / MODULE_LIST
    if args.test_text:
        held_out = text_sequences(tokenizer, args.test_text, args.sequences, args.tokens)
        data = text_sequences(tokenizer, args.text, args.calibration, args.tokens)
    else:
        held_out = held_out_sequences(tokenizer, modules, args.sequences, args.tokens)
        data = calibration_sequences(tokenizer, modules, args.calibration, args.tokens)
    other = text_sequences(tokenizer, args.tune_text, 2 * args.tune, 256) if args.tune else None
    other_test = text_sequences(tokenizer, args.tune_test, 8, args.tokens) if args.tune else None
    original = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    original.requires_grad_(False)
    tuned = [f"after {args.tune} steps on other text"] if args.tune else []
    print(head(["base", "adapter", "perplexity", *tuned, "seconds"]), flush=True)
    torch.set_grad_enabled(False)
    after = [f"{perplexity(original, other_test):.2f} (untuned)"] if args.tune else []
    print(row(["original", "–", f"{perplexity(original, held_out):.3f}", *after, ""]), flush=True)
    for base in args.base:
        model = quantized(original, base, data, args.group_size)
        for method in args.methods:
            peft_model, began = with_adapter(copy.deepcopy(model), args.rank), time.monotonic()
            if method != "none":
                lora.initialize(peft_model, original, data, method, progress=False)
            seconds = time.monotonic() - began
            cells = [base, method, f"{perplexity(peft_model, held_out):.3f}"]
            if args.tune:
                tune(peft_model, other, args.tune, 1e-3)
                cells.append(f"{perplexity(peft_model, other_test):.2f}")
            print(row([*cells, f"{seconds:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
