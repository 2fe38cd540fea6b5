"""Write docs/api.md: every public name of the package, with what its docstring begins with. ``python docs/make_api.py``."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
MODULES = (  # each lists its public names in __all__
    "intscale_compile",
    "intscale_compile.calibration",
    "intscale_compile.communication",
    "intscale_compile.debug",
    "intscale_compile.errors",
    "intscale_compile.explanation",
    "intscale_compile.importing",
    "intscale_compile.learning",
    "intscale_compile.lora",
    "intscale_compile.passes",
    "intscale_compile.reasons",
    "intscale_compile.integer_only",
    "intscale_compile.kv_cache",
    "intscale_compile.tensor_parallel",
)
HEAD = """# Public names

Functions that do something to a model are at the top of the package, errors in `errors`, and
results in the module of what returns them. Each name is documented at one place. What is not listed here may change at any time.
`backend="intscale"` of `torch.compile` and its options are in [configuration](configuration.md).

`python docs/make_api.py` writes this page from the docstrings.
"""


def public() -> dict[str, list[str]]:
    """Public names by module, sorted."""
    return {module: sorted(importlib.import_module(module).__all__) for module in MODULES}


def summary(value: Any) -> str:
    """The first paragraph of a docstring as one line; of a dictionary its keys."""
    if isinstance(value, dict):
        return "A dictionary by name: " + ", ".join(f"`{name}`" for name in value) + "."
    text = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`([^`]*)`", r"`\1`", text.replace("``", "`"))
    return text.replace("|", r"\|")


def page() -> str:
    """The page as text."""
    parts = [HEAD]
    for module, names in public().items():
        found = importlib.import_module(module)
        rows = [f"| `{name}` | {summary(getattr(found, name))} |" for name in names]
        parts.append("\n".join([f"## {module}\n", "| name | |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
