"""Guards on quantized weights that cost a decoding step next to nothing.

Dynamo looks into a tensor subclass: it guards every inner tensor, and asks at each call which ones there are. Where
dictionary tags let a call pass over whole modules (torch 2.11), modules with such weights were not passed over, so that all
guards of the model ran at every call (``benchmarks/host_time.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..tensors.fields import DATA_NAMES


def keep_outer_guards(inputs: Sequence[fx.Node]) -> None:
    """Drop the guards on the inner tensors of all but the first of the weights that the graph being compiled takes packed.

    Those on the weights themselves stay: type, shape, dtype, device and attributes, among which are the names and dtypes of
    the inner tensors. They run when a module's dictionaries have changed.
    :class:`~intscale_compile.compile.binding.BoundGraph` looks at the identity of the inner tensors at each call, and at the
    layout of new ones. The first weight keeps all its guards, which run at each call: what changes every weight of a model in
    place, such as ``model.half()``, compiles the graph again.

    Args:
        inputs: graph inputs that are quantized weights, as Dynamo made them.
    """
    from torch._dynamo.source import AttrSource, ChainedSource, Source, SubclassAttrListSource
    from torch._guards import OrderedSet, TracingContext

    context = TracingContext.try_get()
    sources = [source for node in inputs if (source := getattr(node, "_dynamo_source", None)) is not None][1:]
    if context is None or not sources:
        return
    inner: set[Source] = {SubclassAttrListSource(source) for source in sources}
    inner |= {AttrSource(source, name) for source in sources for name in DATA_NAMES}

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
