"""What we use of torch beyond its public API and change of it: the patches of Inductor, what Dynamo records, and tensors.

Names that are only imported are listed in :mod:`~.torch_names`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import fx, nn

from .registry import PrivateName

# --- what the processor has ------------------------------------------------------------------------------------------

_AMX = PrivateName(
    "torch.cpu:_is_amx_tile_supported",
    "whether a CPU multiplies in bf16 faster than in fp32",
    "distill multiplies in fp32 on CPUs, which takes several times as long",
)


def has_amx() -> bool:
    """Whether the CPU has instructions for products of bf16 matrices."""
    function = _AMX.find()
    return function is not None and bool(function())


# --- patches of Inductor ----------------------------------------------------------------------------------------------

_NO_CAPSULE = "a DLPack capsule of a quantized weight holds a null pointer"
TO_DLPACK = (
    PrivateName("torch.utils.dlpack:to_dlpack", "refusing quantized weights", _NO_CAPSULE),
    PrivateName("torch:to_dlpack", "refusing quantized weights", _NO_CAPSULE),
)
_DTYPE_RULES = PrivateName(
    "torch._inductor.dtype_propagation:DtypePropagationOpsHandler.__init__",
    "keeping Inductor's table of dtype rules",
    "compilation takes longer",
)
_DTYPE_TABLE = PrivateName(
    "torch._inductor.dtype_propagation:DtypePropagationOpsHandler._instance",
    "one table of dtype rules for all operations",
    "compilation takes longer",
)
_DTYPE_RULE_COUNT = PrivateName(
    "torch._inductor.utils:op_dtype_propagation_rules", "noticing new dtype rules", "compilation takes longer"
)
_NO_EARLY_LAUNCH = "kernels are launched one after the other, without programmatic dependent launch"
_PDL = PrivateName(
    "torch._inductor.codegen.triton:TritonKernel._handle_pdl_before_access",
    "a wait in each kernel that is launched early",
    _NO_EARLY_LAUNCH,
    parameters=("wait_buffer", "dependencies", "consider_reads"),
)
_PDL_PARTS = (
    PrivateName(
        "torch._inductor.codegen.triton:TritonKernel._enable_pdl_codegen",
        "whether a kernel is launched early",
        _NO_EARLY_LAUNCH,
    ),
    PrivateName(
        "torch._inductor.codegen.triton:TritonKernel.GDC_WAIT", "the wait that a kernel begins with", _NO_EARLY_LAUNCH
    ),
)
_CHOICES = (
    PrivateName(
        "torch._inductor.choices:InductorChoices.should_use_persistent_reduction",
        "rows that stay in registers",
        parameters=("features", "cooperative_reduction"),
        when="compile",
    ),
    PrivateName(
        "torch._inductor.choices:InductorChoices.can_fuse",
        "not fusing what cannot be generated",
        parameters=("scheduler", "node1", "node2", "shared_data_score"),
        when="compile",
    ),
)
_DECOMPOSITIONS = PrivateName(
    "torch._inductor.decomposition:fast_random_decomps.cache_clear",
    "decompositions that Inductor copied before ours were there",
    "our quantizers stay whole where something imported Inductor's table before",
)


def decompositions_anew() -> None:
    """Let Inductor copy its table of decompositions again: a copy made before ours were in it would leave our ops whole."""
    clear = _DECOMPOSITIONS.find()
    if clear is not None:
        clear()


@contextlib.contextmanager
def dtype_rules_once() -> Iterator[None]:
    """Let Inductor keep its table of dtype rules, which it fills anew for every operation that it writes.

    The table is one object, and the rules do not change: filling it took 65 us, 12600 times for Llama-3-8B's decoding step.
    """
    rules, filled = _DTYPE_RULE_COUNT.find(), -1

    def filled_once(original: Callable) -> Callable:
        def once(self: Any) -> None:
            nonlocal filled
            known = len(rules)
            if filled != known:
                original(self)
                filled = known

        return once

    if rules is None or not _DTYPE_TABLE.there():
        yield
        return
    with _DTYPE_RULES.patched(filled_once):
        yield


def knows_early_launch() -> bool:
    """Whether Inductor generates programmatic dependent launch in the form that :func:`waits_first` changes."""
    return all(name.there() for name in (_PDL, *_PDL_PARTS))


@contextlib.contextmanager
def waits_first() -> Iterator[None]:
    """Make every kernel that Inductor launches early wait for the kernel before it at its first access to memory.

    Inductor leaves the wait out for operands that the kernel just before did not write. That is right only if no kernel
    lets the next one begin before its own wait is over, and if each has a wait: ours begin to read weights before they
    wait, and a kernel that only fills a buffer has none. With a wait in each, an end implies the ends of all before.
    """
    if not knows_early_launch():
        yield
        return

    def before_access(self, wait_buffer, *dependencies, consider_reads=False):
        if self._enable_pdl_codegen():
            in_loop = self.inside_reduction and self.range_trees[-1].is_loop
            (self.body if in_loop else wait_buffer).writeline(self.GDC_WAIT)

    with _PDL.patched(lambda original: before_access):
        yield


def reduction_choices(longest_row: int) -> contextlib.AbstractContextManager:
    """Let Inductor keep rows of up to ``longest_row`` values in registers while it compiles in this context, and not fuse what
    it cannot generate.

    Inductor does not hash its choices. Graphs compiled here hold our ops, whose ``abi`` argument hashes this file.
    """
    # Slow to import: Inductor.
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction):
            """Inductor's answer, or yes for whole rows that lie within the limit."""
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction) or (
                not cooperative_reduction
                and features.get_reduction_hint() is ReductionHint.INNER
                and V.graph.sizevars.statically_known_leq(features.reduction_numel, longest_row)
                and V.graph.get_current_device_or_throw().type == "cuda"
            )

        @staticmethod
        def can_fuse(scheduler, node1, node2, shared_data_score):
            """Inductor's answer, or no for a scan in parts with a reduction.

            Torch 2.11 finds that out and fuses them all the same, which fails in its code generation; it takes reductions that
            are not split to get there.
            """
            scans = node1.is_split_scan(), node2.is_split_scan()
            if scans[0] != scans[1] and (node2 if scans[0] else node1).is_reduction():
                return False
            return InductorChoices.can_fuse(scheduler, node1, node2, shared_data_score)

    return V.set_choices_handler(Choices())


# --- what Dynamo records ----------------------------------------------------------------------------------------------

STATIC = "_dynamo_static_input_type"


def source_of(node: fx.Node) -> str:
    """Where a graph input comes from, as Dynamo writes it: ``L['self']._modules['up']._parameters['weight']``, or ""."""
    text = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return text() if callable(text) else text


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Let a copy of a graph input come from where the original does."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]


def is_static_input(node: fx.Node) -> bool:
    """Whether Dynamo says of a graph input that it keeps its address, as parameters and buffers do."""
    return (node.meta.get("tensor_dict") or {}).get(STATIC) is not None


def mark_static_input(node: fx.Node) -> None:
    """Tell AOTAutograd and CUDA graphs that this input keeps its address, as Dynamo does for parameters."""
    from torch._dynamo.source import LocalSource  # slow to import

    node.meta["tensor_dict"] = {STATIC: "unguarded"}
    node._dynamo_source = LocalSource(f"__{node.name}")  # type: ignore[attr-defined]


def transformed_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes inside of torch.func: all of a graph that differentiates, else those in vmap, whose values are of batches there."""
    enter = {torch._C._functorch._grad_increment_nesting, torch._C._functorch._jvp_increment_nesting}
    if any(node.target in enter for node in graph.nodes if node.op == "call_function"):
        return set(graph.nodes)
    inside, depth = set(), 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth += (name == "_vmap_increment_nesting") - (name == "_vmap_decrement_nesting")
        if depth:
            inside.add(node)
    return inside


def outermost_module() -> Optional[nn.Module]:
    """The outermost module whose call is under way in this thread: found by ``self`` in the frames below, or None."""
    outermost, frame = None, sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        outermost = module if isinstance(module, nn.Module) else outermost
        frame = frame.f_back  # type: ignore[assignment]
    return outermost


def drop_inner_guards(inputs: Sequence[fx.Node], names: Sequence[str]) -> None:
    """Drop the guards on the inner tensors ``names`` of the tensor subclasses that the graph being compiled takes.

    Args:
        inputs: graph inputs, as Dynamo made them; those without a source are passed over.
        names: names of the inner tensors.
    """
    # Slow to import: Dynamo.
    from torch._dynamo.source import AttrSource, ChainedSource, Source, SubclassAttrListSource
    from torch._guards import OrderedSet, TracingContext

    context = TracingContext.try_get()
    sources = [source for node in inputs if (source := getattr(node, "_dynamo_source", None)) is not None]
    if context is None or not sources:
        return
    inner: set[Source] = {SubclassAttrListSource(source) for source in sources}
    inner |= {AttrSource(source, name) for source in sources for name in names}

    def outer(source: Source) -> bool:
        while source not in inner:
            if not isinstance(source, ChainedSource):
                return True
            source = source.base
        return False

    guards = context.guards_context.dynamo_guards
    guards.inner = OrderedSet(guard for guard in guards.inner if outer(guard.originating_source))
    # None of these is left, but torch 2.13 now brings up to date what it derives from the set.
    guards.remove_guards_with_source(next(iter(inner)))


class CompiledWith(NamedTuple):
    """What ``torch.compile`` was called with; all None for a module that it did not return."""

    mode: Optional[str]
    options: Optional[dict]
    dynamic: Optional[bool]


def compiled_with(model: nn.Module, backend: str = "intscale") -> CompiledWith:
    """Mode and options of a module that ``torch.compile`` returned with our backend.

    Another backend's mode and options say nothing about what ours does.
    """
    context: Any = getattr(model, "dynamo_ctx", None)
    wrapper = getattr(context, "callback", None)
    while wrapper is not None and not hasattr(wrapper, "kwargs"):
        inner = getattr(wrapper, "_torchdynamo_orig_backend", None)
        wrapper = inner or getattr(wrapper, "_torchdynamo_orig_callable", None)
    if context is not None and wrapper is None:
        _COMPILED_WITH.say()
    dynamic = getattr(context, "_dynamic", None)
    if wrapper is None or getattr(wrapper, "compiler_name", "") != backend:
        return CompiledWith(None, None, dynamic)
    return CompiledWith(wrapper.kwargs.get("mode"), wrapper.kwargs.get("options"), dynamic)


class _Probed(NamedTuple):
    """What a small compilation showed."""

    source: str
    static: bool
    outermost: Optional[nn.Module]
    model: nn.Module
    compiled: CompiledWith
    guards: type
    names: bool


@functools.lru_cache(maxsize=1)
def _probe() -> _Probed:
    """Compile a small module and look at what Dynamo leaves on the nodes of its graph."""
    from torch._guards import TracingContext  # slow to import

    seen: list[Any] = []

    def look(gm: fx.GraphModule, inputs: Any, **_: Any) -> Callable:
        weight = next(node for node in gm.graph.nodes if is_static_input(node))
        guards = type(TracingContext.get().guards_context.dynamo_guards.inner)
        names = isinstance(getattr(gm, "_param_name_to_source", None), dict)
        seen.append((source_of(weight), True, outermost_module(), guards, names))
        return gm.forward

    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    compiled: Any = torch.compile(model, backend=look, options={"seen": 1}, dynamic=False)
    with contextlib.suppress(StopIteration, RuntimeError):
        compiled(torch.zeros(1, 2))
    source, static, outermost, guards, names = seen[0] if seen else ("", False, None, type(None), False)
    return _Probed(source, static, outermost, model, compiled_with(compiled, "look"), guards, names)


PrivateName(
    "torch._dynamo:fx.Node._dynamo_source",
    "names of weights in a graph, and guards on them",
    probe=lambda: "_parameters['weight']" in _probe().source,
)
PrivateName(
    "torch._dynamo:fx.Node.meta['tensor_dict']['_dynamo_static_input_type']",
    "which graph inputs are weights",
    probe=lambda: _probe().static,
)
PrivateName(
    "torch._dynamo:fx.GraphModule._param_name_to_source",
    "copying Dynamo's graph with what belongs to it",
    probe=lambda: _probe().names,
)
PrivateName(
    "torch._dynamo:self in the frames below a compilation",
    "whole names of weights for intscale.skip",
    "patterns of intscale.skip see only the names that Dynamo gives",
    probe=lambda: _probe().outermost is not None,
)
PrivateName(
    "torch._guards:GuardsSet.inner",
    "guards on quantized weights",
    probe=lambda: _probe().guards.__name__ == "OrderedSet",
)
_COMPILED_WITH = PrivateName(
    "torch._dynamo:OptimizedModule.dynamo_ctx.callback.kwargs",
    "explain uses the mode and options of a compiled module",
    "explain uses the defaults: pass it mode and options",
    probe=lambda: _probe().compiled == CompiledWith(None, {"seen": 1}, False),
)


# --- tensors ----------------------------------------------------------------------------------------------------------


CHECKPOINT_PROPERTIES = PrivateName(
    "torch.distributed.checkpoint.metadata:TensorProperties.create_from_tensor",
    "refusing quantized weights in torch.distributed.checkpoint, which would lose parts of them",
    "it does not refuse them: use intscale_compile.tensor_parallel.save_shards",
    parameters=("tensor",),
)


def storage_use_count(memory: Any) -> int:
    """How many tensors and Python objects hold the memory that ``_cdata`` of a storage stands for."""
    return torch._C._storage_Use_Count(memory)


def dtensor_class() -> Any:
    """``torch.distributed.tensor.DTensor``, or None where nothing has imported it: then there is no DTensor either."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a tensor that is placed on a mesh of ranks."""
    kind = dtensor_class()
    return kind is not None and isinstance(value, kind)


def local_tensor(value: Any) -> Any:
    """The tensor of this rank inside of a DTensor; anything else as it is."""
    return value._local_tensor if is_dtensor(value) else value
