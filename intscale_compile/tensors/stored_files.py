"""Files of a checkpoint: checked when they are read, and written whole.

Whatever a file holds, what reads it ends in ``CheckpointError``; names in a checkpoint never lead out of its folder, and
only regular files are opened, so that a pipe cannot keep a reader waiting. What is written appears under its name once it
is whole: a failed save leaves what was there before, and nothing beside it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, Optional, Union

from ..errors import CheckpointError, ConfigError, IntScaleError

PathLike = Union[str, Path]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DAMAGED = "the checkpoint is damaged: download it again, or save it again from the original model."
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def first_line(error: BaseException) -> str:
    """An error in one line: what matters is said first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever goes wrong while ``what`` is read is a ``CheckpointError`` that names it.

    Our own errors, ``FileNotFoundError`` and ``MemoryError`` pass as they are.
    """
    try:
        yield
    except (IntScaleError, FileNotFoundError, MemoryError):
        raise
    except RecursionError as error:
        raise CheckpointError(f"{what}: it is nested too deeply to be read; {DAMAGED}") from error
    except Exception as error:
        raise CheckpointError(f"{what}: {type(error).__name__}: {first_line(error)}; {DAMAGED}") from error


def regular_file(path: PathLike) -> Path:
    """``path``, if it is a regular file or a link to one.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: it is a folder, a pipe, a device or the like, or cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {first_line(error)}.") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: it is not a regular file; the checkpoint is damaged, or not one.")
    return Path(path)


def inside(folder: Path, name: Any) -> Path:
    """The path of the file ``name`` of a checkpoint.

    Raises:
        CheckpointError: the name is not text, or leads out of the folder.
    """
    parts = PurePath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or PurePath(name).is_absolute() or "\0" in name or "\\" in name:
        raise CheckpointError(f"{folder}: it names a file {name!r}, which is not inside of it: nothing is read there.")
    return folder / name


def parse_json(text: Union[str, bytes], what: object) -> Any:
    """The value of a JSON text.

    Raises:
        CheckpointError: it is not JSON, or nested too deeply.
    """
    with reading(what):
        try:
            return json.loads(text)
        except (ValueError, TypeError) as error:  # also text that is not UTF-8
            raise CheckpointError(f"{what}: it is no JSON: {first_line(error)}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it does not, cannot be read, or is not there.
    """
    try:
        text = regular_file(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {first_line(error)}.") from error
    content = parse_json(text, path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no JSON object.")
    return content


def check_described(stored: Any, folder: PathLike) -> dict[str, Any]:
    """The ``quantization_config`` of a folder's ``config.json``, an object that names its method.

    Raises:
        CheckpointError: it is something else.
    """
    where = f"{folder}: config.json: its quantization_config cannot be used"
    mend = "the file was changed or damaged after it was saved: get it again, or save the model again"
    if not isinstance(stored, dict):
        raise CheckpointError(f"{where} ({stored!r:.60} is no object that says how weights are stored); {mend}.")
    method = stored.get("quant_method")
    if not isinstance(method, str) or not method:
        raise CheckpointError(f"{where} (quant_method={method!r:.60} names no method); {mend}.")
    return stored


def weight_map(folder: Path) -> dict[str, str]:
    """Which file of a folder holds which tensor, as its index says; every file is inside of the folder.

    Raises:
        CheckpointError: there is no index, it has no ``weight_map``, or that names something else than files of the folder.
    """
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX} is there.")
    found = read_json(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{folder / INDEX}: it has no weight_map.")
    for name in found.values():
        inside(folder, name)
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order of their names; each is a regular file inside of it.

    Raises:
        CheckpointError: there are none, the index names files outside, one is missing or not regular.
    """
    names = [SINGLE] if (folder / SINGLE).exists() else sorted(set(weight_map(folder).values()))
    try:
        return [regular_file(inside(folder, name)) for name in names]
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: it is missing; the checkpoint is incomplete.") from error


def open_safetensors(path: PathLike, device: str = "cpu") -> Any:
    """``safetensors.safe_open`` of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not a safetensors file, or truncated.
        ConfigError: the device cannot be used here.
    """
    # Comes with transformers.
    from safetensors import safe_open

    regular_file(path)
    _check_device(device)
    with reading(path):
        return safe_open(path, framework="pt", device=device)


def _check_device(device: str) -> None:
    """Raise ``ConfigError`` unless tensors can be read to a device: the file would be called damaged."""
    if str(device) == "cpu":
        return
    # Slow to import.
    import torch

    try:
        usable = torch.empty(0, device=device).device.type != "meta"
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ConfigError(f"device={device!r} cannot be used here: read to 'cpu', and move the model.")


@contextlib.contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """A path beside ``path`` to write to; it becomes ``path`` at the end, or is removed where the block fails.

    Raises:
        CheckpointError: it cannot be written: no such folder, no space.
    """
    path = Path(path)
    with _writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    part = Path(name)
    try:
        with _writing(path, part):
            yield part
            mask = os.umask(0)
            os.umask(mask)
            part.chmod(0o666 & ~mask)  # as of any new file; mkstemp gives it to its owner only
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: PathLike) -> Iterator[Path]:
    """A new folder to write to, in ``folder``, or beside it where that does not exist; its files move to ``folder`` at the end.

    Where the block or the move fails, ``folder`` is as it was. No old file is there any more when the first new one arrives,
    and ``config.json`` goes first and comes last: whoever reads the folder meanwhile, or after the process was killed, finds no
    model, and not one of files that do not belong together. Weight files of an earlier model that the new one lacks are removed.
    Where the former files cannot be put back either, they stay in the folder that the error names.

    Raises:
        CheckpointError: it cannot be written: no space, no permission.
    """
    folder = Path(folder)
    with _writing(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Where the folder is there, inside of it: it may be a mount point, or its parent not writable.
        place = folder if folder.is_dir() else folder.absolute().parent
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=place))
    old = part.with_suffix(".old")
    try:
        with _writing(folder, part, OF_WRITING):
            yield part
        with _writing(folder, part):
            folder.mkdir(exist_ok=True)
            _move(part, folder, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(part: Path, folder: Path, old: Path) -> None:
    """Move the files of ``part`` into ``folder``, and those that they replace to ``old``, which goes; all of them, or none.

    Raises:
        CheckpointError: a move failed and the way back did too: the former files are in ``old``.
    """
    new = sorted(
        (path.relative_to(part) for path in part.rglob("*") if not path.is_dir()),
        key=lambda p: (p.name == "config.json", not p.name.startswith("model"), str(p)),
    )
    leaving = [path for path in reversed(new) if (folder / path).exists() or (folder / path).is_symlink()]
    if {Path(SINGLE), Path(INDEX)} & set(new):  # a model was written: files of another one must not be read with it
        there = [Path(path.name) for path in folder.iterdir() if not path.is_dir()]
        leaving += [p for p in there if p not in new and (p.name in (SINGLE, INDEX) or _SHARD.fullmatch(p.name))]
    gone: list[Path] = []
    placed: list[Path] = []
    try:
        for path in leaving:
            (old / path).parent.mkdir(parents=True, exist_ok=True)
            gone.append(path)
            (folder / path).replace(old / path)
        for path in new:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            placed.append(path)
            (part / path).replace(folder / path)
    except BaseException as error:
        _move_back(part, folder, old, placed, gone, error)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_back(part: Path, folder: Path, old: Path, placed: list[Path], gone: list[Path], error: BaseException) -> None:
    """Take the files ``placed`` out of ``folder`` again and put those that are ``gone`` back; ``old`` goes if it is empty.

    Raises:
        CheckpointError: some could not be put back.
    """
    obstacles = []
    for path in placed:
        try:
            if not (part / path).exists():
                (folder / path).unlink(missing_ok=True)
        except OSError as obstacle:
            obstacles.append(f"{path.name} is new ({first_line(obstacle)})")
    for path in reversed(gone):
        try:
            if (old / path).exists() or (old / path).is_symlink():
                (old / path).replace(folder / path)
        except OSError as obstacle:
            obstacles.append(f"{path.name} is in {old} ({first_line(obstacle)})")
    if obstacles:
        raise CheckpointError(
            f"{folder}: it cannot be written: {first_line(error)}; nor could its former files be put back: "
            f"{'; '.join(obstacles)}: move them back by hand."
        ) from error
    shutil.rmtree(old, ignore_errors=True)


TORCH_WRITERS = ("PytorchStreamWriter", "inline_container.cc")
OF_WRITING = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO))


@contextlib.contextmanager
def _writing(path: Path, part: Optional[Path] = None, numbers: Optional[frozenset[int]] = None) -> Iterator[None]:
    """Errors of writing ``path``, maybe through ``part``, as one of ours; of the system's those of ``numbers``, None: all."""
    # Comes with transformers.
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        of_system = isinstance(error, OSError) and (numbers is None or error.errno in numbers)
        # What torch.save says on a full disk.
        of_torch = isinstance(error, RuntimeError) and any(name in str(error) for name in TORCH_WRITERS)
        if not (of_system or of_torch or isinstance(error, SafetensorError)):
            raise
        text = first_line(error) if part is None else first_line(error).replace(str(part), str(path))
        raise CheckpointError(f"{path}: it cannot be written: {text}.") from error
