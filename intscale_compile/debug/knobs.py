"""``INTSCALE_DEBUG``: one number that says how much of each compilation is written into a folder.

| | |
|---|---|
| 1 | a summary of each graph, also on stderr |
| 2 | counts and seconds of each pass, and what became of each product |
| 3 | the graph after each pass that changed it, as Python that runs and as SVG |
| 4 | what Inductor generated; PTX and SASS of every Triton kernel. Inductor's caches are off, so that it is generated |

``INTSCALE_DEBUG_DIR`` is the folder, by default ``intscale_debug/<process id>`` below the working directory. Both are read
at each compilation.
"""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..compile.recorder.compilation import Compilation, KernelSource
from ..errors import CompileError, ConfigError
from ..reasons import log_once
from .svg import draw

LEVEL, FOLDER = "INTSCALE_DEBUG", "INTSCALE_DEBUG_DIR"
SUMMARY, PASSES, GRAPHS, KERNELS = 1, 2, 3, 4


def debug_level() -> int:
    """The level that ``INTSCALE_DEBUG`` asks for, 0 where it is not set.

    Raises:
        ConfigError: it is not a number from 0 to 4.
    """
    text = os.environ.get(LEVEL, "").strip()
    if text not in ("", "0", "1", "2", "3", "4"):
        raise ConfigError(
            f"{LEVEL}={text!r} is not a level: use 1 (summary), 2 (passes), 3 (graphs), 4 (kernels) or 0 (off)."
        )
    return int(text or 0)


def debug_folder() -> Path:
    """Where debug output goes."""
    return Path(os.environ.get(FOLDER) or Path("intscale_debug") / str(os.getpid()))


def debug_patches() -> dict[str, Any]:
    """Options of Inductor for the debug level; from level 4 on, Triton kernels compiled from here on are written too."""
    if debug_level() < KERNELS:
        return {}
    _listen_to_triton()
    return {"fx_graph_cache": False, "compile_threads": 1}


def write_compilation(compilation: Compilation) -> None:
    """Write what ``INTSCALE_DEBUG`` asks for. A folder that cannot be written to is a warning: the model runs without it."""
    level = debug_level()
    if level < SUMMARY:
        return
    print(f"intscale: {_head(compilation)} -> {debug_folder()}", file=sys.stderr, flush=True)
    try:
        folder = debug_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "summary.txt", "a") as summary:
            summary.write(f"{compilation}\n")
        part = folder / f"graph_{compilation.number:03d}"
        if level >= PASSES:
            part.mkdir(exist_ok=True)
            (part / "passes.txt").write_text(_passes(compilation))
        if level >= GRAPHS:
            _write_graphs(compilation, part)
        if level >= KERNELS:
            _write_kernels(compilation.kernels, part / "kernels")
    except OSError as error:
        log_once(logging.WARNING, f"{FOLDER}: debug output cannot be written ({error}): name another folder.")


def _head(compilation: Compilation) -> str:
    return str(compilation).partition("\n")[0]


def _passes(compilation: Compilation) -> str:
    lines = [f"{'pass':20} {'count':>6} {'seconds':>9}"]
    for name, count in compilation.pass_counts.items():
        lines.append(f"{name:20} {count:6} {compilation.pass_seconds[name]:9.4f}")
    lines += ["", *(f"{p.name}: {p.reason or 'quantized'}" for p in compilation.products)]
    lines += [*(line.strip() for line in compilation.collective_lines()), ""]
    return "\n".join(lines)


def _write_graphs(compilation: Compilation, folder: Path) -> None:
    for i, stage in enumerate(compilation.stages):
        if stage.changed or i == 0:
            stage.save(folder / f"{i:02d}_{stage.name}.py")
            (folder / f"{i:02d}_{stage.name}.svg").write_text(draw(stage))


def _write_kernels(kernels: tuple[KernelSource, ...], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for kernel in kernels:
        try:
            (folder / Path(kernel.path).name).write_text(kernel.code)
        except CompileError as error:
            log_once(logging.WARNING, str(error))


@functools.cache
def _listen_to_triton() -> None:
    """Write PTX and SASS of every kernel that Triton compiles, or finds in its cache, from here on."""
    # Only GPUs need Triton.
    from triton import knobs

    before = knobs.compilation.listener

    def listener(*, metadata_group: dict[str, str], **details: Any) -> None:
        if debug_level() >= KERNELS:
            try:
                _write_machine_code(metadata_group, debug_folder() / "triton")
            except OSError as error:
                log_once(logging.WARNING, f"{FOLDER}: machine code cannot be written ({error}).")
        if before is not None:
            before(metadata_group=metadata_group, **details)

    knobs.compilation.listener = listener


def _write_machine_code(files: dict[str, str], folder: Path) -> None:
    """PTX as Triton's cache has it, and the disassembled cubin; names get the start of the cache's hash."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in map(Path, files.values()):
        stem = f"{path.stem}.{path.parent.name[:8]}"
        if path.suffix == ".ptx":
            (folder / f"{stem}.ptx").write_bytes(path.read_bytes())
        elif path.suffix == ".cubin":
            # Only GPUs need Triton.
            from triton import knobs

            done = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", str(path)], capture_output=True, text=True)
            (folder / f"{stem}.sass").write_text(done.stdout if done.returncode == 0 else done.stderr)
