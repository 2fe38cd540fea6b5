"""Rotate and quantize: a Hadamard transform and the quantization behind it become one kernel on a GPU.

    h = hadamard(x, size);  quantize_per_token(h)   or   quantize_static(h, scale)
    =>  hadamard_quantize(x, size, None or scale)

Matches both quantizers on tensors of a GPU. The transform stays where something else reads it (where autograd watches: a
gradient passes through it, and Inductor does not compute it). Left alone: transforms whose input is written in place
before the quantization, and CPUs, where the quantizer fuses with what is around it and the transform stays whole.
"""

from __future__ import annotations

from torch import Tensor, fx

from ..kernels.hadamard import HADAMARD_OP, HADAMARD_QUANTIZE_OP
from .base import GraphRewrite, Pass, example
from .share_quantize import QUANTIZERS, written_between


def rotate_quantize(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = 0
    for node in list(rewrite.graph.nodes):
        if node.target in QUANTIZERS and _is_rotated(node.args[0]) and not written_between(node.args[0], node):
            x, size = node.args[0].args
            with rewrite.graph.inserting_before(node):
                scale = node.args[1] if len(node.args) > 1 else None
                fused = rewrite.call(HADAMARD_QUANTIZE_OP, (x, size, scale), like=node, value=example(node))
            node.replace_all_uses_with(fused)
            rewrite.graph.erase_node(node)
            done += 1
    return done


ROTATE_QUANTIZE = Pass("rotate_quantize", rotate_quantize)


def _is_rotated(node: object) -> bool:
    value = example(node)
    on_gpu = isinstance(value, Tensor) and value.device.type == "cuda"
    return on_gpu and isinstance(node, fx.Node) and node.target is HADAMARD_OP
