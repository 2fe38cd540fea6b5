"""All that is stored of a model against the checksums that were written with it: files, folders, shards of ranks.

Nothing is loaded into a model, and nothing is run. A file of ``save_safetensors`` and the files of a transformers folder have
their checksums in their metadata (``integrity``); in a folder of ``save_shards`` each rank wrote those of what it had, under
a name that says the format version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensors.stored_files import PathLike, first_line, parse_json, weight_files
from .integrity import ENTRY, MEND, check_version, tensor_digest, text_digest, verify_file

SHARDS = ".metadata"  # a folder of torch.distributed.checkpoint has this file
_AT_ONCE = 2**28  # bytes that are read in one piece
_RECORD = re.compile(rf"{ENTRY}/format_version=(\d+)/written_by=(.+)/(\d+)of(\d+)")


@dataclass
class Verification:
    """What :func:`verify_checkpoint` read.

    Attributes:
        files: how many.
        tensors: whose data are what was saved.
        without_checksums: files that have none: of version 0.1.0, or not quantized by this package.
    """

    files: int = 0
    tensors: int = 0
    without_checksums: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.tensors} tensors in {self.files} files are what was saved"
        if self.without_checksums:
            text += f"; {len(self.without_checksums)} files have no checksums: {', '.join(self.without_checksums[:3])}"
        return text


def verify_checkpoint(path: PathLike) -> Verification:
    """Compare all that is stored with the checksums that were written when it was saved. Reads every byte.

    Args:
        path: a file of ``save_safetensors``, or a folder of ``save_pretrained`` or ``save_shards``.

    Raises:
        FileNotFoundError: there is nothing.
        CheckpointError: something differs; the message names the first such parameters.
    """
    path, found = Path(path), Verification()
    if path.is_dir() and stored_by_ranks(path):
        return _verify_ranks(path)
    for file in weight_files(path) if path.is_dir() else [path]:
        found.files += 1
        count = verify_file(file)
        found.tensors += count or 0
        if count is None:
            found.without_checksums.append(file.name)
    return found


# --- folders of save_shards ---------------------------------------------------------------------------------------------


def stored_by_ranks(path: Path) -> bool:
    """Whether a folder is one of ``torch.distributed.checkpoint``, as ``save_shards`` writes it."""
    return (path / SHARDS).exists()


def read_index(path: PathLike) -> Any:
    """What a folder of ``torch.distributed.checkpoint`` says of its contents, without reading them.

    Raises:
        CheckpointError: nothing can be read there.
    """
    # Slow to import.
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(path).read_metadata()
    except MemoryError:
        raise
    except Exception as error:  # whatever damage in a pickle leads to
        raise CheckpointError(
            f"{path}: no checkpoint of save_shards can be read there ({type(error).__name__}: {first_line(error)})."
        ) from error


def records_of_ranks(names: Any, path: PathLike) -> list[str]:
    """The names under which ranks stored their checksums; none in folders of version 0.1.0.

    Raises:
        CheckpointError: the folder is of a newer release.
    """
    records = [name for name in names if name.startswith(f"{ENTRY}/")]
    for name in records:
        known = _RECORD.fullmatch(name)
        check_version(int(known[1]) if known else None, known[2] if known else None, path)
    return records


def _verify_ranks(folder: Path) -> Verification:
    """Compare a folder of ``save_shards`` with the checksums of all ranks."""
    index = read_index(folder)
    stored: dict[str, Any] = index.state_dict_metadata
    records = records_of_ranks(stored, folder)
    files = {entry.relative_path for entry in (index.storage_data or {}).values()}
    if not records:
        return Verification(len(files), 0, sorted(files))
    places = [known for name in records if (known := _RECORD.fullmatch(name))]
    if len(records) != int(places[0][4]) or len({known[4] for known in places}) > 1:
        raise CheckpointError(f"{folder}: {len(records)} of {places[0][4]} ranks stored checksums; {MEND}.")
    digests = _digests_of_ranks(folder, index, records)
    names = [name for name in stored if name not in records]
    damaged = sorted(set(digests) - set(names))
    for found in _pieces(folder, index, names):
        for name, value in found.items():
            digest = tensor_digest(value) if isinstance(value, Tensor) else text_digest(str(value))
            if digest not in digests.get(name, ()):
                damaged.append(name)
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise CheckpointError(
            f"{folder}: {', '.join(f'{name} ({_file_of(index, name)})' for name in sorted(damaged)[:3])}{more}: the data differ "
            f"from their checksum; {MEND}."
        )
    tensors = sum(1 for name in names if hasattr(stored[name], "size"))
    return Verification(len(files), tensors, [])


def _digests_of_ranks(folder: Path, index: Any, records: list[str]) -> dict[str, set[str]]:
    """The checksums of each entry; several where ranks that hold the same one wrote it."""
    digests: dict[str, set[str]] = {}
    for found in _pieces(folder, index, records):
        for name, text in found.items():
            table = parse_json(text, f"{folder}: {name}")
            if not isinstance(table, dict) or not all(isinstance(digest, str) for digest in table.values()):
                raise CheckpointError(f"{folder}: {name}: it holds no table of checksums; {MEND}.")
            for key, digest in table.items():
                digests.setdefault(key, set()).add(digest)
    return digests


def _pieces(folder: Path, index: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    """The entries of a folder, some at a time; where some cannot be read, one at a time, so that the first is named."""
    batch: list[str] = []
    size = 0
    for name in names:
        entry = index.state_dict_metadata[name]
        size += entry.size.numel() * entry.properties.dtype.itemsize if hasattr(entry, "size") else 0
        batch.append(name)
        if size >= _AT_ONCE or name == names[-1]:
            yield from _read(folder, index, batch)
            batch, size = [], 0


def _read(folder: Path, index: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    # Slow to import.
    import torch.distributed.checkpoint as dcp

    found = {name: _empty(index.state_dict_metadata[name]) for name in names}
    try:
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    except MemoryError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        if len(names) == 1:
            raise CheckpointError(
                f"{folder}: {names[0]} ({_file_of(index, names[0])}) cannot be read ({type(error).__name__}); {MEND}."
            ) from error
        for name in names:
            yield from _read(folder, index, [name])
        return
    yield found


def _empty(entry: Any) -> Any:
    return torch.empty(entry.size, dtype=entry.properties.dtype) if hasattr(entry, "size") else ""


def _file_of(index: Any, name: str) -> str:
    """The file that holds an entry, where it is known."""
    places = [place.relative_path for key, place in (index.storage_data or {}).items() if key.fqn == name]
    return places[0] if places else "in no file"
