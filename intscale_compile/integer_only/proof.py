"""``prove``: that a model is integers between ids and results, in three parts that each can fail.

1. Types: after AOTAutograd and all decompositions, every node is an integer or a truth value, but the last conversion.
2. Bounds: every intermediate value fits its type, whatever the ids (:mod:`..passes.integer.bounds`).
3. Code: the generated C++ names no floating point type or function, and no operation in the TTIR of the generated Triton kernels
   has one, but those of the last conversion (:mod:`.generated`).
"""

from __future__ import annotations

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
from ..passes.integer.bounds import Bound, bounds_of, count_ops, table
from .generated import float_code, kernels_of

OPTIONS = {"intscale.integer_only": True}


@dataclass(frozen=True)
class IntegerProof:
    """What :func:`prove` found; ``print`` it.

    Attributes:
        ops: how often the graph calls each op.
        bounds: of the intermediate values of each.
        kernels: number of generated kernels that were read.
        float_nodes: nodes of the decomposed graph with a floating point value, but the last conversion; empty in a proof.
        float_kernels: lines of generated kernels (C++ or TTIR) with floating point, but the last conversion's; empty in a proof.
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
        lines += table(self.ops, self.bounds)
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
        if not all(bound.holds for bound in bounds):  # before anything is compiled
            raise IntegerOnlyError(str(IntegerProof(ops, bounds, 0)))
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
    try:
        with torch.no_grad():
            _, modules = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), *args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, IntegerOnlyError):
            raise error.inner_exception from None
        raise
    finally:
        torch._dynamo.reset()
    ((ops, bounds, floats),) = found
    kernels = kernels_of(modules)
    lines = [line for kernel in kernels for line in float_code(kernel)]
    proof = IntegerProof(ops, bounds, len(kernels), tuple(floats), tuple(lines))
    if not proof.kernels:
        raise IntegerOnlyError("no generated kernel was found to read: the proof of the code is missing.")
    if not proof.holds:
        raise IntegerOnlyError(str(proof), proof.float_nodes)
    return proof


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
