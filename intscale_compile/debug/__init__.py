"""What the compiler did, afterwards: stages of a compilation, the way of one weight, logs, and finding what went wrong."""

from ..compile.recorder.compilation import Compilation, last_compilation
from ..compile.times import CompileTime, compile_times
from .bisection import Bisection
from .comparison import Comparison
from .knobs import write_compilation
from .logs import connect, log_compilation
from .trace import NodeTrace

__all__ = [
    "Bisection",
    "Comparison",
    "Compilation",
    "CompileTime",
    "NodeTrace",
    "compile_times",
    "last_compilation",
]

connect()


def report(compilation: Compilation) -> None:
    """Log a compilation and write what ``INTSCALE_DEBUG`` asks for."""
    log_compilation(compilation)
    write_compilation(compilation)
