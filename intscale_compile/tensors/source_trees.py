"""Syntax trees of what a module's ``forward`` runs, names replaced by the part of the module that they stand for.

``forward``, methods and properties of the module that it names, those of a base class behind ``super()``, and functions and
lambdas anywhere that are given the module, one of its layers or one of their weights. In the trees the module is called ``ME``:
a function that was called with ``self.proj.weight`` reads ``ME.proj.weight[index]`` where it says ``weight[index]``.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch

from .source_expressions import ME, bare, is_weight, path_of, rearranged

MOST = 400  # trees of one class
TORCH = ("torch", "operator", "_operator")  # modules with products and other arithmetic
GETTERS = {"get_submodule", "get_parameter", "get_buffer"}
TABLES = {"_modules", "_parameters", "_buffers"}
ITERATED = {"values", "children"}


class Read(NamedTuple):
    """A function and what its names stand for: it is read as ``tree``, names of its module are those of ``function``."""

    tree: ast.AST
    function: Any
    bound: dict[str, ast.AST]


@functools.lru_cache(maxsize=64)
def trees_of(kind: type, start: Any) -> tuple[ast.AST, ...]:
    """The tree of a method of a class and those of everything that it reaches; nothing where there is no source.

    Args:
        kind: the class.
        start: the method's name, or a function that an instance has in its place and that takes the module first.
    """
    waiting = [_method(kind, start, None, []) if isinstance(start, str) else _of_module(start)]
    seen: dict[tuple, Read] = {}
    trees: list[ast.AST] = []
    while waiting and len(seen) < MOST:
        read = waiting.pop()
        if read is None:
            continue
        key = (id(read.tree), *((name, ast.dump(value)) for name, value in sorted(read.bound.items())))
        if key in seen:
            continue
        seen[key] = read
        trees.append(_replaced(read))
        waiting += _reached(kind, read, trees[-1])
    return tuple(trees)


def _reached(kind: type, read: Read, tree: ast.AST) -> Iterator[Optional[Read]]:
    """What a tree calls, or names to have it called: methods, functions, lambdas and functions of its own."""
    nodes = list(ast.walk(tree))
    local: dict[str, Any] = {
        node.name: node for node in nodes if isinstance(node, ast.FunctionDef) and node is not tree
    }
    lambdas = [node for node in nodes if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda)]
    local |= {t.id: node.value for node in lambdas for t in node.targets if isinstance(t, ast.Name)}
    paths = {path_of(node) for node in nodes if isinstance(node, ast.Attribute)}
    yield from (_method(kind, path, None, []) for path in paths if path and "." not in path)
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        is_super = isinstance(node.func, ast.Attribute) and _is_super(node.func.value)
        name = node.func.attr if is_super else path_of(node.func)  # type: ignore[attr-defined]
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if is_super or (name and "." not in name):
            yield _method(kind, name, read.function if is_super else None, [node])
        elif any(map(_leads_here, values)):
            yield _function(node, read, local)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _leads_here(node: ast.AST) -> bool:
    """Whether an argument is the module, a part of it, or a weight that is rearranged at most."""
    node = bare(node)
    return (isinstance(node, ast.Name) and node.id == ME) or bool(path_of(node, through_entries=True))


def _method(kind: type, name: str, above: Any, calls: list[ast.Call]) -> Optional[Read]:
    """A method or property of a class as it is called; with ``above`` that of the class behind the one that defines it."""
    classes = list(kind.__mro__)
    if above is not None:
        places = [i for i, c in enumerate(classes) if any(_plain(value) is above for value in vars(c).values())]
        classes = classes[places[0] + 1 :] if places else []
    found = next((vars(c)[name] for c in classes if name in vars(c)), None)
    function = _plain(found)
    if getattr(function, "__module__", "") == torch.nn.Module.__module__:
        return None
    tree = _tree(function)
    if tree is None:
        return None
    is_static = isinstance(found, staticmethod)
    names = [arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args)]
    bound = _arguments(tree.args, calls[0], 0 if is_static else 1) if calls else {}
    if names and not isinstance(found, (staticmethod, classmethod)):
        bound[names[0]] = ast.Name(ME, ast.Load())
    return Read(tree, function, bound)


def _of_module(function: Any) -> Optional[Read]:
    tree = _tree(function)
    names = [] if tree is None else [arg.arg for arg in (*tree.args.posonlyargs, *tree.args.args)]
    return Read(tree, function, {names[0]: ast.Name(ME, ast.Load())}) if names else None


def own_method(module: torch.nn.Module, name: str) -> Any:
    """The function behind a method that an instance has in the place of its class's, wrapped or not; None: it has none."""
    value = vars(module).get(name)
    bound = inspect.unwrap(value) if callable(value) else None
    return getattr(bound, "__func__", None) if getattr(bound, "__self__", None) is module else None


def _plain(value: Any) -> Any:
    """The function of a method, a static method, a property or one that a decorator wraps."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.unwrap(value) if callable(value) else value


def _function(call: ast.Call, read: Read, local: dict[str, Any]) -> Optional[Read]:
    """A function that is none of the module's own, as it is called."""
    if isinstance(call.func, ast.Lambda):
        return Read(call.func, read.function, _arguments(call.func.args, call, 0))
    if isinstance(call.func, ast.Name) and call.func.id in local:
        tree = local[call.func.id]
        return Read(tree, read.function, _arguments(tree.args, call, 0))
    value, skipped = _value(call.func, read.function), 0
    owner = getattr(value, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and value.__name__ == "apply":
        own = [c for c in owner.__mro__ if c.__module__.partition(".")[0] != "torch"]
        value, skipped = owner.forward, 0 if any("setup_context" in vars(c) for c in own) else 1
    elif isinstance(owner, type):
        skipped = 1
    function = _plain(value)
    if getattr(function, "__module__", None) is None or function.__module__.partition(".")[0] == "torch":
        return None
    tree = _tree(function)
    return None if tree is None else Read(tree, function, _arguments(tree.args, call, skipped))


def _value(node: ast.AST, function: Any) -> Any:
    """What a dotted name of modules and classes means where a function was defined; None where that is not known."""
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, function)
        known = inspect.ismodule(owner) or isinstance(owner, (type, type(torch.ops.aten), torch._ops.OpOverloadPacket))
        return getattr(owner, node.attr, None) if known else None
    if not isinstance(node, ast.Name):
        return None
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if node.id in names:
        try:
            return function.__closure__[names.index(node.id)].cell_contents
        except ValueError:  # not set yet
            return None
    return getattr(function, "__globals__", {}).get(node.id)


def _arguments(parameters: ast.arguments, call: ast.Call, skipped: int) -> dict[str, ast.AST]:
    """The parameters of a call that stand for a part of the module, with the part."""
    names = [arg.arg for arg in (*parameters.posonlyargs, *parameters.args)][skipped:]
    values: list[ast.AST] = []
    for value in call.args:
        if isinstance(value, ast.Starred):
            break
        values.append(value)
    given = [*zip(names, values), *((keyword.arg, keyword.value) for keyword in call.keywords if keyword.arg)]
    return {name: value for name, value in given if _leads_here(value)}


def _tree(function: Any) -> Any:
    """The tree of a function or a lambda, or None."""
    if not inspect.isfunction(function):
        return None
    known = _TREES.get(function.__code__)
    if known is None:
        known = _TREES[function.__code__] = _parsed(function) or ast.Pass()
    return None if isinstance(known, ast.Pass) else known


_TREES: dict[Any, ast.AST] = {}  # by code


def _parsed(function: Any) -> Optional[ast.AST]:
    try:
        text = textwrap.dedent(inspect.getsource(function))
        (tree,) = ast.parse(text).body
    except (
        OSError,
        TypeError,
        SyntaxError,
        ValueError,
    ):  # defined in an interpreter, compiled, or cut out of its context
        return None
    tree = _Torch(function).visit(tree)
    if isinstance(tree, ast.FunctionDef):
        return tree
    lambdas = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
    return lambdas[0] if len(lambdas) == 1 and function.__name__ == "<lambda>" else None


# --- names ---------------------------------------------------------------------------------------------------------------


def _replaced(read: Read) -> ast.AST:
    """A copy of a tree in which names stand for parts of the module: parameters, names given once, and what loops go over."""
    tree = _copied(read.tree)
    nodes = list(ast.walk(tree))
    same = {id(target) for node in nodes for target in _kept(node)}
    stored = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in same]
    stores = Counter(stored)
    names = {name: value for name, value in read.bound.items() if name not in stores}
    changed = [ast.Assign([ast.Name(n, ast.Store())], _copied(v)) for n, v in read.bound.items() if n in stores]
    if isinstance(tree, ast.FunctionDef):
        tree.body = [*changed, *tree.body]
    done = {node.arg for node in nodes if isinstance(node, ast.arg)} | set(names)
    while True:
        tree = _Names(names).visit(tree)
        names = {name: value for name, value in _given(tree) if stores.get(name) == 1 and name not in done}
        done |= set(names)
        if not names:
            return tree


def _copied(node: Any) -> Any:
    """A copy of a tree; copy.deepcopy takes ten times as long."""
    if isinstance(node, list):
        return [_copied(part) for part in node]
    if not isinstance(node, ast.AST):
        return node
    return type(node)(**{name: _copied(value) for name, value in vars(node).items() if name in node._fields})


def _kept(node: ast.AST) -> Iterator[ast.AST]:
    """The name that an assignment leaves what it was: ``weight = weight.to(x.dtype)``."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        value = rearranged(node.value)
        is_same = isinstance(value.inner, ast.Name) and value.inner.id == node.targets[0].id
        if is_same and not (value.transposed or value.stacked or value.cut):
            yield node.targets[0]


def _given(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Names and the parts of the module that they are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            pairs = [(node.targets[0], node.value)]
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(node.targets[0].elts, node.value.elts))
            yield from ((t.id, v) for t, v in pairs if isinstance(t, ast.Name) and _leads_here(v))
        elif isinstance(node, ast.NamedExpr) and _leads_here(node.value):
            yield node.target.id, node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            yield from ((t.id, v) for t, v in _looped(node.target, node.iter) if isinstance(t, ast.Name))


def _looped(target: ast.AST, over: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Names of a loop and what they stand for: any entry of a list of modules."""
    targets = target.elts if isinstance(target, ast.Tuple) else []
    over = over.value if isinstance(over, ast.Subscript) and isinstance(over.slice, ast.Slice) else over
    if isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id in ("enumerate", "zip"):
        places = targets[1:] if over.func.id == "enumerate" else targets
        for place, value in zip(places, over.args):
            yield from _looped(place, value)
    elif isinstance(over, ast.Call) and isinstance(over.func, ast.Attribute) and not over.args:
        if over.func.attr == "items" and len(targets) == 2:
            yield from _looped(targets[1], over.func.value)
        elif over.func.attr in ITERATED:
            yield from _looped(target, over.func.value)
    elif (path := path_of(over, through_entries=True)) and not is_weight(path):
        yield target, ast.Subscript(over, ast.Name("*", ast.Load()), ast.Load())  # type: ignore[arg-type]


class _Torch(ast.NodeTransformer):
    """Writes names of torch's modules and functions as ``torch`` and ``torch.name``, and operators as ``aten.name``."""

    def __init__(self, function: Any):
        self._function = function

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = _value(node, self._function) if isinstance(node.ctx, ast.Load) else None
        if value is torch.ops.aten:
            return ast.Name("aten", ast.Load())
        if value is torch.Tensor:
            return ast.Attribute(ast.Name("torch", ast.Load()), "Tensor", ast.Load())
        if inspect.ismodule(value) and value.__name__.partition(".")[0] in TORCH:
            return ast.Name("torch", ast.Load())
        if isinstance(value, torch._ops.OpOverloadPacket):
            return ast.Attribute(ast.Name("aten", ast.Load()), value.__name__, ast.Load())
        name = getattr(value, "__name__", None)
        if inspect.isroutine(value) and name and str(getattr(value, "__module__", "")).partition(".")[0] in TORCH:
            return ast.Attribute(ast.Name("torch", ast.Load()), name, ast.Load())
        return node


class _Names(ast.NodeTransformer):
    """Puts expressions in the place of names, and writes ``getattr(value, "name")`` and the like as ``value.name``."""

    def __init__(self, names: dict[str, ast.AST]):
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if isinstance(node.ctx, ast.Load) and node.id in self._names:
            return _copied(self._names[node.id])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.args[-1].value if node.args and isinstance(node.args[-1], ast.Constant) else None
        if (
            isinstance(name, str)
            and isinstance(node.func, ast.Name)
            and node.func.id == "getattr"
            and len(node.args) == 2
        ):
            return ast.Attribute(node.args[0], name, ast.Load())
        if isinstance(name, str) and isinstance(node.func, ast.Attribute) and node.func.attr in GETTERS:
            return functools.reduce(
                lambda value, part: ast.Attribute(value, part, ast.Load()), name.split("."), node.func.value
            )
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        name = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if isinstance(name, str) and isinstance(node.value, ast.Attribute) and node.value.attr in TABLES:
            return ast.Attribute(node.value.value, name, ast.Load())
        return node
