"""One training step of a LoRA adapter: time and memory over bf16 weights, over ours, and over NF4 where bitsandbytes is there.

    python benchmarks/lora_step.py                      # two layers of Llama-3-8B's shapes, rank 16, 1024 tokens, on a GPU
    python benchmarks/lora_step.py --layers 4 --tokens 2048 --forms bf16 intscale
    python benchmarks/lora_step.py --shape tiny --device cpu --rounds 2

A step is forward, backward and AdamW. Each form eager and compiled: bf16 and NF4 by Inductor, ours by the backend ``intscale``.
Memory is the peak of a step less what was allocated before the model. The embedding and the output
embedding are small (1024 tokens), so the figures are those of the layers.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import transformers
from peft import LoraConfig, get_peft_model
from reporting import head, machine, row
from timing import environment
from torch import nn

from intscale_compile import IntScaleConfig, quantize

SHAPES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
}
VOCABULARY = 1024


@dataclass
class Form:
    """One row: what is measured, and what came out."""

    name: str
    compiled: bool
    step: Callable[[], float]
    weights: int
    peak: int = 0
    seconds: list[float] = field(default_factory=list)


def base_model(shape: str, layers: int, device: str) -> nn.Module:
    """A random Llama in bf16."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, tie_word_embeddings=False, use_cache=False, **SHAPES[shape]
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return model.requires_grad_(False)


def as_nf4(model: nn.Module) -> nn.Module:
    """Every linear layer but the output embedding in bitsandbytes' NF4."""
    import bitsandbytes as bnb  # a peer, installed by hand

    for module in list(model.model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                new = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, new.to(child.weight.device))
    return model


def forms(args: argparse.Namespace) -> Iterator[Form]:
    """Every form that can be built here, ready to step."""
    ids = torch.randint(0, VOCABULARY, (1, args.tokens), device=args.device)
    for name in args.forms:
        if name == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            print("nf4: bitsandbytes is not installed", flush=True)
            continue
        for compiled in (False, True):
            model = base_model(args.shape, args.layers, args.device)
            if name == "intscale":
                quantize(model, IntScaleConfig(scale_search="absmax"))
            elif name == "nf4":
                as_nf4(model)
            weights = sum(weight_bytes(p) for p in model.model.layers.parameters())
            lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, lora).train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            backend = "intscale" if name == "intscale" else "inductor"
            run = torch.compile(model, backend=backend) if compiled else model
            yield Form(name, compiled, _step(run, optimizer, ids), weights)


def weight_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a weight with its scales."""
    packed = getattr(parameter, "nbytes_packed", None)
    return packed() if packed is not None else parameter.nbytes


def _step(run: Callable, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Callable[[], float]:
    def step() -> float:
        optimizer.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def measure(form: Form, rounds: int, cuda: bool) -> None:
    """Time some steps, and the peak of the first of them."""
    before = time.monotonic()
    form.step()
    print(
        f"{form.name}{' compiled' if form.compiled else ''}: first step {time.monotonic() - before:.1f} s", flush=True
    )
    form.step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        start = time.perf_counter()
        form.step()
        if cuda:
            torch.cuda.synchronize()
        form.seconds.append(time.perf_counter() - start)
    form.peak = torch.cuda.max_memory_allocated() if cuda else 0


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forms", nargs="+", default=["bf16", "intscale", "nf4"], choices=["bf16", "intscale", "nf4"])
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    print(
        f"{args.shape}, {args.layers} layers, rank {args.rank}, {args.tokens} tokens; {machine(environment(), 'device')}\n"
    )
    measured = []
    before = torch.cuda.memory_allocated() if cuda else 0
    for form in forms(args):
        measure(form, args.rounds, cuda)
        form.peak -= before
        form.step = None  # frees the model
        measured.append(form)
        gc.collect()
        torch._dynamo.reset()
    print("\n" + head(["weights", "", "ms a step", "± of a step", "weights MB", "peak MB"]))
    for form in measured:
        spread = statistics.stdev(form.seconds) if len(form.seconds) > 1 else 0.0
        cells = [form.name, "compiled" if form.compiled else "eager", f"{1e3 * statistics.median(form.seconds):.2f}"]
        print(
            row([*cells, f"{1e3 * spread:.2f}", f"{form.weights / 1e6:.0f}", f"{form.peak / 1e6:.0f}" if cuda else "–"])
        )


if __name__ == "__main__":
    main()
