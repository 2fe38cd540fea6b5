"""A recorded graph as a Python module that runs by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from .stages import InputRecord, Read, Step

_RELEASE = re.compile(r";  (?:\w+ = )+None(?=\s|$)")  # fx lets go of values where they are read last
_HEAD = re.compile(r"^def forward\(self(?:, )?")
_ASSIGNED = re.compile(r"\s+(\w+) = ")


def rebuild(steps: Sequence[Step]) -> fx.Graph:
    """The recorded graph as a ``torch.fx`` graph, without metadata."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def restored(value: Any) -> Any:
        return nodes[value.name] if isinstance(value, Read) else value

    for step in steps:
        args, kwargs = fx.node.map_aggregate((step.args, dict(step.kwargs)), restored)
        node = graph.create_node(step.op, step.target, args, kwargs, name=step.name)
        node.name = step.name
        nodes[step.name] = node
    return graph


def function_lines(steps: Sequence[Step], name: str = "forward") -> tuple[list[str], dict[str, Any]]:
    """Lines of ``def name(...)`` with the value of each as a comment, and the globals that they need."""
    code = rebuild(steps).python_code(f"{name}_constants")
    values = {step.name: step.value for step in steps}
    lines = []
    for line in code.src.strip().split("\n"):
        line = _RELEASE.sub("", _HEAD.sub(f"def {name}(", line))
        assigned = _ASSIGNED.match(line)
        value = values.get(assigned.group(1)) if assigned else None
        if line.strip():
            lines.append(f"{line}  # {value}" if value else line)
    return lines, dict(code.globals)


def statement(step: Step, lines: Mapping[str, str]) -> str:
    """The line of one node, or the description of an input."""
    return lines.get(step.name) or f"{step.name}: {step.op} {step.target}  # {step.value}"


def statements(steps: Sequence[Step]) -> dict[str, str]:
    """One line of Python for each of some nodes of a graph, by name; for an input a description."""
    known = {step.name for step in steps}
    outside = dict.fromkeys(name for step in steps for name in step.reads if name not in known)
    graph = [*(Step(name, "placeholder", name, (), {}, "", "") for name in outside), *steps]
    found = {s.name: f"{s.name}: input, {s.value or 'number'}" for s in steps if s.op == "placeholder"}
    for line in function_lines(graph)[0]:
        assigned = _ASSIGNED.match(line)
        name = assigned.group(1) if assigned else ("output" if line.strip().startswith("return") else "")
        if name in known and name not in found:
            found[name] = line.strip()
    return found


def module_text(title: str, steps: Sequence[Step], inputs: Mapping[str, InputRecord]) -> str:
    """A Python module: ``forward`` of the graph, ``example_inputs`` of the right shapes, and a call of the one on the other.

    Args:
        title: first line of its docstring.
        steps: the graph.
        inputs: what its placeholders and constants take.
    """
    names: dict[str, Any] = {}
    function = _function("forward", steps, inputs, names)
    placeholders = [step for step in steps if step.op == "placeholder"]
    used = set(re.findall(r"\w+", "\n".join(function)))
    names = {name: value for name, value in names.items() if name.partition(".")[0] in used}
    imports = set(_format_import_block(names, sys_importer).split("\n")) - {""} if names else set()
    return "\n".join(
        [
            f'"""{title}',
            "",
            "Inputs of forward, in order:",
            *(f"    {s.name}: {s.value or 'number'}; {inputs[s.name].meaning}" for s in placeholders),
            '"""',
            "",
            *sorted(
                imports | {"import torch", "import intscale_compile  # registers torch.ops.intscale"}, key=_by_kind
            ),
            *function,
            "",
            "",
            "def example_inputs():",
            '    """Values of the right shapes and dtypes; not those of the model."""',
            "    return [",
            *(f"        {inputs[s.name].example},  # {s.name}" for s in placeholders),
            "    ]",
            "",
            "",
            'if __name__ == "__main__":',
            "    with torch.no_grad():",
            "        print(forward(*example_inputs()))",
            "",
        ]
    )


def _function(name: str, steps: Sequence[Step], inputs: Mapping[str, InputRecord], names: dict[str, Any]) -> list[str]:
    """Lines that define a graph as a function, after its constants and the graphs that it calls; adds to ``names``."""
    lines, needed = function_lines(steps, name)
    names.update(needed)
    before: list[str] = []
    attributes = []
    for step in steps:
        if step.op != "get_attr" or step.name not in inputs:
            continue
        record, attribute = inputs[step.name], str(step.target).replace(".", "_")
        if record.steps:
            inner = f"{name}_{attribute}"
            before += _function(inner, record.steps, record.inputs, names)
        expression = f"torch.fx.symbolic_trace({inner})" if record.steps else record.example
        attributes.append(f"    {attribute} = {expression}")
    if attributes:
        note = '    """Attributes of the graph; of large tensors only shape and dtype are right."""'
        before += ["", "", f"class {name}_constants:", note, "", *attributes]
    return [*before, "", "", *lines]


def _by_kind(line: str) -> tuple[bool, str]:
    return not line.startswith(("import ", "from ")), line
