"""Format version and checksums of stored models, in the metadata of their safetensors files under the key ``intscale``.

    {"format_version": 1, "written_by": "0.1.0", "headers": {name: digest}, "tensors": {key: digest}}

``headers`` has a digest of every other entry of the metadata (which say how each weight is stored) and is checked at every
load: it is small. ``tensors`` has one of every tensor in the file, its dtype and shape among what is hashed; that takes a
reading of all data, so it is checked on request: ``verify_checkpoint``, or ``intscale inspect FOLDER --verify``. Files
of version 0.1.0 have no such entry: they load, their headers checked for what they must have, and cannot be verified.

A release reads the format versions up to its own. One that it does not know is refused, with the release that wrote it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from .. import format as fmt
from ..errors import CheckpointError
from ..tensors.fields import ABSENT, ATTRIBUTE_NAMES, DATA_NAMES
from ..tensors.stored_files import open_safetensors, parse_json, reading
from ..versions import __version__

ENTRY = "intscale"
MEND = "the file was changed or damaged after it was saved: get it again, or save the model again"
_NOT_HEADERS = (ENTRY, "format")  # transformers adds "format"


# --- writing ------------------------------------------------------------------------------------------------------------


def with_version(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with the entry ``intscale``: format version, and digests of all other entries."""
    headers = {name: _digest(text.encode()) for name, text in metadata.items() if name not in _NOT_HEADERS}
    entry = {"format_version": fmt.VERSION, "written_by": __version__, "headers": headers}
    return {**metadata, ENTRY: json.dumps(entry, sort_keys=True)}  # the same model, the same bytes


def with_checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of :func:`with_version`, with digests of the tensors that go into one file."""
    entry = json.loads(metadata[ENTRY])
    entry["tensors"] = {key: tensor_digest(tensor) for key, tensor in tensors.items()}
    return {**metadata, ENTRY: json.dumps(entry, sort_keys=True)}  # the same model, the same bytes


def tensor_digest(tensor: Tensor) -> str:
    """16 hexadecimal digits that follow from the dtype, shape and bytes of a plain tensor."""
    data = fmt.contiguous(tensor.detach().cpu()).reshape(-1).view(torch.uint8).numpy()
    return _digest(f"{tensor.dtype} {list(tensor.shape)} ".encode(), data)


def text_digest(text: str) -> str:
    """16 hexadecimal digits that follow from a text."""
    return _digest(text.encode())


def _digest(*data: Any) -> str:
    total = hashlib.sha256()
    for part in data:
        total.update(part)
    return total.hexdigest()[:16]


# --- reading ------------------------------------------------------------------------------------------------------------


def read_entry(metadata: Mapping[str, str], where: object) -> Optional[dict[str, Any]]:
    """The entry ``intscale`` of a file's metadata; None in files of version 0.1.0.

    Raises:
        CheckpointError: a newer release wrote the file, or the entry is damaged.
    """
    text = metadata.get(ENTRY)
    if text is None:
        return None
    entry = parse_json(text, f"{where}: {ENTRY} in its header")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: {ENTRY} in its header is no JSON object; {MEND}.")
    check_version(entry.get("format_version"), entry.get("written_by"), where)
    for part in ("headers", "tensors"):
        if not isinstance(entry.get(part, {} if part == "tensors" else None), dict):
            raise CheckpointError(f"{where}: {ENTRY} in its header has no {part}; {MEND}.")
    return entry


def check_version(version: Any, writer: Any, where: object) -> None:
    """Raise ``CheckpointError`` unless this release reads the format ``version`` of what a release ``writer`` stored."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{where}: its format version is {version!r}; {MEND}.")
    if version > fmt.VERSION:
        raise CheckpointError(
            f"{where}: it has format version {version}, written by intscale_compile {writer}; this is {__version__}, which "
            f"reads versions up to {fmt.VERSION}: install intscale_compile {writer} or newer."
        )


def check_metadata(metadata: Mapping[str, str], where: object) -> None:
    """Raise ``CheckpointError`` unless a file's metadata is what was written: known version, intact headers."""
    entry = read_entry(metadata, where)
    if entry is None:
        return
    wanted = entry["headers"]
    for name, text in metadata.items():
        if name not in _NOT_HEADERS and wanted.get(name) != _digest(text.encode()):
            known = "differs from its checksum" if name in wanted else "was not there when it was saved"
            raise CheckpointError(f"{where}: {name.removeprefix('.')}: its header {known}; {MEND}.")
    if lost := sorted(set(wanted) - set(metadata)):
        raise CheckpointError(f"{where}: {lost[0].removeprefix('.')}: its header is missing; {MEND}.")


def check_header(text: Any, name: str) -> Optional[dict[str, Any]]:
    """The header of one ``IntScaleTensor``; None where ``text`` is that of another tensor.

    Version 0.1.0 wrote every attribute, so one that is missing was lost; none has a value that could be assumed.

    Raises:
        CheckpointError: it is not JSON, or lacks attributes, parts or both.
    """
    header = parse_json(text, f"{name}: its header cannot be read")
    if not isinstance(header, dict):
        raise CheckpointError(f"{name}: its header cannot be read: it is no JSON object; {MEND}.")
    if header.get("_type") != "IntScaleTensor":
        return None
    data, parts = header.get("_data"), header.get("_tensor_data_names")
    if not isinstance(data, dict):
        raise CheckpointError(f"{name}: its header has no _data; {MEND}.")
    if lost := sorted(set(ATTRIBUTE_NAMES) - set(data)):
        raise CheckpointError(f"{name}: a stored IntScaleTensor lacks {lost}; {MEND}.")
    if not isinstance(parts, list) or any(part not in DATA_NAMES for part in parts) or len(set(parts)) != len(parts):
        raise CheckpointError(f"{name}: its header names the parts {parts!r}; {MEND}.")
    if lost := [part for part in DATA_NAMES if part not in parts and part not in ABSENT]:
        raise CheckpointError(f"{name}: its header does not name {lost[0]}; {MEND}.")
    return header


def stored_key(name: str, part: str) -> str:
    """The key in a file of a part of the weight ``name``."""
    module, _, leaf = name.rpartition(".")
    return f"{module}._{leaf}_{part}"


# --- verifying ----------------------------------------------------------------------------------------------------------


def verify_file(path: Path, device: str = "cpu") -> Optional[int]:
    """The number of tensors of one file, all found as they were saved; None where it has no checksums."""
    with open_safetensors(path, device) as file:
        metadata = file.metadata() or {}
        entry = read_entry(metadata, path)
        if entry is None or "tensors" not in entry:
            return None
        check_metadata(metadata, path)
        names = {stored_key(name, part): f"{name}: {part}" for name in metadata for part in DATA_NAMES}
        keys, wanted = set(file.keys()), entry["tensors"]
        damaged = sorted(names.get(key, key) for key in keys ^ set(wanted))
        for key in sorted(keys & set(wanted)):
            with reading(f"{path}: {key}"):
                if tensor_digest(file.get_tensor(key)) != wanted[key]:
                    damaged.append(names.get(key, key))
    if damaged:
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        listed = ", ".join(name.removeprefix(".") for name in damaged[:3])
        raise CheckpointError(f"{path}: {listed}{more}: the data differ from their checksum; {MEND}.")
    return len(keys)
