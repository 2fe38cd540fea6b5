"""Integer ends: the table of token embeddings, the product with the output embedding, and results.

    embedding(ids, weight)  =>  int_embedding(ids, codes, scales)              int8, one scale for each row
    linear(x, weight)       =>  w4a8_linear(quantize_per_token(x), ...)        with int8 weights, if it is an output embedding
    output(x)               =>  output(int_to_float(x))

A weight that both use is packed twice. Left alone, so that the proof names it: an embedding with ``max_norm``, and a linear
layer that is neither quantized nor an output embedding.
"""

from __future__ import annotations

from torch import fx

from ...kernels.arguments import LinearArguments
from ...kernels.integer.pointwise import EMBEDDING_OP, TO_FLOAT_OP
from ...kernels.quantize_per_token import OP as QUANTIZE
from ...kernels.w4a8_linear import LINEAR_OP
from ...ops import KERNEL_ABI
from ...reasons import Reason
from ..base import Candidate, GraphRewrite, Pass, example
from ..insert_qdq import weight_inputs
from ..match import argument
from ..packed_weights import Packed
from .nodes import erase_unread, is_float, name_of
from .parts import OUTPUT_CONFIG, part_input, source_of

OUTPUTS = (Reason.OUTPUT_EMBEDDING, Reason.TIED_EMBEDDING)


def integer_ends(rewrite: GraphRewrite) -> int:
    """Replace every match; returns how many."""
    done = _results(rewrite)
    for node in list(rewrite.graph.nodes):
        if name_of(node) == "embedding" and is_float(example(node)):
            done += _embedding(rewrite, node)
    for candidate in rewrite.candidates:
        if candidate.reason in OUTPUTS and candidate.packed is None and candidate.source is not None:
            _output(rewrite, candidate)
            done += 1
    return done


INTEGER_ENDS = Pass("integer_ends", integer_ends)


def _results(rewrite: GraphRewrite) -> int:
    """The one conversion to floating point, in front of every result of the graph."""
    output = next(node for node in rewrite.graph.nodes if node.op == "output")
    results = [n for n in output.all_input_nodes if is_float(example(n)) and n.target is not TO_FLOAT_OP]
    results = [n for n in results if n.op != "placeholder"]
    for node in results:
        with rewrite.graph.inserting_before(output):
            made = rewrite.call(TO_FLOAT_OP, (node, example(node).dtype), like=node)
        output.replace_input_with(node, made)
    return len(results)


def _embedding(rewrite: GraphRewrite, node: fx.Node) -> bool:
    ids, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    source = source_of(rewrite, weight)
    if source is None or argument(node, 3, "max_norm") is not None or is_float(example(ids)):
        return False
    parts = [part_input(rewrite, kind, (source,)) for kind in ("embedding_codes", "embedding_scale")]
    with rewrite.graph.inserting_before(node):
        made = rewrite.call(EMBEDDING_OP, (ids, *parts), like=node)
    node.replace_all_uses_with(made)
    erase_unread(node)
    return True


def _output(rewrite: GraphRewrite, candidate: Candidate) -> None:
    node = candidate.node
    recipe = Packed((candidate.source,), (candidate.transposed,), OUTPUT_CONFIG)  # type: ignore[arg-type]
    packed = recipe.resolve(rewrite.example_inputs)
    qdata, scale, row_scale, _ = weight_inputs(rewrite, recipe, packed)
    with rewrite.graph.inserting_before(node):
        quantized = rewrite.call(QUANTIZE, (candidate.x,), like=node)
        xq, token_scale = (rewrite.item(quantized, i, node) for i in (0, 1))
        form = (packed.out_features, packed.group_size, packed.scale_bits, packed.packing_format)
        operands = (xq, token_scale, qdata, scale, row_scale, candidate.bias)
        arguments = LinearArguments(*operands, *form, example(node).dtype, KERNEL_ABI, None, True)  # type: ignore[arg-type]
        linear = rewrite.call(LINEAR_OP, tuple(arguments), like=node)
    linear.meta["intscale_tensor"] = packed
    node.replace_all_uses_with(linear)
    erase_unread(node)
