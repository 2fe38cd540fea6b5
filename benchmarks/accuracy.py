"""Perplexity and logit error of a model under every calibration preset, with float and with integer group scales.

    python benchmarks/accuracy.py                                  # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/accuracy.py tiny-mixtral --presets gptq best
    python benchmarks/accuracy.py tiny-llama --outliers --rows 4
    python benchmarks/accuracy.py HUB_NAME --json result.json
    python benchmarks/accuracy.py tiny-llama --presets gptq --rows float 8 4 --seeds 4 --jitter 3
    python benchmarks/accuracy.py tiny-llama --presets gptq --rows float 128 512 1024 4096 --set group_size=64
    python benchmarks/accuracy.py tiny-llama --presets fptq-paper --rows 4 --random   # random token ids for data

Text held out: the standard library modules named in ``heldout_stdlib_modules.txt``, as in perplexity.py. Calibration text:
modules of the running Python's standard library that are not named there.

Rows of a preset: ``float`` group scales (fake quantized); ``1024`` (128, 512, 4096) and ``layer``: the codes of that run,
scales rounded as Integer Scale (arXiv 2405.14597) published it; ``8``: the codes of that run, integer scales of 8 bits row by
row; ``4``: the preset as it ships, codes rounded for integer scales of 4 bits. Logit error is the signal to noise of the
logits less their mean, in dB, and the mean Kullback-Leibler divergence of the next-token distributions from the original
model's.

``--seeds`` calibrates on several samples of text (and injects other outliers), ``--jitter`` measures each row again with row
scales changed by 1e-6, which is how much of a figure is chance; either ends with the table of paired.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import paired
import torch
import transformers
from outliers import inject_outliers
from perplexity import MODULE_LIST, default_model, held_out_sequences
from reporting import head, row
from timing import environment
from torch import Tensor, nn
from torch.nn import functional as F

from intscale_compile import CalibrationConfig, calibrate
from intscale_compile.calibration import PRESETS, random_token_ids
from intscale_compile.calibration.pipeline import make_integer
from intscale_compile.calibration.solve import FloatScaleWeight, frozen
from intscale_compile.errors import OverflowProofError
from intscale_compile.tensors.intscale_tensor import IntScaleTensor

ROWS = {
    "float": (paired.FLOAT, None),
    **{str(a): (f"integer, amplifier {a}", {"amplifier": a}) for a in (128, 512, 1024, 4096)},
    "layer": ("integer, Listing 1", {"amplifier": "layer"}),
    "8": ("integer, 8 bits", {"scale_bits": 8}),
    "4": ("integer, 4 bits", None),
}
DEFAULT_ROWS = ("float", "1024", "layer", "8", "4")
JITTER = 1e-6  # relative: a few units in the last place of fp32
BATCH = 8  # sequences
# No programs, or tables rather than programs.
NOT_CALIBRATION = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings", "pydoc_data"}


@dataclass
class Result:
    """One row; ``seconds`` is calibration alone, ``bits`` the mean bits of a quantized weight with its scales.

    ``losses`` are those of every held-out sequence, the mean of all readings; ``noise`` is the standard deviation of the
    perplexity of one reading in percent, NaN where there is only one. KL and dB are of the first reading.
    """

    preset: str
    scales: str
    perplexity: float
    kl: float = 0.0
    snr: float = math.inf
    bits: float = 32.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    noise: float = math.nan
    seed: int = 0


def calibration_sequences(tokenizer, module_list: Path, sequences: int, tokens: int, seed: int = 0) -> Tensor:
    """Random pieces of modules that are not held out, ids ``[sequences, tokens]``."""
    root, held_out = Path(sysconfig.get_paths()["stdlib"]), set(module_list.read_text().split())
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.py"))
    names = [name for name in names if name not in held_out and not NOT_CALIBRATION & set(Path(name).parts)]
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for place in torch.randperm(len(names), generator=generator).tolist():
        text = (root / names[place]).read_text(encoding="utf-8", errors="replace")
        ids += [0, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
        if len(ids) >= 8 * sequences * tokens:
            break
    pieces = torch.tensor(ids[: len(ids) // tokens * tokens]).view(-1, tokens)
    return pieces[torch.randperm(len(pieces), generator=generator)[:sequences]]


class Reference:
    """The original model's predictions on the held-out text, to measure others against.

    Args:
        model: the original; its logits stay on its device.
        sequences: token ids ``[S, T]``.
        jitter: how often a quantized model is measured again with slightly other row scales.
    """

    def __init__(self, model: nn.Module, sequences: Tensor, jitter: int = 0):
        self.batches = sequences.to(next(model.parameters()).device).split(BATCH)
        self.jitter = jitter
        self.logits = [self._logits(model, ids) for ids in self.batches]

    @staticmethod
    def _logits(model: nn.Module, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return model(ids, use_cache=False).logits.float()

    @staticmethod
    def _losses(logits: Tensor, ids: Tensor) -> list[float]:
        each = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        return each.double().mean(-1).tolist()

    def measure(self, model: nn.Module, preset: str, scales: str) -> Result:
        """Perplexity and logit error of ``model``."""
        losses, divergences, signal, noise = [], [], 0.0, 0.0
        for ids, wanted in zip(self.batches, self.logits, strict=True):
            found = self._logits(model, ids)
            losses += self._losses(found, ids)
            logp, logq = wanted.log_softmax(-1), found.log_softmax(-1)
            divergence = F.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
            divergences += divergence.double().mean(-1).tolist()
            centered = wanted - wanted.mean(-1, keepdim=True)
            difference = found - found.mean(-1, keepdim=True) - centered
            signal, noise = signal + centered.square().sum().item(), noise + difference.square().sum().item()
        snr = 10 * math.log10(signal / noise) if noise else math.inf
        readings = [losses, *self._again(model)]
        means = [statistics.fmean(reading) for reading in readings]
        losses = [statistics.fmean(column) for column in zip(*readings)]
        result = Result(preset, scales, math.exp(statistics.fmean(means)), statistics.fmean(divergences), snr)
        result.bits, result.losses = mean_bits(model), losses
        result.noise = 100 * statistics.stdev(means) if len(means) > 1 else math.nan
        return result

    def _again(self, model: nn.Module) -> Iterator[list[float]]:
        for seed in range(self.jitter):
            with jittered(model, seed) as changed:
                if not changed:  # the original: nothing is rounded
                    return
                yield [loss for ids in self.batches for loss in self._losses(self._logits(model, ids), ids)]


@contextlib.contextmanager
def jittered(model: nn.Module, seed: int, size: float = JITTER) -> Iterator[int]:
    """A quantized model with its row scales times ``1 + size * normal``, for a while; yields how many weights that were."""
    generator, kept = torch.Generator().manual_seed(seed), []
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if not isinstance(weight, (IntScaleTensor, FloatScaleWeight)):
                continue
            rows = weight.source.steps[..., :1] if isinstance(weight, FloatScaleWeight) else weight.row_scale
            factors = 1 + size * torch.randn(rows.shape, generator=generator).to(rows.device)
            kept.append((module, name, weight))
            if isinstance(weight, FloatScaleWeight):
                changed = weight.with_row_factors(factors.mT if weight.kept_transposed else factors)
            else:
                changed = weight.replaced(per_tensor_scale=rows * factors)
            setattr(module, name, frozen(changed))
    try:
        yield len(kept)
    finally:
        for module, name, weight in kept:
            setattr(module, name, weight)


def mean_bits(model: nn.Module) -> float:
    """Bits that a quantized weight takes with its scales; 32 where none is quantized with integer scales."""
    weights = [p for p in model.parameters() if hasattr(p, "nbytes_packed")]
    if not weights:
        return 32.0
    return 8 * sum(p.nbytes_packed() for p in weights) / sum(p.numel() for p in weights)


def results(model: nn.Module, data: Tensor, reference: Reference, presets, rows, changes: dict) -> Iterator[Result]:
    """Calibrate and measure, row by row."""
    original = reference.measure(model, "", "")
    yield Result("original", "", original.perplexity, losses=original.losses)
    for preset in presets:
        if chosen := [row for row in rows if row != "4"]:
            calibrated = copy.deepcopy(model)
            start = time.perf_counter()
            calibrate(
                calibrated,
                data,
                CalibrationConfig.from_preset(preset, **changes, scales="float"),
                progress=sys.stderr.isatty(),
            )
            seconds = time.perf_counter() - start
            for row in chosen:
                yield from _converted(calibrated, preset, row, reference, seconds)
        if "4" in rows:
            calibrated = copy.deepcopy(model)
            start = time.perf_counter()
            calibrate(calibrated, data, CalibrationConfig.from_preset(preset, **changes), progress=sys.stderr.isatty())
            seconds = time.perf_counter() - start
            result = reference.measure(calibrated, preset, ROWS["4"][0])
            result.seconds = seconds
            yield result


def _converted(calibrated: nn.Module, preset: str, row: str, reference: Reference, seconds: float) -> Iterator[Result]:
    label, changes = ROWS[row]
    try:
        model = calibrated if changes is None else make_integer(copy.deepcopy(calibrated), **changes)
    except OverflowProofError as error:
        print(f"accuracy: {preset}, {label}: {error}", file=sys.stderr)
        return
    result = reference.measure(model, preset, label)
    result.seconds = seconds
    yield result


def load_model(name: str, device: str):
    """Tokenizer and fp32 model: a folder, the name of one of the small models, or a hub name."""
    beside = default_model().parent / name
    source = beside if (beside / "config.json").is_file() else name
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    return tokenizer, model.to(device).eval().requires_grad_(False)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-llama", help="small model, folder or hub name")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS, metavar="PRESET")
    parser.add_argument(
        "--rows", nargs="+", default=list(DEFAULT_ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--outliers", action="store_true", help="first put outlier channels into the model")
    parser.add_argument("--sequences", type=int, default=24, help="held-out sequences")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--random", action="store_true", help="calibrate on random token ids")
    parser.add_argument("--calibration", type=int, default=128, help="calibration sequences")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration text, and of outliers")
    parser.add_argument("--seeds", type=int, default=1, help="how many samples of calibration text, from --seed on")
    parser.add_argument("--jitter", type=int, default=0, help="further readings of a row, row scales changed by 1e-6")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of every configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--module-list", type=Path, default=default_model().parent / MODULE_LIST)
    parser.add_argument("--json", type=Path, help="file for the results")
    return parser.parse_args(argv)


def _fields(pairs: list[str]) -> dict:
    """``FIELD=VALUE`` with values in JSON, or words."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, one row as it is measured."""
    args = arguments(argv)
    if not args.module_list.is_file():
        print(f"accuracy: no such file: {args.module_list}", file=sys.stderr)
        raise SystemExit(2)
    tokenizer, model = load_model(args.model, args.device)
    held_out = held_out_sequences(tokenizer, args.module_list, args.sequences, args.tokens)
    title = f"{Path(args.model).name}{' with outliers' if args.outliers else ''}"
    print(
        f"{title}: {args.sequences} x {args.tokens} held-out tokens, {args.calibration} x {args.tokens} for calibration"
    )
    settings = {name: str(value) for name, value in vars(args).items()}
    facts, kept = {"model": title, **environment(), "arguments": settings}, []
    for seed in range(args.seed, args.seed + args.seeds):
        data = calibration_sequences(tokenizer, args.module_list, args.calibration, args.tokens, seed)
        if args.random:
            data = random_token_ids(model, args.calibration, args.tokens, seed)
        one = copy.deepcopy(model)
        if args.outliers:
            inject_outliers(one, seed=seed)
        reference = Reference(one, held_out, args.jitter)
        print(f"\nCalibration text {seed}:" if args.seeds > 1 else "")
        print(head(["preset", "group scales", "perplexity", "KL", "logits, dB", "bits", "seconds"]))
        for result in results(one, data, reference, args.presets, args.rows, _fields(args.set)):
            result.seed = seed
            kept.append(asdict(result))
            print(_line(result), flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps({**facts, "rows": kept}, indent=1))
    if args.seeds > 1 or args.jitter:
        print("\n" + paired.table([{"model": title, **row} for row in kept]))


def _line(result: Result) -> str:
    error = (f"{result.kl:.4f}", f"{result.snr:.2f}", f"{result.bits:.2f}") if result.scales else ("", "", "")
    return row([result.preset, result.scales, f"{result.perplexity:.3f}", *error, f"{result.seconds:.0f}"])


if __name__ == "__main__":
    main()
