"""Modules behind a graph that Dynamo is compiling: those whose call is under way, and those that the traced code reaches;
and functions that Dynamo leaves alone.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from typing import Any, Optional

from torch import fx, nn

from .after_import import after_import
from .registry import PrivateName

TRANSLATOR = PrivateName(
    "torch._dynamo.symbolic_convert:InstructionTranslator.current_tx",
    "finding the model of a graph by where its inputs come from",
    "the model is found where one of its modules is being called",
)


GUARDS = PrivateName(
    "torch._dynamo.guards:GuardBuilder.HASATTR",
    "not serving a quantized model with the graph of a plain one",
    "call torch._dynamo.reset() between a plain and a quantized model of one class that are compiled block by block",
    parameters=("guard",),
)


def modules_in_use(nodes: Iterable[fx.Node]) -> list[nn.Module]:
    """The outermost modules first: by the ``self`` of each call on the stack, then by where the inputs of the graph come from."""
    found: list[nn.Module] = []
    frame = sys._getframe()
    while frame is not None:
        # Only of methods: Python keeps a copy of the local variables that are looked at as long as their call lasts.
        if frame.f_code.co_argcount and frame.f_code.co_varnames[0] == "self":
            module = frame.f_locals.get("self")
            found += [module] if isinstance(module, nn.Module) else []
        frame = frame.f_back  # type: ignore[assignment]
    found.reverse()
    scope = _traced_scope()
    if scope is not None:
        cache: dict[str, Any] = {}
        found += [
            m for node in nodes if (m := _first_module(getattr(node, "_dynamo_source", None), scope, cache)) is not None
        ]
    return list({id(module): module for module in found}.values())


def _traced_scope() -> Optional[dict[str, Any]]:
    """Local and global variables of the frame that Dynamo traces; None outside of a compilation."""
    if "torch._dynamo.symbolic_convert" not in sys.modules or (current := TRANSLATOR.find()) is None:
        return None
    try:
        frame = current()
        return {"L": frame.f_locals, "G": frame.f_globals}
    except (AttributeError, IndexError, AssertionError):
        return None


def guard_presence(nodes: Iterable[fx.Node], attribute: str) -> None:
    """Let the graph that is being compiled serve only models that have, or lack, an attribute as those of its inputs do."""
    # Slow to import, and there by now.
    from torch._dynamo.source import AttrSource
    from torch._guards import TracingContext

    context, scope = TracingContext.try_get(), _traced_scope()
    builder = GUARDS.find() if scope is not None else None
    if context is None or scope is None or builder is None:
        return
    cache: dict[str, Any] = {}
    found = {_first_link(getattr(node, "_dynamo_source", None), scope, cache)[0] for node in nodes} - {None}
    for source in found:
        if "attr" in inspect.signature(builder).parameters:
            guard = source.make_guard(functools.partial(builder, attr=attribute))
        else:  # torch 2.11 takes the attribute as the source
            guard = AttrSource(source, attribute).make_guard(builder)
        context.guards_context.dynamo_guards.add(guard)


def _first_module(source: Any, scope: dict[str, Any], cache: dict[str, Any]) -> Optional[nn.Module]:
    """The outermost module on the way to an input: of ``L['model'].layers[0].weight`` the model."""
    return _first_link(source, scope, cache)[1]


def _first_link(source: Any, scope: dict[str, Any], cache: dict[str, Any]) -> tuple[Any, Optional[nn.Module]]:
    """The part of an input's source that gives its outermost module, and that module."""
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    for link in reversed(chain):
        name = link.name() if callable(link.name) else link.name
        if name not in cache:
            try:
                cache[name] = eval(name, dict(scope))
            except Exception:  # a source that only Dynamo's guards can evaluate
                cache[name] = None
        if isinstance(cache[name], nn.Module):
            return link, cache[name]
    return None, None


_SKIP = PrivateName(
    "torch._dynamo.eval_frame:skip_code",
    "running what an operator of a quantized weight is, where a graph broke before it",
    "an operator that a quantized weight refuses may end in a RecursionError behind a graph break",
    parameters=("code",),
)


def leave_to_python(*functions: Any) -> None:
    """Have Dynamo never compile these functions by themselves; where one is called in what it traces it looks into it.

    It cannot resume in the middle of ``DisableTorchFunctionSubclass``: what comes after would ask for the function again.
    """

    def skip(_: Any) -> None:
        skip_code = _SKIP.find()
        if skip_code is not None:
            for function in functions:
                skip_code(function.__code__)

    after_import("torch._dynamo.eval_frame", skip)
