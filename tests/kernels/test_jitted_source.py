"""What every jitted function has to look like for all Triton releases, read from the sources."""

import ast
from pathlib import Path

import pytest

import intscale_compile

PACKAGE = Path(intscale_compile.__file__).parent


def jitted_functions():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield pytest.param(node, id=f"{path.stem}.{node.name}")


@pytest.mark.parametrize("function", list(jitted_functions()))
def test_no_text_is_the_default_of_an_argument(function):
    # Triton 3.6 hands such a default to the function as a bare str, which it cannot pass on or compare.
    defaults = [*function.args.defaults, *(d for d in function.args.kw_defaults if d is not None)]
    assert not [ast.unparse(d) for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, str)]
