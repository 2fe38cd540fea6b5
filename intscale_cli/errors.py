"""Errors as one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

WRONG_USE = ("ConfigError", "InputError", "VersionError")
LONGEST = 600


def debugging() -> bool:
    """Whether ``INTSCALE_DEBUG`` asks for tracebacks and for what the libraries below log."""
    return os.environ.get("INTSCALE_DEBUG", "0") not in ("", "0")


def report(error: Exception) -> int:
    """Say an error in one line on stderr, after its traceback where ``INTSCALE_DEBUG`` is set; returns the exit code."""
    if debugging():
        traceback.print_exception(error)
    text, code = describe(error)
    print(text, file=sys.stderr)
    return code


def describe(error: Exception) -> tuple[str, int]:
    """The line for an error and the exit code: 2 where the user can mend the command, else 1."""
    if callable(getattr(error, "format_message", None)):  # typer's own: unknown options, missing arguments
        command = getattr(getattr(error, "ctx", None), "command_path", None) or "intscale"
        return f"{command}: {_line(error.format_message())} See '{command} --help'.", 2  # type: ignore[attr-defined]
    names = [kind.__name__ for kind in type(error).__mro__]
    if "IntScaleError" in names:
        return f"intscale: {_line(str(error))}", 2 if any(name in WRONG_USE for name in names) else 1
    if "OutOfMemoryError" in names:
        return "intscale: the GPU has too little free memory: free some, or use --device cpu.", 1
    if isinstance(error, OSError):
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"intscale: {_line(where)}: check the path and its permissions.", 2
    text = f"intscale: {type(error).__name__}: {_line(str(error))}"
    return (
        f"{text} This is a bug or a broken installation: see intscale doctor, and INTSCALE_DEBUG=1 for the traceback.",
        1,
    )


def _line(text: str) -> str:
    """Text on one line, its end left out where it is very long."""
    words = " ".join(text.split())
    return words if len(words) <= LONGEST else words[: LONGEST - 3] + "..."
