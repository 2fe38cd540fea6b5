"""``torch.export`` and AOTInductor: the passes on a model that is exported, and a package that runs without the model.

:func:`export_program` takes Dynamo's graph of the whole model, as ``torch.compile(backend="intscale")`` does, runs the same
passes, and exports what they made: merged siblings, gated and grouped kernels, packed weights as buffers.
:func:`compile_package` compiles that with AOTInductor under the settings of the backend. The package calls our ops, so the
process that loads it imports ``intscale_compile`` before it does (docs/export.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
from torch import fx, nn

from ..errors import CompileError, ConfigError
from ..integrations.torch import is_dtensor
from ..ops import register_inductor
from ..passes import GraphRewrite
from ..passes.base import EXAMPLE, example
from ..passes.match import dotted_name
from ..passes.settings import Settings
from ..tensors.intscale_tensor import IntScaleTensor
from .binding import rewrite_graph
from .inductor_settings import code_generation, inductor_defaults
from .options import parse_options

log = logging.getLogger("intscale_compile")
META = "intscale_tokens"  # on the exported graph module: the most rows that one of its products takes, if known


def export_program(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Optional[Mapping[str, Any]] = None,
    *,
    dynamic_shapes: Any = None,
    options: Optional[Mapping[str, Any]] = None,
) -> torch.export.ExportedProgram:
    """Export a model, quantized by ``quantize_`` or plain, with the passes of the backend applied.

    Args:
        model: called as ``model(*args, **kwargs)`` without gradients; its tensors are inputs and results or are in pytrees.
        args, kwargs: example inputs.
        dynamic_shapes: as for ``torch.export.export``.
        options: ``intscale.*`` options of the backend.

    Returns:
        The program. ``torch.export.save`` and ``load`` keep it; a process that loads it imports ``intscale_compile`` first.

    Raises:
        CompileError: the model is sharded, or the passes left a weight that cannot be stored.
        ConfigError: an option is unknown or belongs to Inductor, or asks for quantized collectives.
    """
    settings, patches = parse_options(None, options)
    if patches:
        raise ConfigError(f"{', '.join(sorted(patches))}: options of Inductor are arguments of compile_package.")
    if settings.communication is not None:
        raise ConfigError("intscale.communication: an exported program has no process groups; export without it.")
    arguments = {name: value for name, value in (kwargs or {}).items()}
    with torch.no_grad():
        # The graph that the backend would get, with the signature of the model.
        captured = torch._dynamo.export(model, aten_graph=False, dynamic_shapes=dynamic_shapes)(*args, **arguments)
        lifted, inputs = _lifted(captured.graph_module, _names(model))
        rewrite = _rewritten(model, lifted, inputs, settings)
        program = _unlifted(rewrite, captured.graph_module)
        exported = torch.export.export(program, tuple(args), arguments, dynamic_shapes=dynamic_shapes, strict=False)
    exported.graph_module.meta[META] = _most_tokens(rewrite)
    rewrite.release()
    return exported


def compile_package(
    program: torch.export.ExportedProgram,
    path: Union[str, os.PathLike],
    options: Optional[Mapping[str, Any]] = None,
) -> str:
    """Compile an exported program with AOTInductor under the settings that the backend compiles with.

    Args:
        program: from :func:`export_program`.
        path: of the package; ends in ``.pt2``.
        options: options of Inductor, which go before ours.

    Returns:
        The path, for ``torch._inductor.aoti_load_package`` in a process that has imported ``intscale_compile``.

    Raises:
        ConfigError: an ``intscale.*`` option, which belongs to :func:`export_program`, or a path without ``.pt2``.
    """
    own = [name for name in options or {} if name.startswith("intscale.")]
    if own:
        raise ConfigError(f"{', '.join(own)}: options of the passes are arguments of export_program.")
    if not str(path).endswith(".pt2"):
        raise ConfigError(f"{path}: AOTInductor wants a path that ends in .pt2.")
    # Slow to import.
    from torch._inductor import aoti_compile_and_package

    register_inductor()
    tensors = [*program.state_dict.values(), *program.constants.values()]
    defaults = inductor_defaults(tensors, program.graph_module.meta.get(META))
    # Programmatic dependent launch begins to read weights early: AOTInductor's launcher was never run with it.
    defaults = {name: value for name, value in defaults.items() if name != "triton.enable_pdl"}
    with torch.no_grad(), code_generation():
        return aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={**defaults, **(options or {})}
        )


def _names(model: nn.Module) -> dict[int, tuple[str, str]]:
    """Kind (``_parameters`` or ``_buffers``) and name of each tensor of the model, by identity; the first name counts."""
    found: dict[int, tuple[str, str]] = {}
    for kind, named in (("_parameters", model.named_parameters), ("_buffers", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            if is_dtensor(tensor):
                raise CompileError(f"{name} is sharded (DTensor): export the model before it is sharded.")
            found.setdefault(id(tensor), (kind, name))
    return found


def _rewritten(self: nn.Module, gm: fx.GraphModule, inputs: list[Any], settings: Settings) -> GraphRewrite:
    """The passes over a graph of the model ``self``, which is named so that the choice of weights finds the model that runs."""
    return rewrite_graph(gm, inputs, settings)


def _lifted(gm: fx.GraphModule, names: Mapping[int, tuple[str, str]]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of ``gm`` that takes the tensors of the model as inputs, as Dynamo hands a graph to a backend, and its inputs."""
    graph, nodes = fx.Graph(), {}
    given = [node for node in gm.graph.nodes if node.op == "placeholder"]
    inputs: list[Any] = []
    weights: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "get_attr":
            continue
        value = _attribute(gm, str(node.target))
        if id(value) in names and id(value) not in weights:
            kind, name = names[id(value)]
            flat = name.replace(".", "_")
            weights[id(value)] = new = graph.placeholder(flat if flat.isidentifier() else f"p_{flat}")
            module, _, leaf = name.rpartition(".")
            new._dynamo_source = SimpleNamespace(
                name=f"_modules['{module}'].{kind}['{leaf}']" if module else f"{kind}['{leaf}']"
            )
            new.meta.update(node.meta, tensor_dict={"_dynamo_static_input_type": "unguarded"})
            inputs.append(value)
        if id(value) in weights:
            nodes[node] = weights[id(value)]
    for node in given:
        nodes[node] = graph.node_copy(node)
        inputs.append(example(node))
    for node in gm.graph.nodes:
        if node not in nodes:
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
    return fx.GraphModule(gm, graph), inputs


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _unlifted(rewrite: GraphRewrite, captured: fx.GraphModule) -> fx.GraphModule:
    """The rewritten graph with weights, packed and others, as its buffers, behind the signature of ``captured``."""
    count = sum(node.op == "placeholder" for node in captured.graph.nodes)
    graph, nodes = captured.graph, {}
    for node in reversed(list(graph.nodes)):  # emptied, it still holds the signature
        graph.erase_node(node)
    given = rewrite.placeholders()
    first = len(given) - count  # the weights come first
    held: dict[str, Any] = {}
    for node in given[first:]:
        nodes[node] = graph.node_copy(node)
    for name, node, value in _weights(rewrite, given[:first]):
        held[name] = value
        nodes[node] = graph.get_attr(name)
        nodes[node].meta.update(node.meta)
    for node in rewrite.graph.nodes:
        if node not in nodes and node.op != "placeholder":
            if node.op == "get_attr":
                held.setdefault(str(node.target), _attribute(rewrite.gm, str(node.target)))
            nodes[node] = graph.node_copy(node, nodes.__getitem__)
    module = fx.GraphModule({**held}, graph)
    for node in graph.nodes:  # the values are those of another tracing
        node.meta.pop(EXAMPLE, None)
        node.meta.pop("val", None)
    return module


def _weights(rewrite: GraphRewrite, weights: Sequence[fx.Node]) -> Iterator[tuple[str, fx.Node, Any]]:
    """Name, node and value of every weight that the rewritten graph reads."""
    names: set[str] = set()
    for index, node in enumerate(weights):
        value = rewrite.example_inputs[index]
        if node.users:
            if isinstance(value, IntScaleTensor):
                raise CompileError(
                    f"{node.name} is read in a form that no pass knows, so that the exported program would hold a tensor "
                    "subclass: explain(model, *inputs) names the reason."
                )
            yield dotted_name(node), node, value.detach()
    for number, (node, (recipe, part)) in enumerate(rewrite.packed_inputs.items()):
        value = recipe.resolve(rewrite.example_inputs)
        value = value if part is None else getattr(value, part)
        name = f"{recipe.sources[0].name.replace('.', '_')}_{part or 'joined'}"
        yield f"{name}_{number}" if name in names else name, node, value.detach()
        names.add(name)


def _most_tokens(rewrite: GraphRewrite) -> Optional[int]:
    tokens = [candidate.tokens for candidate in rewrite.candidates]
    return max(map(int, tokens)) if tokens and all(t.isdigit() for t in tokens) else None
