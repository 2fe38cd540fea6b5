"""What adapters make up for: perplexity of a quantized model with LoRA adapters that begin in different ways.

    python benchmarks/adapters.py                                    # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/adapters.py FOLDER --base quantize gptq --methods none svd apiq-lw apiq --rank 16
    python benchmarks/adapters.py --methods none apiq --tune 50 --tune-text a.txt --tune-test b.txt --tune-lr 1e-3 3e-3

``--base quantize`` rounds without data, other bases are presets of ``calibrate``. The adapter rests in bf16 or fp32 beside the
weights and is not merged. With ``--tune`` the adapters are trained for some steps on other text afterwards, from each start alike
and from zero, on ``--tune-seeds`` samples of the text and at every ``--tune-lr``; the perplexity is the mean of those on the test
text. Compare starts each at its own best learning rate. Held-out and calibration text are those of accuracy.py.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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

TUNE_TEST = 12  # sequences, spread over the test text


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


def tune(peft_model, sequences: Tensor, lr: float) -> None:
    """Train an adapter on token ids ``[S, T]``, two sequences a step."""
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for ids in sequences.split(2):
        with torch.enable_grad():
            loss = peft_model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()


def tuned_perplexities(peft_model, text: Tensor, test: Tensor, steps: int, lr: float, seeds: int) -> list[float]:
    """Perplexity on ``test`` after tuning on each of ``seeds`` samples of the sequences of ``text``; the adapter is put back."""
    start = {name: p.detach().clone() for name, p in peft_model.named_parameters() if "lora_" in name}
    found = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        tune(peft_model, text[torch.randperm(len(text), generator=generator)[: 2 * steps]], lr)
        found.append(perplexity(peft_model, test))
        for name, p in peft_model.named_parameters():
            if name in start:
                p.copy_(start[name])
    return found


def text_sequences(tokenizer, path: str, sequences: int, tokens: int) -> Tensor:
    """The first ids of a text file, ``[sequences, tokens]``; of its first 1.2 million characters all where ``sequences`` is 0."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    ids = tokenizer(text if sequences else text[:1_200_000], add_special_tokens=False, verbose=False).input_ids
    sequences = sequences or len(ids) // tokens
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
    parser.add_argument("--tune-lr", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--tune-seeds", type=int, default=1, help="samples of --tune-text")
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
    other = text_sequences(tokenizer, args.tune_text, 0, 256) if args.tune else None
    other_test = text_sequences(tokenizer, args.tune_test, 0, args.tokens) if args.tune else None
    if other_test is not None:
        other_test = other_test[torch.linspace(0, len(other_test) - 1, TUNE_TEST).long()]
    original = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    original.requires_grad_(False)
    rates = args.tune_lr if args.tune else []
    tuned = [f"after {args.tune} steps on other text, lr {lr:g}" for lr in rates]
    print(head(["base", "adapter", "perplexity", *tuned, "seconds"]), flush=True)
    torch.set_grad_enabled(False)
    after = [f"{perplexity(original, other_test):.2f} (untuned)" for _ in rates[:1]] + [""] * len(rates[1:])
    print(row(["original", "–", f"{perplexity(original, held_out):.3f}", *after, ""]), flush=True)
    for base in args.base:
        model = quantized(original, base, data, args.group_size)
        for method in args.methods:
            peft_model, began = with_adapter(copy.deepcopy(model), args.rank), time.monotonic()
            if method != "none":
                lora.initialize(peft_model, original, data, method, progress=False)
            seconds = time.monotonic() - began
            cells = [base, method, f"{perplexity(peft_model, held_out):.3f}"]
            for lr in rates:
                found = tuned_perplexities(peft_model, other, other_test, args.tune, lr, args.tune_seeds)
                each = f" ({' '.join(f'{value:.2f}' for value in found)})" if len(found) > 1 else ""
                cells.append(f"{statistics.fmean(found):.2f}{each}")
            print(row([*cells, f"{seconds:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
