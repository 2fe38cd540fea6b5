"""What is installed, what will run where, and what to mend. Nothing is imported that may be broken before it is looked at."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from .errors import describe

DISTRIBUTION = "intscale-compile"
OPTIONAL = ("hf", "eval", "cli")
OK, NOTE, BROKEN = "ok", "note", "broken"


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        name: what was looked at.
        status: ``"ok"``, ``"note"`` (works, but could be better) or ``"broken"``.
        found: what was found.
        mend: what to do, where something can be done.
    """

    name: str
    status: str
    found: str
    mend: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain values, for JSON."""
        return asdict(self)


def diagnose(*, compiled: bool = True, names: bool = False) -> Iterator[Check]:
    """Every check, one after the other; what cannot be checked because something before it is broken is left out.

    Args:
        compiled: also compile a layer, which takes up to a minute on a CPU.
        names: one check for every private name of another package that is used, not only for those that are not there.
    """
    yield Check("python", OK, f"{platform.python_version()}, {sys.executable}")
    yield from packages()
    yield backend()
    usable = library()
    yield usable
    if usable.status == BROKEN:
        return
    yield from private_names(names)
    yield from graphics()
    yield processor()
    yield from folders()
    yield from links()
    # Slow to import: commands that need it not begin at once.
    import torch

    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield linear(device, compiled)


def packages() -> Iterator[Check]:
    """Installed versions against those that our own metadata asks for."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, BROKEN, "not installed", "pip install -e . in the checkout")
        return
    seen = set()
    for text in requirements:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;.*extra\s*==\s*['\"](\w+)['\"])?", text)
        if match is None or match[1] in seen or (match[3] is not None and match[3] not in OPTIONAL):
            continue
        seen.add(match[1])
        yield package(match[1], match[2].strip(" ()"), match[3])


def package(name: str, wanted: str, extra: Optional[str]) -> Check:
    """One package: ``wanted`` is such as ``">=2.11,<2.14"``; ``extra`` names the optional part that needs it."""
    mend = f"pip install '{name}{wanted}'" if extra is None else f"pip install '{DISTRIBUTION}[{extra}]'"
    needed_for = {"hf": "models of transformers", "eval": "intscale eval --task", "cli": "the command line"}
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if extra is None:
            return Check(name, BROKEN, f"not installed, needed {wanted or 'in any version'}", mend)
        return Check(name, NOTE, f"not installed, needed for {needed_for[extra]}", mend)
    if not fits(version, wanted):
        return Check(name, BROKEN if extra is None else NOTE, f"{version}, needed {wanted}", mend)
    return Check(name, OK, f"{version} ({wanted})" if wanted else version)


def fits(version: str, wanted: str) -> bool:
    """Whether a version satisfies bounds ``>=``, ``>``, ``<=`` and ``<``, joined by commas."""
    found = _numbers(version)
    for bound in filter(None, wanted.replace(" ", "").split(",")):
        match = re.fullmatch(r"(>=|<=|<|>)([\d.]+)", bound)
        if match is None:
            continue
        limit = _numbers(match[2])
        width = max(len(found), len(limit))
        a, b = (part + (0,) * (width - len(part)) for part in (found, limit))
        if not {">=": a >= b, "<=": a <= b, "<": a < b, ">": a > b}[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def backend() -> Check:
    """Whether ``torch.compile(backend="intscale")`` finds us in a process that has not imported us."""
    found = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "intscale"]
    if not found:
        mend = f"pip install {DISTRIBUTION}, or pip install -e . in the checkout"
        return Check("backend", BROKEN, "the entry point torch_dynamo_backends: intscale is not registered", mend)
    return Check("backend", OK, f'torch.compile(backend="intscale") is {found[0].value}')


def library() -> Check:
    """Whether torch and intscale_compile can be imported."""
    for name in ("torch", "intscale_compile"):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  (whatever a broken installation raises is what is to be said)
            line = describe(error)[0].removeprefix("intscale: ").partition(" This is a bug")[0]
            return Check("import", BROKEN, f"import {name}: {line}", "mend the packages above, or reinstall them")
    return Check("import", OK, f"intscale_compile {module.__version__} from {Path(str(module.__file__)).parent}")


def private_names(every: bool) -> Iterator[Check]:
    """What is used of other packages beyond their public API: one line for each package, and one for each name that is missing.

    Args:
        every: also one line for each name that is there.
    """
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.integrations import registry

    for library in ("torch", "transformers", "torchao", "peft", "lm_eval"):
        if registry.installed(library) is None:
            continue
        importlib.import_module(f"intscale_compile.integrations.{library}")
        entries = [entry for entry in registry.NAMES if entry.package == library]
        states = [entry.state().state for entry in entries]
        for entry, state in zip(entries, states):
            if state == registry.FOUND and every:
                yield Check(entry.target, OK, f"found; {entry.purpose}")
            elif state != registry.FOUND:
                what, _, mend = entry.message(state).rpartition(": ")
                yield Check(entry.target, NOTE if entry.fallback else BROKEN, what, mend.removesuffix("."))
        version, found = registry.installed(library), states.count(registry.FOUND)
        checked = registry.checked_range(library)
        fits_range = registry.fits_checked(library, str(version))
        text = f"{found} of {len(entries)} found in {version}, checked with {checked}"
        mend = "" if fits_range else f"pip install '{library}{checked}'"
        yield Check(f"private names of {library}", OK if fits_range else NOTE, text, mend)


def graphics() -> Iterator[Check]:
    """Each GPU and which kernels run on it."""
    # Slow to import: commands that need it not begin at once.
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield gpu(index)
    elif shutil.which("nvidia-smi"):
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        mend = "install a torch build with CUDA that the driver supports, and check CUDA_VISIBLE_DEVICES and nvidia-smi"
        yield Check("GPU", NOTE, f"nvidia-smi is there, but torch {torch.__version__}, {build}, sees no GPU", mend)
    else:
        yield Check("GPU", NOTE, "none: models run on the CPU, and intscale tune has nothing to do")


def gpu(index: int) -> Check:
    """One GPU: Gluon kernels, or plain Triton and why."""
    # Slow to import: commands that need it not begin at once.
    import torch

    # Slow to import: commands that need it not begin at once.
    from intscale_compile.kernels.gluon_launch import missing_feature
    from intscale_compile.kernels.triton_gemm import capability

    name = f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory / 1e9:.0f} GB"
    if torch.version.hip is not None:
        return Check(f"GPU {index}", NOTE, f"{name}, ROCm {torch.version.hip}: plain Triton, which never ran on one")
    number = capability(torch.device("cuda", index))
    where = f"{name}, capability {number}"
    if number < 80:
        return Check(f"GPU {index}", NOTE, f"{where}: kernels are tested from 80 on", "use --device cpu if they fail")
    if obstacle := missing_feature(number):
        mend = "a Triton release from 3.6 to 3.9, as torch 2.11 to 2.15 bring" if number == 90 else ""
        return Check(f"GPU {index}", OK if number != 90 else NOTE, f"{where}: plain Triton, since {obstacle}", mend)
    return Check(
        f"GPU {index}", OK, f"{where}: Gluon kernels for groups of 128, 256 and per channel, else plain Triton"
    )


def processor() -> Check:
    """Which integer product runs on the CPU."""
    # Slow to import: commands that need it not begin at once.
    import torch

    # Slow to import: commands that need it not begin at once.
    from intscale_compile.kernels.cpu_gemm import int8_product_is_exact

    features = torch.cpu.get_capabilities()
    name = f"{features.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads"
    if not int8_product_is_exact():
        return Check(
            "CPU", NOTE, f"{name}: its int8 product saturates; integers come from fp32 products, exact but slow"
        )
    fast = [word for word in ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "dotprod") if features.get(word)]
    if not fast:
        return Check(
            "CPU", NOTE, f"{name}: oneDNN without VNNI or a like instruction: exact, but hardly faster than fp32"
        )
    return Check("CPU", OK, f"{name}: oneDNN int8 with {', '.join(fast)}")


def folders() -> Iterator[Check]:
    """Whether caches can be written, and whether tables of tiles can be read."""
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.communication import link_table
    from intscale_compile.kernels import tile_tables

    user = os.environ.get("USER") or os.environ.get("LOGNAME") or "user"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or str(Path(tempfile.gettempdir()) / f"torchinductor_{user}")
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    yield folder("cache of Inductor", Path(inductor), "TORCHINDUCTOR_CACHE_DIR")
    yield folder("cache of Triton", Path(triton), "TRITON_CACHE_DIR")
    tables = tile_tables.user_path("any").parent
    yield folder("tables of tiles", tables, tile_tables.VARIABLE)
    yield folder("tables of links", link_table.folder(), link_table.VARIABLE)
    for path in tile_tables.user_tables():
        yield _attempt(f"table {path.name}", functools.partial(_read_table, path))


def folder(name: str, path: Path, variable: str) -> Check:
    """Whether a folder is writable, or can be made."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        mend = f"make {existing} a writable folder, or set {variable} to another place"
        return Check(name, BROKEN, f"{path} cannot be written ({error.strerror})", mend)
    free = shutil.disk_usage(existing).free
    if free < 1e9:
        return Check(name, NOTE, f"{path}, only {free / 1e6:.0f} MB free", f"make room, or set {variable}")
    return Check(name, OK, f"{path}, {free / 1e9:.0f} GB free")


def _read_table(path: Path) -> str:
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.kernels import tile_tables

    return f"{len(tile_tables.read_table(path)[1])} entries in {path}"


def links() -> Iterator[Check]:
    """Which links between ranks were measured, and from how many bytes on a collective is quantized on each."""
    # Slow to import: commands that need it not begin at once.
    import torch

    # Slow to import: commands that need it not begin at once.
    from intscale_compile.communication import link_cost, link_table

    measured = set()
    for path in link_table.tables():
        check = _attempt(f"link {path.stem}", functools.partial(_thresholds, path))
        measured.add(path.stem if check.status == OK else "")
        yield check
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus < 2:
        found = "one GPU" if gpus else "no GPU"
        yield Check("links", OK, f"{found}; {len(measured)} measured, in {link_table.folder()}")
        return
    link = link_table.Link("nccl", link_table.device_slug(torch.cuda.get_device_name(0)), gpus)
    if str(link) not in measured:
        least = link_cost.threshold(link, {}, "all_reduce", "int8")
        size = "never quantized" if least.nbytes == link_cost.NEVER else f"quantized from {least.nbytes:,} bytes on"
        found = f"not measured; collectives are {size} ({least.source}), where that is asked for"
        yield Check(f"link {link}", NOTE, found, "intscale tune --link")


def _thresholds(path: Path) -> str:
    # Slow to import: commands that need it not begin at once.
    from intscale_compile.communication import link_cost, link_table

    link, times = link_table.read_table(path)
    words: dict[str, list[str]] = {}
    for key, least in link_cost.thresholds(link, times).items():
        size = "never" if least.nbytes == link_cost.NEVER else f"from {least.nbytes:,} bytes"
        words.setdefault(key.op, []).append(f"{key.wire} {size}")
    return "measured; " + ("; ".join(f"{op}: {', '.join(found)}" for op, found in words.items()) or "nothing in it")


def linear(device: str, compiled: bool) -> Check:
    """A tiny W4A8 linear: integers bit for bit, and compiled."""

    def run() -> str:
        # Slow to import: commands that need it not begin at once.
        from intscale_compile.commands import check_linear

        check_linear(device, compiled=compiled)
        return "integers equal to the bit" + (", compiles and agrees with eager mode" if compiled else "")

    return _attempt(f"W4A8 linear, {device}", run)


def _attempt(name: str, run: Callable[[], Any]) -> Check:
    try:
        return Check(name, OK, str(run()))
    except Exception as error:  # noqa: BLE001  (a compiler may raise anything)
        text = describe(error)[0].removeprefix("intscale: ").partition(" This is a bug")[0]
        compiler = "CppCompile" in type(error).__name__ or "compiler" in text.lower()
        return Check(name, BROKEN, text, "install a C++ compiler (g++), or set CXX to one" if compiler else "")
