"""What messages of 2 and 3 bits with spike reserving (Flash Communication V2, arXiv 2508.03760) would do, in one process.

    python benchmarks/two_bit_messages.py                    # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/two_bit_messages.py --formats 4 2s/32  # bits, s: with spikes, /group size

Error: norm of an all-reduce's difference to the exact sum over the norm of that sum, normal random data; with outliers one
element in 1000 is fifty times as large, and the error is that of the others. Perplexity: of the fp32 model, whose ``o_proj`` and
``down_proj`` are divided among two ranks and summed by such an all-reduce, held-out text of perplexity.py. The quantizer is that
of ``intscale_compile.communication.reference``, both legs, the own part not quantized, as the wire formats have it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from perplexity import MODULE_LIST, default_model, held_out_sequences, perplexity
from reporting import head, row
from timing import environment
from torch import Tensor, nn
from torch.nn import functional as F

from intscale_compile.communication.reference import quantize_groups

OUTLIERS, OUTLIER_SIZE = 1000, 50  # one element in so many, and how much larger
FORMATS = ["4", "4s", "3", "3s", "3s/32", "2", "2s", "2s/32"]


@dataclass(frozen=True)
class Message:
    """Bits of a code, whether each group's smallest and largest element travel in bf16, and elements of a group."""

    bits: int
    spikes: bool
    group: int

    @classmethod
    def parse(cls, text: str) -> Message:
        """``2s/32``: 2 bits, spikes, groups of 32 (128 where none is said).

        Raises:
            argparse.ArgumentTypeError: another text.
        """
        match = re.fullmatch(r"([2-8])(s?)(?:/(32|64|128))?", text)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no format: write bits, s for spikes, /32 for groups, as 2s/32"
            )
        return cls(int(match[1]), bool(match[2]), int(match[3] or 128))

    @property
    def bits_sent(self) -> float:
        """Bits of one element with its share of the group's scale, minimum, spikes and their positions."""
        return self.bits + (32 + 48 * self.spikes) / self.group

    def received(self, x: Tensor) -> Tensor:
        """What arrives of ``x``, fp32 of any shape."""
        groups = F.pad(x.flatten(), (0, -x.numel() % self.group)).view(-1, self.group)
        valid = (torch.arange(groups.numel()) < x.numel()).view_as(groups)
        codes, scale, minimum, spikes, places = quantize_groups(groups, valid, self.bits, self.spikes)
        values = minimum.float()[:, None] + codes * scale.float()[:, None]
        if self.spikes:
            for k in range(2):
                values.scatter_(1, places[:, k : k + 1].long(), spikes[:, k : k + 1].float())
        return values.flatten()[: x.numel()].view_as(x)

    def all_reduce(self, parts: list[Tensor]) -> Tensor:
        """The sum of what all ranks have, through both legs."""
        flat = torch.stack([part.flatten().float() for part in parts])
        size = -(-flat.shape[1] // len(parts) // self.group) * self.group
        sums = []
        for rank, piece in enumerate(flat.split(size, 1)):
            others = [self.received(part) for other, part in enumerate(piece) if other != rank]
            sums.append(self.received(piece[rank] + torch.stack(others).sum(0)))
        return torch.cat(sums).view_as(parts[0]).to(parts[0].dtype)


def error(message: Message, ranks: int, outliers: bool) -> float:
    """Relative error of an all-reduce of random data."""
    torch.manual_seed(0)
    parts = [torch.randn(1 << 18).bfloat16() for _ in range(ranks)]
    large = torch.rand(1 << 18) < 1 / OUTLIERS if outliers else torch.zeros(1 << 18, dtype=torch.bool)
    parts = [torch.where(large, OUTLIER_SIZE * part, part) for part in parts]
    exact = torch.stack([part.double() for part in parts]).sum(0)
    found = message.all_reduce([part.float() for part in parts]).double()
    return float(((found - exact)[~large].norm() / exact[~large].norm()).item())


class Divided(nn.Module):
    """A linear layer without bias whose input features are divided among two ranks."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.message = linear.weight, None

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both halves, as the message format passes it on."""
        half = self.weight.shape[1] // 2
        parts = [F.linear(x[..., :half], self.weight[:, :half]), F.linear(x[..., half:], self.weight[:, half:])]
        return parts[0] + parts[1] if self.message is None else self.message.all_reduce(parts)


def divide(model: nn.Module) -> list[Divided]:
    """Put ``Divided`` layers in the place of those whose output tensor parallelism sums."""
    found = []
    for module in list(model.modules()):
        for name in ("o_proj", "down_proj"):
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, Divided(getattr(module, name)))
                found.append(getattr(module, name))
    return found


def main(argv: list[str] | None = None) -> None:
    """Print a table, one line for each format."""
    parser = argparse.ArgumentParser(prog="two_bit_messages", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--formats", nargs="+", type=Message.parse, default=[Message.parse(f) for f in FORMATS])
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        print(f"two_bit_messages: no model in {args.model}", file=sys.stderr)
        raise SystemExit(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sequences = held_out_sequences(tokenizer, args.model.parent / MODULE_LIST, args.sequences, args.tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers, rows = divide(model.requires_grad_(False)), []
    plain = perplexity(model, sequences)
    print(f"perplexity with exact sums: {plain:.3f}\n")
    print(
        head(
            ["bits", "spikes", "group", "bits sent", "error, 2 ranks", "8 ranks", "2, outliers", "perplexity", "change"]
        )
    )
    for message in args.formats:
        errors = [error(message, ranks, outliers) for ranks, outliers in ((2, False), (8, False), (2, True))]
        for layer in layers:
            layer.message = message
        value = perplexity(model, sequences)
        rows.append({**vars(message), "errors": errors, "perplexity": value})
        first = [str(message.bits), "yes" if message.spikes else "", str(message.group), f"{message.bits_sent:.2f}"]
        last = [f"{value:.3f}", f"{value / plain - 1:+.2%}"]
        print(row([*first, *(f"{e:.2%}" for e in errors), *last]), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"model": args.model.name, **environment(), "plain": plain, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
