"""``TORCH_LOGS=intscale``, ``+intscale`` and ``intscale_graphs``, and artifacts for tlparse.

torch reads ``TORCH_LOGS`` while it is imported, before anything of ours, and refuses names that it does not know. It
accepts names of importable modules without importing them where they are single files (torch 2.11 and 2.13): that is all
that ``intscale.py`` and ``intscale_graphs.py`` are there for. torch then sets levels and handlers of the loggers of these
names.
"""

from __future__ import annotations

import functools
import logging

from torch._logging import trace_structured

from ..compile.recorder.compilation import Compilation, Stage

log = logging.getLogger("intscale_compile")
GRAPHS = logging.getLogger("intscale_graphs")


def connect() -> None:
    """Make ``intscale`` the parent of the package's logger: what torch sets for the one holds for the other."""
    log.parent = logging.getLogger("intscale")
    log.setLevel(log.level)  # forgets which levels were asked for before


def log_compilation(compilation: Compilation) -> None:
    """Say what the passes did, as far as somebody listens."""
    if log.isEnabledFor(logging.DEBUG):
        for name, count in compilation.pass_counts.items():
            log.debug(
                "graph %d: pass %s: %d in %.4f s", compilation.number, name, count, compilation.pass_seconds[name]
            )
        for product in compilation.products:
            log.debug("graph %d: %s: %s", compilation.number, product.name, product.reason or "quantized")
        for line in compilation.collective_lines():
            log.debug("graph %d: %s", compilation.number, line.strip())
    shown = GRAPHS.level != logging.NOTSET and GRAPHS.isEnabledFor(logging.INFO)  # never by the level of all loggers
    for stage in compilation.stages:
        if stage.changed or stage.name == "dynamo":
            if shown:
                GRAPHS.info("graph %d after %s:\n%s", compilation.number, stage.name, stage.code)
            trace_structured(
                "artifact",
                metadata_fn=functools.partial(_artifact, compilation, stage),
                payload_fn=functools.partial(getattr, stage, "code"),
            )


def _artifact(compilation: Compilation, stage: Stage) -> dict[str, str]:
    return {"name": f"intscale_{compilation.number}_{stage.name}", "encoding": "string"}
