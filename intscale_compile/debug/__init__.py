"""What the compiler did, afterwards: stages of a compilation, the way of one weight, logs, and finding what went wrong."""

from ..compile.recorder.compilation import FINAL, Compilation, generated_files, last_compilation, remember
from ..compile.recorder.stages import StageRecorder
from .bisection import Bisection, bisect
from .comparison import Comparison, compare
from .knobs import debug_patches, write_compilation
from .logs import connect, log_compilation
from .trace import NodeTrace, trace_node

__all__ = [
    "FINAL",
    "Bisection",
    "Comparison",
    "Compilation",
    "NodeTrace",
    "StageRecorder",
    "bisect",
    "compare",
    "debug_patches",
    "generated_files",
    "last_compilation",
    "remember",
    "report",
    "trace_node",
]

connect()


def report(compilation: Compilation) -> None:
    """Log a compilation and write what ``INTSCALE_DEBUG`` asks for."""
    log_compilation(compilation)
    write_compilation(compilation)
