"""The command ``intscale``: thin commands around ``intscale_compile.commands``.

A package of its own, since importing anything below ``intscale_compile`` imports torch: ``intscale --help`` does not, and
``intscale doctor`` also works where torch cannot be imported or has a version that intscale_compile refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn, Optional


def main(arguments: Optional[Sequence[str]] = None) -> NoReturn:
    """Run a command and exit: 0 fine, 1 the answer is no or the work failed, 2 wrong use.

    An error is one line on stderr; with ``INTSCALE_DEBUG`` set, the traceback comes before it.
    """
    try:
        # Slow to import: commands that need it not begin at once.
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        print(f"intscale: {error.name} is not installed: pip install 'intscale-compile[cli]'", file=sys.stderr)
        sys.exit(2)
    # Slow to import: commands that need it not begin at once.
    from .errors import report

    try:
        code = app(None if arguments is None else list(arguments), prog_name="intscale", standalone_mode=False)
    except Exception as error:  # the one place where errors become lines
        code = report(error)
    sys.exit(code if isinstance(code, int) else 0)
