"""What an integer-only graph cannot contain, in words: the nodes, where they stand in the source, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from ...kernels.w4a8_linear import LINEAR_OP
from ...ops import quantize_static
from ..base import example
from ..insert_qdq import GATHER
from ..model.decode_attention import ATTENTION
from .nodes import is_float, name_of

MOST = 8  # nodes in one message
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)')


def describe(nodes: Sequence[fx.Node]) -> str:
    """One message for all nodes: name, source line and mend of each; repeated lines once."""
    lines: dict[str, int] = {}
    for node in nodes:
        text = f"{name_of(node) or node.name} at {source_line(node)}: {_mend(node)}"
        lines[text] = lines.get(text, 0) + 1
    shown = [f"{text}{f' ({count} times)' if count > 1 else ''}" for text, count in list(lines.items())[:MOST]]
    more = f"\n  and {len(lines) - MOST} more places" if len(lines) > MOST else ""
    verb = "node stays" if len(nodes) == 1 else "nodes stay"
    return (
        f"integer-only: {len(nodes)} {verb} in floating point, so that nothing was compiled:\n  "
        + "\n  ".join(shown)
        + more
    )


def source_line(node: fx.Node) -> str:
    """``modeling_llama.py:221 (code)``, from what Dynamo noted; the node's name where it noted nothing."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return f"node {node.name}"
    path, line, code = frames[-1]
    return f"{path.rpartition('/')[2]}:{line} ({code.strip()[:80]})"


def _mend(node: fx.Node) -> str:
    name = name_of(node)
    if node.target in ATTENTION:
        return "masks of type bool, no dropout and a constant scale are supported; added masks (ALiBi) are not"
    if name in ("softmax", "bmm", "matmul", "baddbmm"):
        return 'attention written out: load the model with attn_implementation="sdpa"'
    if name in ("linear", "addmm", "mm"):
        return "a linear layer that is not quantized: name it to quantize_, or quantize every linear layer"
    if node.target is LINEAR_OP:
        return "a linear layer in training: call the model under torch.no_grad(), in eval mode, with merged adapters"
    if node.target is quantize_static.STATIC_OP:
        return "a static activation scale: calibrate with activation='int8_per_token'"
    if node.target is GATHER:
        return "an activation order of the weight: quantize without it"
    if name == "tanh":
        return "a tanh (soft-capping of logits, or a pooler): models with it have no integer-only form yet"
    if name == "dropout":
        return "dropout: call model.eval()"
    if "autocast" in name:
        return "autocast: leave it out, an integer-only model has one type"
    if name.removeprefix("prim").strip("_ ") in ("from_local", "to_local", "redistribute", "from_shard"):
        return "a DTensor: divide the model with intscale_compile.tensor_parallel.parallelize"
    if name == "topk":
        return "a router of experts: models with one have no integer-only form yet"
    inputs = [n.name for n in node.all_input_nodes if n.op == "placeholder" and is_float(example(n))]
    if inputs:
        return (
            f"it reads the floating point input {inputs[0]}; token ids are the only inputs (a graph break gives others)"
        )
    return "no integer form is known; see docs/integer_only.md for what there is"
