"""What every jitted function has to look like for all Triton releases, read from the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import intscale_compile

PACKAGE = Path(intscale_compile.__file__).parent


def jitted_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text()
        if "jit" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield f"{path.stem}.{node.name}", node


def test_no_text_is_the_default_of_an_argument():
    # Triton 3.6 hands such a default to the function as a bare str, which it cannot pass on or compare.
    found, texts = set(), []
    for name, function in jitted_functions():
        found.add(name)
        defaults = [*function.args.defaults, *(d for d in function.args.kw_defaults if d is not None)]
        texts += [(name, d.value) for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, str)]
    assert not texts
    assert {
        "triton_gemm.w4a8_kernel",
        "gluon_cooperative.gemm_cooperative",
        "gluon_grouped.grouped_cooperative",
    } <= found
