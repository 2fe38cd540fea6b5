"""Arguments by position: a model may pass them by name, the passes read them by place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

NAMES: dict[object, tuple[tuple[str, ...], ...]] = {
    F.linear: (("input",), ("weight",), ("bias",)),
    F.embedding: (("input",), ("weight",)),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), (("input",), ("other", "mat2"))),
    **dict.fromkeys(
        (torch.transpose, torch.swapaxes, torch.swapdims),
        (("input",), ("dim0", "axis0"), ("dim1", "axis1")),
    ),
}
FIRST = (("input",),)


def place_arguments(graph: fx.Graph) -> None:
    """Give calls of torch's functions the arguments by position that passes look at there: always the first one."""
    for node in graph.nodes:
        of_torch = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0] == "torch"
        if node.op != "call_function" or not node.kwargs or not of_torch:
            continue
        args, kwargs = list(node.args), dict(node.kwargs)
        for names in NAMES.get(node.target, FIRST)[len(args) :]:
            name = next((name for name in names if name in kwargs), None)
            if name is None:
                break
            args.append(kwargs.pop(name))
        if len(args) != len(node.args):
            node.args, node.kwargs = tuple(args), kwargs
