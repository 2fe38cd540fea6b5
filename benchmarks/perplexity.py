"""Perplexity of a model in four forms: fp32, float group scales, and integer group scales through both doors.

    python benchmarks/perplexity.py                      # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/perplexity.py FOLDER --sequences 8

The text is the standard library modules named in ``heldout_stdlib_modules.txt`` beside the model's folder, each
tokenized with a leading id 0; the first 24 x 512 tokens are 24 sequences. Every linear layer but lm_head is quantized;
``--forms 1 3 5`` compares with ``lm_head`` in W8A8 too.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
import transformers
from reporting import head, row
from torch import Tensor, nn
from torch.nn import functional as F

GROUP_SIZE = 128
MODULE_LIST = "heldout_stdlib_modules.txt"


def default_model() -> Path:
    """tiny-llama in the folder that the tests use too."""
    checkout = Path(__file__).resolve().parent.parent
    return Path(os.environ.get("INTSCALE_MODELS", checkout.parent / "shared" / "models")) / "tiny-llama"


def held_out_sequences(tokenizer, module_list: Path, sequences: int, tokens: int) -> Tensor:
    """First ``sequences * tokens`` ids of the listed modules of the running Python, ``[sequences, tokens]``."""
    root, ids = Path(sysconfig.get_paths()["stdlib"]), []
    for name in module_list.read_text().splitlines():
        if (path := root / name).is_file():  # other Pythons lack some
            text = path.read_text(encoding="utf-8", errors="replace")
            ids += [0, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        if len(ids) >= sequences * tokens:
            return torch.tensor(ids[: sequences * tokens]).view(sequences, tokens)
    raise SystemExit(f"perplexity: {module_list} gives only {len(ids)} tokens; lower --sequences or --tokens")


def perplexity(model, sequences: Tensor) -> float:
    """exp of the mean next-token loss within each sequence."""
    losses = []
    for ids in sequences.split(1):
        logits = model(ids, use_cache=False).logits
        losses.append(F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())
    return math.exp(statistics.fmean(losses))


def round_to_float_scale(weight: Tensor) -> Tensor:
    """Fake quantize to int4 with one float scale, absmax / 7.5, for each group of ``GROUP_SIZE``."""
    padded = F.pad(weight, (0, -weight.shape[-1] % GROUP_SIZE)).unflatten(-1, (-1, GROUP_SIZE))
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7.5
    rounded = (padded / scale).round().clamp(-8, 7) * scale
    return rounded.flatten(-2)[..., : weight.shape[-1]]


def round_activation(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Forward pre-hook: fake quantize the input to int8 with one scale per token."""
    scale = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return ((inputs[0] / scale).round() * scale,)


def float_scale_model(model: nn.Module) -> nn.Module:
    """W4A8 with float group scales, fake quantized: what integer scales are to be compared with."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(round_to_float_scale(module.weight))
            module.register_forward_pre_hook(round_activation)
    return model


def quantized_model(model: nn.Module):
    """First door: torchao's ``quantize_``, then the backend."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    model = copy.deepcopy(model)
    quantize_(model, IntScaleConfig(group_size=GROUP_SIZE))
    return torch.compile(model, backend="intscale")


def with_output_embedding(model: nn.Module):
    """The first door with the output embedding in W8A8."""
    from torchao.quantization import quantize_

    from intscale_compile import IntScaleConfig

    model = copy.deepcopy(model)
    quantize_(model, IntScaleConfig(group_size=GROUP_SIZE, output_embedding="w8a8"))
    return torch.compile(model, backend="intscale")


def plain_model(model: nn.Module):
    """Second door: the backend quantizes a model that nobody quantized."""
    return torch.compile(copy.deepcopy(model), backend="intscale")


FORMS = {
    "fp32": lambda model: model,
    "float scale, absmax/7.5, fake quantized": float_scale_model,
    "integer scale, quantize_ + compile": quantized_model,
    "integer scale, compile only": plain_model,
    "integer scale, quantize_ + compile, lm_head W8A8": with_output_embedding,
}


def main(argv=None) -> None:
    """Print a Markdown table, one row per form as it is measured."""
    parser = argparse.ArgumentParser(prog="perplexity", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=default_model(), help="folder (default: tiny-llama)")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--module-list", type=Path, help=f"default: {MODULE_LIST} beside the model's folder")
    parser.add_argument(
        "--forms", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4], help="rows to measure"
    )
    args = parser.parse_args(argv)
    module_list = args.module_list or args.model.parent / MODULE_LIST
    for path in (args.model / "config.json", module_list):
        if not path.is_file():
            print(f"perplexity: no such file: {path}", file=sys.stderr)
            raise SystemExit(2)

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.eval().requires_grad_(False)
    sequences = held_out_sequences(tokenizer, module_list, args.sequences, args.tokens)

    print(f"{args.model.name}: {args.sequences} x {args.tokens} held-out tokens, group size {GROUP_SIZE}\n")
    print(head(["weights, activations", "perplexity", "seconds"]))
    with torch.no_grad():
        for name in [list(FORMS)[number - 1] for number in args.forms]:
            torch.compiler.reset()
            form = FORMS[name](model)
            start = time.perf_counter()
            value = perplexity(form, sequences)
            label = name if name == "fp32" else f"int4 {name}; int8 per token"
            print(row([label, f"{value:.3f}", f"{time.perf_counter() - start:.1f}"]), flush=True)


if __name__ == "__main__":
    main()
