"""Weights that a module reads itself instead of calling the layer that owns them, found in the source of its ``forward``.

A quantized weight serves as the right operand of a product. Mamba multiplies ``self.dt_proj.weight @ x``, WavLM hands the
weights of its projections to ``F.multi_head_attention_forward``, MobileBERT concatenates one with another, a tied decoder
multiplies by its encoder's weight instead of its transpose. The layers look like any others, so only the code that uses them
tells. ``forward`` and the methods that it calls on ``self`` are read, and names that are given to a weight there once; where
there is no source, nothing is known.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from ..reasons import Reason
from .product_forms import einsum_linear

MATMULS = {"matmul", "mm", "bmm"}
VECTORS = {"mv": 0, "addmv": 1}  # the place of the matrix, the left operand
COMPUTED = {  # functions and methods that make another tensor of a weight
    "normalize", "norm", "softmax", "log_softmax", "mul", "multiply", "add", "sub", "div", "where", "tril", "triu", "abs", "sign",
    "clamp", "round", "square", "exp", "sigmoid", "tanh", "masked_fill", "roll", "flip", "pow", "sqrt", "sum", "mean", "addcmul",
    "vector_norm", "index_select", "gather", "dropout", "layer_norm", "weight_norm", "svd", "qr", "eigh", "inverse", "inv",
    "take", "take_along_dim", "masked_select", "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "repeat",
    "repeat_interleave", "tile", "diagonal", "rot90", "double", "std", "var", "max", "min", "amax", "amin", "neg", "log", "relu",
    "cumsum", "index",
}  # fmt: skip
OTHER_FORMS = {
    "embedding", "conv1d", "conv2d", "conv3d", "kron", "cdist", "cosine_similarity", "scaled_dot_product_attention", "bilinear",
    "dot", "vdot", "vecdot", "outer", "grouped_mm", "baddbmm", "multi_dot", "chain_matmul",
}  # fmt: skip
# From how many sizes on they take a matrix apart.
VIEWS = {"view": 3, "reshape": 3, "unflatten": 0, "expand": 0, "as_strided": 0, "flatten": 0, "unfold": 0}
JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack"}
ATTENTION = "multi_head_attention_forward"


@functools.lru_cache(maxsize=4096)
def weight_reads(kind: type) -> dict[str, Reason]:
    """Dotted names of children of a class whose weights it reads in a form that a quantized weight does not have, and why.

    The empty name is the class itself: a linear layer of one's own that masks or scales its weight.

    A layer that is also called may have some of its columns read in a branch that is seldom taken, as Bloom does.
    ``UNKNOWN_FORM`` where the weight itself is the right operand, not its transpose: GPT-2's ``Conv1D`` is meant to be used so.
    """
    found: dict[str, Reason] = {}
    called: set[str] = set()
    in_parts: set[str] = set()
    for tree, me in _methods(kind):
        given = _names_of_weights(tree, me)
        aliases = _aliases(tree, me)
        nodes = list(ast.walk(tree))
        called |= {_path(node.func, me) for node in nodes if isinstance(node, ast.Call)}
        parts = [
            _Reader(given).bare(n.value) for n in nodes if isinstance(n, ast.Subscript) and not _takes_rows(n.slice)
        ]
        in_parts |= {_owner(path) for part in parts if _is_weight(path := _path(part, me))}
        for node in nodes:
            if isinstance(node, ast.Subscript) and _gathers(node.slice):
                path = _path(_Reader(given).bare(node.value), me)
                if _is_weight(path):
                    found.setdefault(_owner(path), Reason.NOT_CONSTANT)
            for value, reason in _unserved(node, me, given):
                path = _path(value, me)
                if _is_weight(path):
                    found.setdefault(_owner(path), reason)
        for node in nodes:
            for path in _viewed(node, me, aliases):
                found.setdefault(_owner(path), Reason.UNKNOWN_VIEW)
    return dict.fromkeys(in_parts - called, Reason.NOT_CONSTANT) | found


@functools.lru_cache(maxsize=4096)
def stacks_in_a_loop(kind: type) -> frozenset[str]:
    """Names of parameters of a class that its ``forward`` takes apart for products: ``F.linear(x, self.name[i])``."""
    calls = [(node, me) for tree, me in _methods(kind) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    weights = [(call.args[1], me) for call, me in calls if _called(call) == "linear" and len(call.args) > 1]
    chosen = [_path(weight.value, me) for weight, me in weights if isinstance(weight, ast.Subscript)]
    return frozenset(name for name in chosen if name)


def _methods(kind: type) -> Iterator[tuple[ast.AST, str]]:
    """``forward`` and every method that it reaches through ``self``: the syntax tree of each, and what it calls ``self``."""
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        tree = None if name in seen else _tree(getattr(kind, name, None))
        seen.add(name)
        if tree is None or not tree.args.args:
            continue
        me = tree.args.args[0].arg
        yield tree, me
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        waiting += [path for call in calls if (path := _path(call, me)) and "." not in path]


def _tree(method: Any) -> Optional[ast.FunctionDef]:
    if not callable(method) or not inspect.isfunction(inspect.unwrap(method)):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    except (
        OSError,
        TypeError,
        SyntaxError,
        ValueError,
    ):  # defined in an interpreter, compiled, or cut out of its context
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _names_of_weights(tree: ast.AST, me: str) -> dict[str, ast.AST]:
    """Local names that stand for a child's weight all along, and what they were given."""
    given: dict[str, list[Optional[ast.AST]]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            given.setdefault(node.id, []).append(None)
        elif isinstance(node, ast.arg):
            given.setdefault(node.arg, []).append(None)
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(target, ast.Name) and _is_weight(_path(_bare(node.value), me)):  # type: ignore[attr-defined]
            given[target.id].append(node.value)  # type: ignore[attr-defined]
    return {name: values[1] for name, values in given.items() if len(values) == 2 and values[1] is not None}


def _aliases(tree: ast.AST, me: str) -> dict[str, set[str]]:
    """Local names that stand for a child's weight somewhere, maybe under a condition, and its dotted names."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if isinstance(target, ast.Name):
            value = node.value  # type: ignore[attr-defined]
            values = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            paths = {path for v in values if _is_weight(path := _path(_bare(v), me))}
            found.setdefault(target.id, set()).update(paths)
    return found


def _viewed(node: ast.AST, me: str, aliases: dict[str, set[str]]) -> Iterator[str]:
    """Dotted names of the weight that a call takes apart into more dimensions: ``weight.view(heads, -1, rank)``."""
    name = _called(node) if isinstance(node, ast.Call) else ""
    if name not in VIEWS or not isinstance(node.func, ast.Attribute):  # type: ignore[attr-defined]
        return
    values = list(node.args)  # type: ignore[attr-defined]
    owner = values.pop(0) if _of_torch(node.func) and values else node.func.value  # type: ignore[attr-defined]
    sizes = values[0].elts if len(values) == 1 and isinstance(values[0], (ast.Tuple, ast.List)) else values
    if len(sizes) < VIEWS[name]:
        return
    owner = _bare(owner)
    paths = aliases.get(owner.id, set()) if isinstance(owner, ast.Name) else {_path(owner, me)}
    yield from filter(_is_weight, paths)


def _unserved(node: ast.AST, me: str, given: dict[str, ast.AST]) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of one expression that cannot be quantized weights."""
    read = _Reader(given)
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.MatMult):
            yield read.bare(node.left), Reason.LEFT_OPERAND
            yield from read.untransposed(node.right, False)
        elif isinstance(node.op, (ast.Mult, ast.Add, ast.Sub, ast.Div)):
            yield from ((read.bare(value), Reason.NOT_CONSTANT) for value in (node.left, node.right))
    if not isinstance(node, ast.Call):
        return
    name, values = _called(node), [*node.args, *(keyword.value for keyword in node.keywords)]
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    of_weight = owner is not None and _is_weight(_path(read.bare(owner), me))  # self.layer.weight.matmul(x)
    operands = [owner, *node.args] if of_weight else node.args
    yield from _products(read, name, operands)
    factors = [keyword.value for keyword in node.keywords if keyword.arg in ("beta", "alpha")]
    if name == "addmm" and len(operands) > 2 and operands[2] is not None and not all(map(_is_one, factors)):
        yield read.bare(operands[2]), Reason.SCALED_ADDMM
    if name == ATTENTION:
        yield from ((read.bare(value), Reason.ONE_OPERATOR) for value in values)
    if name in JOINS:
        parts = [part for value in values if isinstance(value, (ast.List, ast.Tuple)) for part in value.elts]
        yield from ((read.bare(part), Reason.NOT_CONSTANT) for part in parts)
    for names, reason in ((COMPUTED, Reason.NOT_CONSTANT), (OTHER_FORMS, Reason.UNKNOWN_FORM)):
        if name in names and (of_weight or _of_torch(node.func)):
            yield from ((read.bare(value), reason) for value in ([owner] if of_weight else values) if value is not None)


def _products(read: _Reader, name: str, operands: Sequence[Any]) -> Iterator[tuple[ast.AST, Reason]]:
    """Operands of the product ``name`` that cannot be quantized weights."""
    if name in MATMULS and operands:
        yield read.bare(operands[0]), Reason.LEFT_OPERAND
    if name in VECTORS and len(operands) > VECTORS[name]:
        yield read.bare(operands[VECTORS[name]]), Reason.LEFT_OPERAND
    if name in ("matmul", "mm", "linear") and len(operands) > 1:
        yield from read.untransposed(operands[1], name == "linear")
    if name == "bmm" and len(operands) > 1:
        yield read.bare(operands[1]), Reason.UNKNOWN_FORM
    if name == "einsum" and len(operands) > 1:
        equation = operands[0].value if isinstance(operands[0], ast.Constant) else None
        for place, value in enumerate(operands[1:]):
            if len(operands) != 3 or einsum_linear(equation, place) != (not read.is_transposed(value)):
                yield read.bare(value), Reason.UNKNOWN_FORM


class _Reader:
    """Values without what is around them, and through the local names ``given`` to weights."""

    def __init__(self, given: dict[str, ast.AST]):
        self._given = given

    def bare(self, node: ast.AST) -> ast.AST:
        """A value without transposes, casts and choices of entries around it."""
        node = _bare(node)
        return _bare(self._given.get(node.id, node)) if isinstance(node, ast.Name) else node

    def is_transposed(self, node: ast.AST) -> bool:
        """Whether an odd number of transposes is around a value."""
        inner, count = _bare(node), _transposes(node)
        if isinstance(inner, ast.Name) and inner.id in self._given:
            count += _transposes(self._given[inner.id])
        return count % 2 == 1

    def untransposed(self, node: ast.AST, wanted: bool) -> Iterator[tuple[ast.AST, Reason]]:
        """The right operand of a product, if it is a weight as a layer keeps it, or (``wanted``) its transpose."""
        if self.is_transposed(node) is wanted:
            yield self.bare(node), Reason.UNKNOWN_FORM
        elif _is_stacked(node):
            yield self.bare(node), Reason.UNKNOWN_VIEW


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


def _transposes(node: ast.AST) -> int:
    """How many transposes are around a value."""
    count = 0
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _called(node) in _REARRANGE:
            count += _called(node) in ("t", "transpose", "permute")
            node = node.func.value
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "data")):
            count += isinstance(node, ast.Attribute) and node.attr in ("T", "mT")
            node = node.value
        else:
            return count


def _is_stacked(node: ast.AST) -> bool:
    """Whether a value got a dimension more: ``weight.t()[None]``, ``weight.unsqueeze(0)``."""
    while True:
        if isinstance(node, ast.Subscript):
            entries = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return any(isinstance(entry, ast.Constant) and entry.value is None for entry in entries)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _called(node) in _REARRANGE:
            if _called(node) == "unsqueeze":
                return True
            node = node.func.value
        elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "data"):
            node = node.value
        else:
            return False


def _of_torch(func: ast.AST) -> bool:
    """Whether a function is written as one of torch: ``torch.norm``, ``F.normalize``, ``torch.nn.functional.normalize``."""
    while isinstance(func, ast.Attribute):
        func = func.value
    return isinstance(func, ast.Name) and func.id in ("torch", "F", "nn", "functional", "aten")


def _called(call: ast.Call) -> str:
    """Last part of the name of the function that is called: ``index_select`` of ``aten.index_select.default`` too."""
    func = call.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Attribute) and _of_torch(func):
        above = func.value.value
        if (above.attr if isinstance(above, ast.Attribute) else getattr(above, "id", "")) == "aten":
            return func.value.attr
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _bare(node: ast.AST) -> ast.AST:
    """A value without transposes, casts and choices of entries around it."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _called(node) in _REARRANGE:
            node = node.func.value
        elif isinstance(node, ast.Subscript) or (isinstance(node, ast.Attribute) and node.attr in ("T", "mT", "data")):
            node = node.value
        else:
            return node


_REARRANGE = {
    "t",
    "transpose",
    "permute",
    "to",
    "float",
    "half",
    "bfloat16",
    "contiguous",
    "type_as",
    "unsqueeze",
    "detach",
}


def _is_weight(path: str) -> bool:
    """Whether a path is that of a weight: of a child, or the module's own."""
    return path == "weight" or path.endswith(".weight")


def _owner(path: str) -> str:
    """The module that has a weight: empty for the one that reads it."""
    return path.removesuffix("weight").removesuffix(".")


def _path(node: ast.AST, me: str) -> str:
    """``a.b`` of ``self.a.b``, where ``self`` is called ``me``; empty for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == me else ""
