"""Guards on quantized weights that cost a decoding step next to nothing.

Dynamo looks into a tensor subclass: it guards every inner tensor, and asks at each call which ones there are. Where
dictionary tags let a call pass over whole modules (torch 2.11), modules with such weights were not passed over, so that all
guards of the model ran at every call (``benchmarks/host_time.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from ..integrations.torch import drop_inner_guards
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
    drop_inner_guards(inputs[1:], DATA_NAMES)
