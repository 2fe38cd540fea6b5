"""Views of a weight, recognised by what they read and not by what they are called: Dynamo's names change with releases.

``weight.T`` is ``getattr(weight, "T")`` up to torch 2.13 and ``aten.numpy_T(weight)`` from 2.14 on; ``movedim``, ``adjoint``,
``view(N, K)`` or ``unsqueeze(0)[0]`` are other ways to write the weight or its transpose.
"""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, fx

from .base import example, writes_in_place


def root_of_view(node: fx.Node) -> Optional[fx.Node]:
    """The node whose memory ``node`` reads through functions of one tensor, none of which writes; None if there is none."""
    root = node
    while root.op in ("call_function", "call_method"):
        if len(root.all_input_nodes) != 1 or any(writes_in_place(user) for user in root.users):
            return None
        root = root.all_input_nodes[0]
    # Written to elsewhere: no longer what the caller passed.
    return None if any(writes_in_place(user) for user in root.users) else root


def transposes(node: fx.Node, root: fx.Node) -> Optional[bool]:
    """Whether ``node`` is ``root`` with the last two dimensions exchanged (True) or just as it is (False); else None."""
    view, weight = example(node), example(root)
    if not reads_same_memory(view, weight) or view.storage_offset() != weight.storage_offset():
        return None
    layout, original = (list(zip(t.shape, t.stride())) for t in (view, weight))
    if layout == original:
        return False
    return True if layout == [*original[:-2], *original[:-3:-1]] else None


def is_unknown_view(node: fx.Node, root: fx.Node) -> bool:
    """Whether ``node`` holds all entries of the weight ``root`` in the same memory, in another arrangement."""
    view, weight = example(node), example(root)
    return reads_same_memory(view, weight) and view.numel() == weight.numel() and view.dim() > 1


def reads_same_memory(view: Any, weight: Any) -> bool:
    """Whether two fake tensors share their storage; False for what is no tensor, or has no storage of its own."""
    if not (isinstance(view, Tensor) and isinstance(weight, Tensor)) or view.dtype != weight.dtype:
        return False
    try:
        return view.untyped_storage()._cdata == weight.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # a tensor subclass without one
        return False
