"""Over a hundred kinds of transformers' models, small and random: the doors agree, every parameter has a right row, and the
compiled model is as near to the eager quantized one as the model's own rounding noise lets it be.

``python -m tests.test_zoo NAME ...`` prints a line for each model, of all of them where no name is given.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import intscale_compile
from intscale_compile import IntScaleConfig, IntScaleTensor, linears_and_experts
from intscale_compile.reasons import Reason

hf = pytest.importorskip("transformers")
from tests.support.zoo import KNOWN, ZOO, build, inputs_of  # noqa: E402

pytestmark = pytest.mark.slow

LEAST_DB = 50.0
JITTER = 1e-7
JITTERS = 8
QUICK_CPP = {"cpp.simdlen": 1}  # vectorized C++ takes a compiler twice as long


class Result(NamedTuple):
    """What was found about one model."""

    quantized: int
    rows: int
    graphs: int
    compiled_db: float
    noise_db: float

    def __str__(self) -> str:
        return (
            f"{self.quantized} of {self.rows} parameters quantized, {self.graphs} graph(s), compiled to eager "
            f"{self.compiled_db:.0f} dB, the model's own noise {self.noise_db:.0f} dB"
        )


def tensors(result: Any) -> list[torch.Tensor]:
    """Floating-point tensors of an output."""
    values = result.values() if hasattr(result, "values") else result if isinstance(result, (tuple, list)) else [result]
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]


def decibels(results: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    """Signal-to-noise ratio of the output that has the least."""
    ratios = []
    for value, reference in zip(results, references, strict=True):
        noise = (value.double() - reference.double()).square().sum()
        signal = reference.double().square().sum()
        ratios.append(math.inf if noise == 0 else float(10 * torch.log10(signal / noise)))
    return min(ratios)


def explained(model: nn.Module, inputs: dict) -> tuple[Any, list[torch.Tensor]]:
    """``explain``, and the output of the rewritten graphs that it ran."""
    kept: list = []
    hook = model.register_forward_hook(lambda module, args, result: kept.append(tensors(result)))
    try:
        torch._dynamo.reset()
        return intscale_compile.explain(model, **inputs), kept[-1]
    finally:
        hook.remove()


def noise_floor(model: nn.Module, inputs: dict, reference: list[torch.Tensor]) -> float:
    """How much the output changes at most when what each of the innermost modules returns changes by its last bits.

    Where an activation lies between two codes, or a router between two experts, one choice of last bits turns it over and
    another does not: the least of several.
    """
    generator = torch.Generator()

    def jittered(module, args, result):
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            return result * (1 + JITTER * torch.randn(result.shape, generator=generator))
        return result

    hooks = [m.register_forward_hook(jittered) for m in model.modules() if not list(m.children())]
    try:
        return min(
            decibels(tensors(model(**inputs)), reference) for seed in range(JITTERS) if generator.manual_seed(seed)
        )
    finally:
        for hook in hooks:
            hook.remove()


def check_rows(report: Any, model: nn.Module) -> int:
    """Every parameter of two or more dimensions has one row, with a reason that fits it; returns how many there are."""
    rows = Counter(row.name for row in report.layers)
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() > 1:
            names.setdefault(id(parameter), set()).add(name)
    wrong = {min(same): sum(rows[name] for name in same) for same in names.values() if sum(rows[n] for n in same) != 1}
    assert wrong == {}, "parameters without one row"
    kinds = {
        f"{name}.{leaf}": type(module)
        for name, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    for row in report.layers:
        kind = kinds.get(row.name, nn.Module)
        assert row.quantized or row.reason in Reason.__members__, row
        if row.reason == Reason.EMBEDDING.name:
            assert not issubclass(kind, (nn.Linear, nn.modules.conv._ConvNd)), row
        if row.reason in (Reason.EXPERTS.name, Reason.ROUTER.name):
            assert issubclass(kind, nn.Module) and row.shape is not None and not issubclass(kind, nn.Bilinear), row
        assert row.reason != Reason.CONVOLUTION.name or not issubclass(kind, nn.Linear), row
    return len(names)


def examine(name: str) -> Result:
    """All checks of one model.

    Raises:
        AssertionError: one does not hold.
    """
    torch.manual_seed(0)
    model = build(name)
    inputs = inputs_of(model)
    with torch.no_grad():
        model(**inputs)  # RWKV rescales its weights in its first call
    quantized = copy.deepcopy(model)
    quantize_(quantized, IntScaleConfig(), filter_fn=linears_and_experts)
    with torch.no_grad():
        eager = tensors(quantized(**inputs))
        noise = noise_floor(quantized, inputs, eager)
    plain, results = explained(model, inputs)
    packed, again = explained(quantized, inputs)
    rows = check_rows(plain, model)
    check_rows(packed, quantized)
    chosen = {name for name, p in quantized.named_parameters() if isinstance(p, IntScaleTensor)}
    by_compiler = {row.name for row in plain.layers if row.quantized}
    reached = {row.name for row in packed.layers if row.graph is not None}
    assert by_compiler - chosen == set(), "quantized by the compiler, but not by quantize_"
    assert (chosen & reached) - by_compiler == set(), "quantized by quantize_, but not by the compiler"
    if chosen <= reached:
        assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "the doors give different bits"
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = tensors(torch.compile(quantized, backend="intscale", options=QUICK_CPP)(**inputs))
    reached_db = decibels(compiled, eager)
    assert reached_db >= min(LEAST_DB, noise), f"{reached_db:.1f} dB, the model's own noise {noise:.1f} dB"
    return Result(len(chosen), rows, packed.graphs, reached_db, noise)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=KNOWN[name], strict=True)] if name in KNOWN else [])
        for name in ZOO
    ],
)
def test_model(name):
    print(name, examine(name))


def test_there_are_a_hundred():
    assert len(ZOO) >= 100 and len(set(ZOO)) == len(ZOO) and set(KNOWN) <= set(ZOO)


def main(names: list[str]) -> None:
    """Print a line for each model; names given on the command line, or all."""
    torch.set_num_threads(1)
    for name in names or ZOO:
        try:
            print(f"{name:28} {examine(name)}", flush=True)
        except Exception as error:
            first = str(error).strip().partition("\n")[0][:160]
            print(f"{name:28} FAILED {type(error).__name__}: {first}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
