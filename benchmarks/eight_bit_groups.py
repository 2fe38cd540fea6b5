"""Would 8-bit weights in groups (the W8A8 of Integer Scale's LLaMA-3 recipe, arXiv 2405.14597) gain anything over per channel?

    python benchmarks/eight_bit_groups.py                     # tiny-llama in $INTSCALE_MODELS, or ../shared/models
    python benchmarks/eight_bit_groups.py FOLDER --text FILE

Three tables. Accuracy: perplexity and divergence from the original, weights of all linears of the blocks (or of those that
``--only`` names) rounded to 8 bits per channel, and in groups with float scales and with integer ones of 4 bits, activations
exact and in int8 per token. Proof: the largest share of 2**31 that a row's accumulator can reach, with these integer scales,
over the model's weights and over random ones of larger sizes. Time: the CPU's product per channel, in groups (a multiplication
and an addition for each group), and of codes times scales, of up to 12 bits, as two int8 products.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import Reference, load_model
from kv_cache import pieces
from perplexity import MODULE_LIST, default_model, held_out_sequences
from reporting import head, row
from torch import Tensor, nn
from torch.nn import functional as F

from intscale_compile import format as fmt
from intscale_compile.calibration.solve import fake_quantize
from intscale_compile.kernels.cpu_gemm import accumulate_cpu

LARGEST_SCALE = 15
FORMS = {"per channel": (None, False), "groups of 128, float": (128, False), "groups of 128, integer": (128, True)}


def rounded(weight: Tensor, group: int | None, integer: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 ``[N, Kp]``, group scales ``[N, G]`` and row scales ``[N, 1]``; integer scales are rounded up, from 1 to 15."""
    padded = F.pad(weight.float(), (0, 0 if group is None else -weight.shape[1] % group))
    groups = padded.unflatten(1, (-1, group or padded.shape[1]))
    steps = groups.abs().amax(-1).clamp(min=1e-12) / 127
    row_scale = steps.amax(1, keepdim=True) / (LARGEST_SCALE if integer else 1)
    scale = (steps / row_scale - 1e-4).ceil().clamp(1, LARGEST_SCALE) if integer else steps / row_scale
    codes = (groups / (scale * row_scale).unsqueeze(-1)).round().clamp(-127, 127)
    return codes.flatten(1).to(torch.int8), scale, row_scale


class Rounded(nn.Module):
    """A linear layer with an 8-bit weight, dequantized; its input in int8 per token, or as it is."""

    def __init__(self, linear: nn.Linear, group: int | None, integer: bool, activations: bool):
        super().__init__()
        codes, scale, row_scale = rounded(linear.weight, group, integer)
        wide = fmt.expand_group_scale(scale * row_scale, codes.shape[1])
        self.weight, self.bias = (codes * wide)[:, : linear.in_features], linear.bias
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        return F.linear(fake_quantize(x) if self.activations else x, self.weight, self.bias)


def linears(model: nn.Module, only: str) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Owner, name and layer of the linears of the blocks whose name holds ``only``."""
    found = []
    for path, module in model.named_modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and "layers." in path and only in name:
                found.append((module, name, child))
    return found


def accuracy(model: nn.Module, held_out: Tensor, only: str) -> None:
    """Print perplexity and divergence of each form."""
    reference = Reference(model, held_out)
    original = reference.measure(model, "", "")
    print(head(["weights", "activations", "perplexity", "change", "KL, 1e-5 nats"]))
    for activations in (False, True):
        for name, (group, integer) in {"as they are": (None, None), **FORMS}.items():
            changed = copy.deepcopy(model)
            for owner, child, linear in linears(changed, only):
                if integer is not None:
                    setattr(owner, child, Rounded(linear, group, integer, activations))
                elif activations:
                    linear.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0]),))
            found = reference.measure(changed, "", name)
            differences = [a - b for a, b in zip(found.losses, original.losses)]
            error = 100 * statistics.stdev(differences) / math.sqrt(len(differences))
            change = f"{100 * math.expm1(statistics.fmean(differences)):+.3f} ± {error:.3f} %"
            what = "int8" if activations else "exact"
            print(row([name, what, f"{found.perplexity:.3f}", change, f"{1e5 * found.kl:.1f}"]), flush=True)


def proof(model: nn.Module, only: str) -> None:
    """Print the largest share of 2**31 that the accumulator of a row can reach."""

    def share(weights: list[Tensor]) -> str:
        bounds = []
        for weight in weights:
            codes, scale, _ = rounded(weight, 128, True)
            bounds.append(int(fmt.accumulator_bound(codes, scale.to(torch.int32)).max()))
        return f"{max(bounds) / 2**31:.1%}"

    print(f"\n{head(['weights', 'largest share of 2**31'])}")
    print(row(["of the model", share([linear.weight for _, _, linear in linears(model, only)])]))
    generator = torch.Generator().manual_seed(0)
    for columns in (4096, 14336, 28672):
        normal = torch.randn(512, columns, generator=generator)
        heavy = normal / torch.randn(5, 512, columns, generator=generator).square().mean(0).sqrt()  # Student's t, 5
        print(row([f"normal, K = {columns}", share([normal])]))
        print(row([f"Student's t with 5 degrees, K = {columns}", share([heavy])]))
        print(row([f"worst case, K = {columns}", f"{127 * 127 * LARGEST_SCALE * columns / 2**31:.1%}"]))


def milliseconds(functions: list[Callable], rounds: int = 9) -> list[float]:
    """Median times, taken in turns."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken[1:]) for taken in times]


def speed(size: int) -> None:
    """Print times of a square product."""
    codes, scale, _ = rounded(torch.randn(size, size), 128, True)
    scale, one = scale.to(torch.uint8), torch.ones(size, 1, dtype=torch.uint8)
    exact = codes.to(torch.int16) * fmt.expand_group_scale(scale, size)
    low = ((exact + 64) % 128 - 64).to(torch.int8)
    high = ((exact - low) // 128).to(torch.int8)
    print(f"\n{head([f'{size} x {size}, tokens', 'per channel, ms', 'in groups', 'two products', 'ratios'])}")
    for tokens in (1, 16, 256):
        x = torch.randint(-127, 128, (tokens, size), dtype=torch.int8)

        def product(weight: Tensor, scales: Tensor, group: int, x: Tensor = x) -> Tensor:
            return accumulate_cpu(x, weight, scales, size, group, 4, "plain")

        def two(x: Tensor = x) -> Tensor:
            return torch.add(product(low, one, -1, x), product(high, one, -1, x), alpha=128)

        assert torch.equal(product(codes, scale, 128), two())
        times = milliseconds([lambda: product(codes, one, -1), lambda: product(codes, scale, 128), two])
        print(
            row([tokens, *(f"{t:.2f}" for t in times), ", ".join(f"{t / times[0]:.2f}" for t in times[1:])]), flush=True
        )


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="eight_bit_groups", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tiny-llama")
    parser.add_argument("--text", type=Path, help="held-out text")
    parser.add_argument("--only", default="", help="part of the names of the layers, such as down_proj")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--size", type=int, default=4096, help="of the product that is timed")
    args = parser.parse_args(argv)
    tokenizer, model = load_model(args.model, "cpu")
    if args.text is None:
        held_out = held_out_sequences(tokenizer, default_model().parent / MODULE_LIST, args.sequences, args.tokens)
    else:
        held_out = pieces(tokenizer, args.text, args.sequences, args.tokens)
    accuracy(model, held_out, args.only)
    proof(model, args.only)
    speed(args.size)


if __name__ == "__main__":
    main()
