"""Run kernels that Inductor generated in Triton's interpreter.

Standard input is a JSON list of requests (``generate_case`` in ``test_inductor_codegen``); the last line of the output
is a list of one error text, or null, for each.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import traceback
from pathlib import Path

from tests.support.interpreter import interpret

interpret()

import torch  # noqa: E402

from tests.support.fake_cuda import load_kernel  # noqa: E402
from tests.support.weights import make_problem  # noqa: E402


def constant(source: str, name: str) -> int:
    """Value of a ``NAME : tl.constexpr = value`` line of the template."""
    return int(re.search(rf"{name} : tl.constexpr = (\d+)", source).group(1))


def check(request: dict) -> None:
    """Launch the kernel on CPU tensors, arguments matched by name, and compare with the reference."""
    source, name = request["source"], request["name"]
    problem = make_problem(**request["problem"], seed=3)
    m, n = problem.accumulator.shape
    residual = torch.randn(m, n)
    integer = request["op"] == "accumulate"
    expected = (problem.accumulator + 1).to(torch.int32) if integer else residual + problem.linear()
    out = torch.empty_like(expected)
    values = dict(arg_XQ=problem.xq, arg_QDATA=problem.qdata, arg_SCALE=problem.scale, arg_BIAS=problem.bias)
    values.update(arg_TOKEN_SCALE=problem.token_scale, arg_ROW_SCALE=problem.row_scale)
    values.update(arg_ZERO_POINT=problem.zero_point)
    arguments = []
    for parameter in re.search(rf"def {name}\(([^)]*)\)", source).group(1).split(", "):
        if parameter in values:
            arguments.append(values[parameter])
        elif parameter.startswith("out_ptr"):
            arguments.append(out)
        else:
            arguments.append(residual if parameter.startswith("in_ptr") else m)
    with tempfile.TemporaryDirectory() as directory:
        function, _ = load_kernel(name, source, Path(directory))
        block_m, block_n = constant(source, "BLOCK_M"), constant(source, "BLOCK_N")
        function[(-(-m // block_m) * -(-n // block_n),)](*arguments)
    if integer:
        assert torch.equal(out, expected), "the int32 accumulator differs"
    else:
        torch.testing.assert_close(out, expected, rtol=2.0**-22, atol=2.0**-21)


def main() -> None:
    errors = []
    for request in json.load(sys.stdin):
        try:
            check(request)
            errors.append(None)
        except Exception:
            errors.append(traceback.format_exc())
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
