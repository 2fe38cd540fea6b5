"""Definition of an op of integer-only models: schema, aten form, shapes of its results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

DECOMPOSITIONS: dict[Any, Callable] = {}  # what Inductor takes in the place of an op


def integer_op(schema: str, fake: Callable, fuses: bool = True) -> Callable[[Callable], Any]:
    """Decorator: the function is the op's aten form, on any device and inside of Inductor's kernels.

    Args:
        schema: ``int_add(Tensor a, Tensor b) -> Tensor``.
        fake: makes empty results for the same arguments.
        fuses: Inductor takes the aten form in the place of the op; else it calls the op.

    Returns:
        The op.
    """

    def register(function: Callable) -> Any:
        name = f"intscale::{schema.partition('(')[0]}"
        torch.library.define(name, schema[len(name) - len("intscale::") :])
        torch.library.impl(name, "CompositeExplicitAutograd", function)
        torch.library.register_fake(name, fake)
        op = getattr(torch.ops.intscale, name.removeprefix("intscale::")).default
        if fuses:
            DECOMPOSITIONS[op] = function
        return op

    return register
