"""Weights that a module reads itself instead of calling the layer that owns them, found in the source of its ``forward``.

A quantized weight serves as the right operand of a product. Mamba multiplies ``self.dt_proj.weight @ x``, WavLM hands the
weights of its projections to ``F.multi_head_attention_forward``, MobileBERT concatenates one with another, a tied decoder
multiplies by its encoder's weight instead of its transpose. The layers look like any others, so only the code that uses them
tells. What ``forward`` reaches is read as :mod:`.source_trees` says, functions outside of the class too; where there is no
source, nothing is known.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ..reasons import Reason
from .product_forms import OTHER_FORMS, einsum_linear, tensordot_linear
from .source_expressions import bare, called, is_weight, of_torch, path_of, rearranged
from .source_trees import trees_of

MATMULS = ("matmul", "mm", "__matmul__", "addmm")
PRODUCTS = OTHER_FORMS | {*MATMULS, "bmm", "linear", "inner", "tensordot", "einsum", "mv", "addmv"}
VECTORS = {"mv": 0, "addmv": 1}  # the place of the matrix, the left operand
COMPUTED = {  # functions and methods that make another tensor of a weight
    "normalize", "norm", "softmax", "log_softmax", "mul", "multiply", "add", "sub", "div", "where", "tril", "triu", "abs", "sign",
    "clamp", "round", "square", "exp", "sigmoid", "tanh", "masked_fill", "roll", "flip", "pow", "sqrt", "sum", "mean", "addcmul",
    "vector_norm", "index_select", "gather", "dropout", "layer_norm", "weight_norm", "svd", "qr", "eigh", "inverse", "inv",
    "take", "take_along_dim", "masked_select", "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "repeat",
    "repeat_interleave", "tile", "diagonal", "rot90", "double", "std", "var", "max", "min", "amax", "amin", "neg", "log", "relu",
    "cumsum", "index", "rsub", "truediv", "getitem", "prod", "var_mean", "std_mean", "fmod", "remainder", "maximum", "minimum",
    "logical_and", "gt", "lt", "ge", "le", "eq", "ne", "sort", "topk", "argmax", "argmin", "unique", "all", "any",
    "lerp", "addcdiv", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
    "rms_norm", "fake_quantize_per_channel_affine", "fake_quantize_per_tensor_affine",
}  # fmt: skip
NOT_PRODUCTS = {"embedding", "conv1d", "conv2d", "conv3d", "cdist", "cosine_similarity", "embedding_bag"}
# Names of operands, in the order in which functions take them.
OPERANDS = (
    "equation", "self", "input", "a", "mat1", "mat", "other", "mat2", "b", "weight", "vec", "dims", "operands", "tensors",
)  # fmt: skip
# From how many sizes on they take a matrix apart.
VIEWS = {"view": 3, "reshape": 3, "unflatten": 0, "expand": 0, "as_strided": 0, "flatten": 0, "unfold": 0}
PARTED = {  # the place of the dimension; negative: never rows
    "chunk": 2, "split": 2, "tensor_split": 2, "unsafe_chunk": 2, "unsafe_split": 2, "split_with_sizes": 2, "narrow": 1,
    "hsplit": -1, "dsplit": -1, "unbind": -1, "select": -1, "diag": -1, "trace": -1, "ravel": -1,
}  # fmt: skip
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
ATTENTION = "multi_head_attention_forward"


@functools.lru_cache(maxsize=4096)
def weight_reads(kind: type, start: Any = "forward") -> dict[str, Reason]:
    """Dotted names of children of a class whose weights it reads in a form that a quantized weight does not have, and why.

    The empty name is the class itself: a linear layer of one's own that masks or scales its weight. ``*`` in a name stands for
    every entry of a list of modules.

    A layer that is also called may have some of its columns read in a branch that is seldom taken, as Bloom does.
    ``UNKNOWN_FORM`` where the weight itself is the right operand, not its transpose: GPT-2's ``Conv1D`` is meant to be used so.

    Args:
        kind: the class.
        start: the method with which to begin, or a function that an instance has in the place of its ``forward``.
    """
    found: dict[str, Reason] = {}
    calls: set[str] = set()
    in_parts: set[str] = set()
    for tree in trees_of(kind, start):
        aliases = _aliases(tree)
        nodes = list(ast.walk(tree))
        calls |= {path_of(node.func, through_entries=True) for node in nodes if isinstance(node, ast.Call)}
        parts = [bare(n.value) for n in nodes if isinstance(n, ast.Subscript) and not _takes_rows(n.slice)]
        in_parts |= {_owner(path) for part in parts if is_weight(path := path_of(part))}
        for node in nodes:
            for value, reason in (*_gathered(node), *_unserved(node)):
                for path in _paths(bare(value), aliases if reason is not Reason.UNKNOWN_FORM else {}):
                    found.setdefault(_owner(path), reason)
        for node in nodes:
            for path in _viewed(node, aliases):
                found.setdefault(_owner(path), Reason.UNKNOWN_VIEW)
    return dict.fromkeys(in_parts - calls, Reason.NOT_CONSTANT) | found


@functools.lru_cache(maxsize=4096)
def called_methods(kind: type) -> frozenset[tuple[str, str]]:
    """Methods of children that ``forward`` of a class calls by name: the child's dotted name and the method's."""
    calls = [node for tree in trees_of(kind, "forward") for node in ast.walk(tree) if isinstance(node, ast.Call)]
    paths = [path_of(call.func).rpartition(".") for call in calls]
    return frozenset((child, name) for child, _, name in paths if child and name != "forward")


@functools.lru_cache(maxsize=4096)
def stacks_in_a_loop(kind: type) -> frozenset[str]:
    """Names of parameters of a class that its ``forward`` takes apart for products: ``F.linear(x, self.name[i])``."""
    calls = [node for tree in trees_of(kind, "forward") for node in ast.walk(tree) if isinstance(node, ast.Call)]
    weights = [call.args[1] for call in calls if called(call) == "linear" and len(call.args) > 1]
    chosen = [path_of(weight.value) for weight in weights if isinstance(weight, ast.Subscript)]
    return frozenset(name for name in chosen if name)


def _aliases(tree: ast.AST) -> dict[str, set[str]]:
    """Local names that stand for a child's weight somewhere, maybe under a condition, and its dotted names."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        target, values = None, []
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            value, target = node.value, node.targets[0]
            values = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
        elif isinstance(node, (ast.For, ast.comprehension)) and isinstance(node.iter, (ast.Tuple, ast.List)):
            target, values = node.target, node.iter.elts
        if isinstance(target, ast.Name):
            paths = {path for v in values if is_weight(path := path_of(bare(v)))}
            found.setdefault(target.id, set()).update(paths)
    return found


def _paths(value: ast.AST, aliases: dict[str, set[str]]) -> set[str]:
    """Dotted names of the weights that a value may be."""
    paths = aliases.get(value.id, set()) if isinstance(value, ast.Name) else {path_of(value)}
    return {path for path in paths if is_weight(path)}


def _gathered(node: ast.AST) -> Iterator[tuple[ast.AST, Reason]]:
    """A value of which an index picks entries that need not lie side by side."""
    if isinstance(node, ast.Subscript) and _gathers(node.slice):
        yield node.value, Reason.NOT_CONSTANT


def _viewed(node: ast.AST, aliases: dict[str, set[str]]) -> Iterator[str]:
    """Dotted names of the weight that a call takes apart into more dimensions: ``weight.view(heads, -1, rank)``."""
    name = called(node) if isinstance(node, ast.Call) else ""
    if name not in VIEWS or not isinstance(node.func, ast.Attribute):  # type: ignore[attr-defined]
        return
    values = list(node.args)  # type: ignore[attr-defined]
    owner = values.pop(0) if of_torch(node.func) and values else node.func.value  # type: ignore[attr-defined]
    sizes = values[0].elts if len(values) == 1 and isinstance(values[0], (ast.Tuple, ast.List)) else values
    if len(sizes) >= VIEWS[name] or (len(sizes) == 1 and _is_number(sizes[0])):  # flat
        yield from _paths(bare(owner), aliases)


def _unserved(node: ast.AST) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of one expression that cannot be quantized weights."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        left, right = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        if isinstance(node.op, ast.MatMult):
            yield left, Reason.LEFT_OPERAND
            yield from _untransposed(right, False)
        elif isinstance(node, ast.BinOp) or not isinstance(node.op, (ast.Mult, ast.Div)):  # a factor is taken in place
            yield from ((value, Reason.NOT_CONSTANT) for value in (left, right))
    elif isinstance(node, ast.UnaryOp):
        yield node.operand, Reason.NOT_CONSTANT
    elif isinstance(node, ast.Compare) and not isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
        yield from ((value, Reason.NOT_CONSTANT) for value in (node.left, *node.comparators))
    elif isinstance(node, ast.Call):
        yield from _unserved_call(node)


def _unserved_call(node: ast.Call) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of a call that cannot be quantized weights."""
    name, is_method = called(node), isinstance(node.func, ast.Attribute) and not of_torch(node.func)
    if not is_method and not of_torch(node.func):
        return  # a function that is read by itself, or unknown
    given: dict = {keyword.arg: keyword.value for keyword in node.keywords}
    owner = [node.func.value] if is_method else []  # type: ignore[attr-defined]
    operands = _flat([*owner, *node.args, *(given[n] for n in OPERANDS if n in given)])
    if name == ATTENTION:
        yield from ((value, Reason.ONE_OPERATOR) for value in _flat([*operands, *given.values()]))
    if _cuts_features(name, [*owner, *node.args], given):
        yield operands[0], Reason.NOT_CONSTANT
    factors = [given[n] for n in ("beta", "alpha") if n in given]
    if name == "addmm" and len(operands) > 2 and not all(map(_is_one, factors)):
        yield operands[2], Reason.SCALED_ADDMM
    elif name == "addmm" and len(operands) > 2 and not _is_bias(operands[0]):
        yield operands[2], Reason.BIAS_SHAPE
    if "out" in given and name in PRODUCTS:
        yield from ((value, Reason.UNKNOWN_FORM) for value in operands)
    yield from _products(name, operands, node, given)
    for names, reason in ((COMPUTED | JOINS, Reason.NOT_CONSTANT), (OTHER_FORMS | NOT_PRODUCTS, Reason.UNKNOWN_FORM)):
        if name in names:
            yield from ((value, reason) for value in _flat([*operands, *given.values()]))


def _cuts_features(name: str, values: Sequence[ast.AST], given: dict[str, ast.AST]) -> bool:
    """Whether a call takes a matrix apart along its columns, or into vectors."""
    if name not in PARTED:
        return False
    place = PARTED[name]
    dim = given.get("dim", values[place] if 0 < place < len(values) else ast.Constant(0))
    return place < 0 or not (_is_number(dim) and ast.literal_eval(dim) in (0, -2))


def _is_bias(node: ast.AST) -> bool:
    """Whether what ``addmm`` adds is called a bias: whether it is a vector, which a product takes, its name has to say."""
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return "bias" in name


def _flat(values: Sequence[ast.AST]) -> list[ast.AST]:
    """Operands, those in lists too."""
    return [v for value in values for v in (value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value])]


def _products(name: str, operands: Sequence[ast.AST], node: ast.Call, given: dict) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of the product ``name`` that cannot be quantized weights."""
    if name == "__rmatmul__":
        name, operands = "__matmul__", operands[1::-1]
    if name == "addmm":
        yield from ((value, Reason.NOT_CONSTANT) for value in operands[:1])
        operands = operands[1:]
    if name in (*MATMULS, "bmm", "linear", "inner"):
        yield from ((value, Reason.LEFT_OPERAND) for value in operands[:1])
    if name in VECTORS:
        yield from ((value, Reason.LEFT_OPERAND) for value in operands[VECTORS[name] :][:1])
    for value in operands[1:2]:
        if name in (*MATMULS, "linear", "inner"):
            yield from _untransposed(value, name in ("linear", "inner"))
        elif name == "bmm":
            yield value, Reason.UNKNOWN_FORM
    if name == "einsum":
        equation = operands[0].value if operands and isinstance(operands[0], ast.Constant) else None
        for place, value in enumerate(operands[1:]):
            if len(operands) != 3 or einsum_linear(equation, place) != (not rearranged(value).transposed):
                yield value, Reason.UNKNOWN_FORM
    if name == "tensordot" and len(operands) > 1:
        yield operands[0], Reason.LEFT_OPERAND
        kept_nk = tensordot_linear(_dims(node, given), None)
        if kept_nk is None or kept_nk == rearranged(operands[1]).transposed:
            yield operands[1], Reason.UNKNOWN_FORM


def _dims(node: ast.Call, given: dict) -> Any:
    """The dimensions of a tensordot, as torch or as aten takes them; None where they are not written there."""
    values = [given["dims"]] if "dims" in given else node.args[2:] or [ast.Constant(2)]
    try:
        found = [ast.literal_eval(value) for value in values]
    except ValueError:
        return None
    return found[0] if len(found) == 1 else tuple(found[:2])


def _untransposed(node: ast.AST, wanted: bool) -> Iterator[tuple[ast.AST, Reason]]:
    """The right operand of a product, if it is a weight as a layer keeps it, or (``wanted``) its transpose."""
    value = rearranged(node)
    if value.transposed is wanted:
        yield node, Reason.UNKNOWN_FORM
    elif value.stacked:
        yield node, Reason.UNKNOWN_VIEW


def _gathers(index: ast.AST) -> bool:
    """Whether an index picks entries that need not lie side by side: a tensor, a list, a mask, or a slice with steps.

    A name counts as one: what it stands for is not known here, and ranges are written as slices.
    """
    entries = index.elts if isinstance(index, ast.Tuple) else [index]
    return any(not _is_range(entry) and not _is_number(entry) for entry in entries)


def _is_range(index: ast.AST) -> bool:
    if isinstance(index, ast.Constant):
        return index.value is None or index.value is Ellipsis
    return isinstance(index, ast.Slice) and (index.step is None or _is_one(index.step))


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 1


def _is_number(index: ast.AST) -> bool:
    index = index.operand if isinstance(index, ast.UnaryOp) else index
    return isinstance(index, ast.Constant) and isinstance(index.value, int)


def _takes_rows(index: ast.AST) -> bool:
    """Whether an index may leave a matrix with all of its columns: no number, nothing that cuts them."""
    if isinstance(index, ast.Tuple) and len(index.elts) > 1:
        columns = index.elts[1]
        return isinstance(columns, ast.Slice) and columns.lower is None and columns.upper is None
    return not _is_number(index)


def _owner(path: str) -> str:
    """The module that has a weight: empty for the one that reads it."""
    return path.removesuffix("weight").removesuffix(".")
