"""Cases that run in Triton's interpreter: a process runs them and prints one line of JSON each, a test reads the lines.

The process is its own because ``TRITON_INTERPRET`` is read when triton is imported; import this module there first.
A fast run has one shape for each path through a kernel, those whose names match the script's ``QUICK``; the slow tests run all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Optional

import pytest

from tests.support import forks


def interpret() -> None:
    """Switch the interpreter on; before triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    _quicken()


def _quicken() -> None:
    """Leave out what the interpreter repeats, or computes for nothing: two thirds of its time.

    For each call of a function in a kernel it looks at all members of ``triton.language`` for what it has to exchange, which it
    has done since the first call of the same launch; it builds the table of numpy's types for each value; it does each
    integer operation once more in 64 bits, for assertions about overflow that only debugging switches on; and it reduces with a
    function of ours element by element, where a whole row can be combined with the next.
    """
    import numpy as np
    from triton.runtime import interpreter  # after TRITON_INTERPRET

    if getattr(interpreter, "_quickened", False):
        return
    language, exchange, numpy_type = interpreter.tl, interpreter._patch_lang, interpreter._get_np_dtype
    visible: dict[int, frozenset] = {}  # by a function's globals, which modules of the language they name
    exchanged: set[frozenset] = set()  # since the launch
    types: dict[str, object] = {}

    def launched(function):
        exchanged.clear()
        return exchange(function)

    def called(self, *arguments, **options):
        known = self.fn.__globals__
        if id(known) not in visible:
            visible[id(known)] = frozenset(
                name for name, module in (("tl", language), ("core", language.core))
                if any(value is module for value in known.values())
            )  # fmt: skip
        if visible[id(known)] not in exchanged:
            exchange(self.fn)
            exchanged.add(visible[id(known)])
        function = self.rewrite()
        try:
            return function(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    def kept_type(of):
        element = of.element_ty if isinstance(of, language.block_type) else of
        name = "pointer" if isinstance(element, language.pointer_type) else element.name
        if name not in types:
            types[name] = numpy_type(of)
        return types[name]

    element_by_element = interpreter.ReduceOps.generic_reduce

    def reduced(self, inputs):
        if self.axis is None or inputs[0].handle.data.ndim < 2:
            return element_by_element(self, inputs)
        rows = zip(*(np.moveaxis(one.handle.data, self.axis, 0) for one in inputs))
        found, *others = ([self.to_tensor(row, one.dtype) for row, one in zip(some, inputs)] for some in rows)
        for row in others:
            combined = self.combine_fn.fn(*found, *row)
            found = combined if isinstance(combined, tuple) else (combined,)
        data = [one.handle.data for one in found]
        data = [np.expand_dims(one, self.axis) for one in data] if self.keep_dims else data
        return [self.to_tensor(one, given.dtype) for one, given in zip(data, inputs)]

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang, interpreter._get_np_dtype = launched, kept_type
    interpreter.InterpretedFunction.__call__ = called
    interpreter.ReduceOps.generic_reduce = reduced
    interpreter._quickened = True


def prepare(*modules: ModuleType) -> None:
    """Rewrite the jitted functions that the modules see, as the interpreter does at their first call: once for all forks."""
    from triton.runtime.interpreter import InterpretedFunction  # after TRITON_INTERPRET

    for function in [value for module in modules for value in vars(module).values()]:  # they get names by it
        if isinstance(function, InterpretedFunction):
            function.rewrite()


def thorough() -> bool:
    """Whether all cases run, not only the quick ones."""
    return "--all" in sys.argv


def run_cases(cases: Iterable[tuple[str, Callable[[], None]]], quick: str = "") -> int:
    """Run the cases and print ``{"case": ..., "error": null | text}`` for each; 1 if one failed.

    Without ``--all`` on the command line only those whose names begin as the regular expression ``quick`` says.
    """
    failures = 0
    for name, check in cases:
        if not thorough() and not re.match(quick, name):
            continue
        try:
            check()
            error = None
        except Exception:
            error = traceback.format_exc()
            failures += 1
        print(json.dumps({"case": name, "error": error}), flush=True)
    return int(failures != 0)


EXTENTS = ["quick", pytest.param("all", marks=pytest.mark.slow)]  # of a fixture that calls ``results_of``


def results_of(module: str, package: str = "tests.kernels", extent: str = "quick") -> dict[str, Optional[str]]:
    """Error of every case of ``<package>.<module>``, or None, by name."""
    arguments = ["--all"] if extent == "all" else []
    done = forks.run("interpreter", f"{package}.{module}", *arguments, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines and done.returncode in (0, 1), done.stderr
    return {line["case"]: line["error"] for line in lines}


def assert_passed(results: dict[str, str | None], prefix: str) -> None:
    """All cases whose names begin with ``prefix`` passed, and there are some."""
    chosen = {name: error for name, error in results.items() if name.startswith(prefix)}
    assert chosen, f"no case named {prefix}*: {sorted(results)}"
    failed = {name: error for name, error in chosen.items() if error is not None}
    first = next(iter(failed.values()), None)
    assert not failed, f"{len(failed)} of {len(chosen)} cases: {sorted(failed)}; the first:\n{first}"
