"""``prove``: that a model is integers between ids and results, in three parts that each can fail.

1. Types: after AOTAutograd and all decompositions, every node is an integer or a truth value, but the last conversion.
2. Bounds: every intermediate value fits its type, whatever the ids (:mod:`.bounds`).
3. Code: the generated C++ and Triton kernels name no floating point type or function, but those that hold the last conversion.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..compile.binding import bind, rewrite_graph
from ..compile.inductor_settings import code_generation, inductor_defaults
from ..compile.options import parse_options
from ..errors import IntegerOnlyError
from ..ops import register_inductor
from .bounds import Bound, bounds_of

OPTIONS = {"intscale.integer_only": True}
_KERNEL = re.compile(r"(?:r'''|''')\n(.*?)'''", re.DOTALL)
_FLOAT = re.compile(r"\b(float|double|half|bfloat16|fp16|fp32|fp64|bf16|float16|float32|float64|libdevice|tl_math|"
                    r"std::(?:exp|exp2|log|sqrt|rsqrt|pow|tanh|round|floor|ceil|erf))\b")  # fmt: skip
_TRUTH = re.compile(r"VecMask<float, ?\d+>")  # Inductor's type for vectors of truth values
_COMMENT = re.compile(r"^\s*(?:#|//).*$", re.MULTILINE)
_LAST = str(2.0**-16)  # the factor of the last conversion


@dataclass(frozen=True)
class IntegerProof:
    """What :func:`prove` found; ``print`` it.

    Attributes:
        ops: how often the graph calls each op.
        bounds: of the intermediate values of each.
        kernels: number of generated kernels that were read.
        float_nodes: nodes of the decomposed graph with a floating point value, but the last conversion; empty in a proof.
        float_kernels: lines of generated kernels with floating point, but the last conversion's; empty in a proof.
    """

    ops: dict[str, int]
    bounds: tuple[Bound, ...]
    kernels: int
    float_nodes: tuple[str, ...] = ()
    float_kernels: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{sum(self.ops.values())} ops between ids and results, {self.kernels} generated kernels"
        lines = [f"{head}; no floating point but the last conversion" if self.holds else f"{head}; NOT integer-only"]
        lines += [f"  floating point node: {text}" for text in self.float_nodes]
        lines += [f"  floating point code: {text}" for text in self.float_kernels]
        lines.append(f"{'op':<26}{'calls':>6}  {'largest value':<44}{'bits':>6} of")
        for bound in self.bounds:
            flag = "" if bound.holds else "  OVERFLOWS"
            calls = self.ops.get(bound.op, 0)
            lines.append(f"{bound.op:<26}{calls:>6}  {bound.value:<44}{bound.bits:>6.1f} {bound.limit}{flag}")
        return "\n".join(lines)

    @property
    def holds(self) -> bool:
        """Whether all three parts hold."""
        return not self.float_nodes and not self.float_kernels and all(bound.holds for bound in self.bounds)


def prove(model: Callable, *args: Any, **kwargs: Any) -> IntegerProof:
    """Compile ``model`` for these inputs and prove that it is integer-only.

    Raises:
        IntegerOnlyError: one of the three parts does not hold; the message is the table.
    """
    # Slow to import.
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import run_and_get_code

    found: list[tuple[dict[str, int], tuple[Bound, ...], list[str]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable:
        settings, _ = parse_options(None, OPTIONS)
        register_inductor()
        rewrite = rewrite_graph(gm, example_inputs, settings)
        ops, bounds = count_ops(rewrite.graph), bounds_of(rewrite.graph)
        floats: list[str] = []
        patches = {
            **inductor_defaults(example_inputs, None),
            "force_disable_caches": True,
            "post_grad_custom_post_pass": lambda graph: floats.extend(float_nodes(graph)),
        }
        with code_generation():
            compiled = bind(rewrite, lambda graph, inputs: compile_fx(graph, inputs, config_patches=patches))  # type: ignore[arg-type, return-value]
        found.append((ops, bounds, floats))
        return compiled

    torch._dynamo.reset()
    with torch.no_grad():
        _, modules = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), *args, **kwargs)
    torch._dynamo.reset()
    ((ops, bounds, floats),) = found
    sources = kernels_of(modules)
    lines = [line for source in sources for line in float_lines(source)]
    proof = IntegerProof(ops, bounds, len(sources), tuple(floats), tuple(lines))
    if not proof.kernels:
        raise IntegerOnlyError("no generated kernel was found to read: the proof of the code is missing.")
    if not proof.holds:
        raise IntegerOnlyError(str(proof), proof.float_nodes)
    return proof


def count_ops(graph: fx.Graph) -> dict[str, int]:
    """How often each of our ops is called."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "intscale":
            name = node.target._schema.name.partition("::")[2]
            counts[name] = counts.get(name, 0) + 1
    return counts


def _is_float(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_is_float, value))
    return isinstance(value, Tensor) and value.dtype.is_floating_point


def float_nodes(graph: fx.Graph) -> list[str]:
    """Nodes of a decomposed graph with a floating point value, but those of the last conversion."""
    last = _last_conversion(graph)
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    return [f"{node.name}: {node.target}" for node in calls if _is_float(node.meta.get("val")) and node not in last]


def _last_conversion(graph: fx.Graph) -> set[fx.Node]:
    """``convert(int * 2**-16)`` in front of each result: conversions and one product whose only reader is the next of them."""
    last: set[fx.Node] = set()
    for output in (node for node in graph.nodes if node.op == "output"):
        for node in output.all_input_nodes:
            chain: list[fx.Node] = []
            while _is_float(node.meta.get("val")) and (chain == [] or list(node.users) == [chain[-1]]):
                name = getattr(node.target, "_schema", None)
                kind = name.name.rpartition("::")[2] if name is not None else ""
                factor = kind == "mul" and node.args[1] == 2.0**-16
                if not factor and kind not in ("_to_copy", "convert_element_type", "view", "reshape"):
                    break
                chain.append(node)
                node = node.args[0]  # type: ignore[assignment]
            if not _is_float(node.meta.get("val")) and sum(n.target is torch.ops.aten.mul.Tensor for n in chain) == 1:
                last.update(chain)
    return last


def kernels_of(modules: Sequence[str]) -> list[str]:
    """Sources of the generated kernels in the texts of Inductor's modules."""
    return [kernel for text in modules for kernel in _KERNEL.findall(text)]


def float_lines(kernel: str) -> list[str]:
    """Lines of a kernel with floating point; none where it holds the last conversion and no other floating point."""
    text = _COMMENT.sub("", _TRUTH.sub("", kernel))
    lines = [line.strip() for line in text.splitlines() if _FLOAT.search(line)]
    if not lines or _is_last_conversion(text, lines):
        return []
    return lines


def _is_last_conversion(text: str, lines: list[str]) -> bool:
    """Whether the lines are arguments, conversions of an integer, and one factor of 2**-16."""
    arguments = [
        line
        for line in lines
        if re.search(r"\bfloat\s*\*|\*fp32|bfloat16\s*\*|\*bf16|half\s*\*|\*fp16|triton_meta", line)
    ]
    others = [line for line in lines if line not in arguments]
    conversion = re.compile(
        r"convert<|static_cast<|Vectorized<float>|\.to\(tl\.(?:float32|bfloat16|float16)\)|tl\.full|tl\.store|\.store\("
    )
    others_float = re.compile(r"std::|libdevice|tl_math|double|fp64|float64")
    integers = [
        line for line in others if re.search(r"convert<float>|static_cast<float>\(tmp|\.to\(tl\.float32\)", line)
    ]
    once = len(integers) <= 2 * max(1, len(arguments))  # in the loop over vectors, and over what is left of them
    kinds = all(conversion.search(line) and not others_float.search(line) for line in others)
    return _LAST in text and bool(others) and once and kinds
