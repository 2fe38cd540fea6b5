"""Measured times of collectives, one table a link: what :func:`~.link_tuning.tune_link` writes and the compiler reads.

A link is what joins the ranks of a process group: its backend, the kind of device, how many ranks and on how many hosts.
Tables lie in ``$INTSCALE_LINKS`` (a folder), or in ``~/.cache/intscale/links``. A table is a JSON object: ``version`` (1),
``link``, ``torch``, ``date``, and ``entries``: ``{"op", "wire", "bytes", "us"}``. ``wire`` is a wire format, ``"plain"``,
``"one_shot"`` or ``"two_shot"`` (of an all-reduce on symmetric memory),
``bytes`` the whole tensor in bf16: the input of an all-reduce or a reduce-scatter, the output of an all-gather.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..errors import ConfigError
from ..kernels.tile_tables import device_slug, user_folder, write_entries
from .message import WireFormat

VERSION = 1
VARIABLE = "INTSCALE_LINKS"
PLAIN = "plain"
ONE_SHOT, TWO_SHOT = LOSSLESS = ("one_shot", "two_shot")  # on symmetric memory, of an all-reduce
OPS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True)
class Link:
    """What joins the ranks of a process group.

    Attributes:
        backend: of the process group for the device: ``"nccl"``, ``"gloo"`` and so on.
        device: ``"cpu"``, or the name of the GPU as in a file name.
        ranks: size of the group.
        hosts: machines that the ranks are on, by ``LOCAL_WORLD_SIZE`` of torchrun; one where that is not set.
    """

    backend: str
    device: str
    ranks: int
    hosts: int = 1

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{self.ranks}x{self.hosts}"


class Key(NamedTuple):
    """What was measured: which collective, in which form."""

    op: str
    wire: str


Times = dict[Key, dict[int, float]]  # microseconds by bytes


def link_of(group: dist.ProcessGroup, device: torch.device) -> Link:
    """The link of a process group for tensors on ``device``; asks no other rank."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    ranks = dist.get_process_group_ranks(group)
    hosts = len({rank // local for rank in ranks}) if local > 0 else 1
    kind = device_slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type
    return Link(backend_of(group, device), kind, len(ranks), hosts)


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that a group uses for tensors on ``device``: ``"nccl"`` of ``"cpu:gloo,cuda:nccl"``."""
    config = dist.get_backend_config(group)
    pairs = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return pairs.get(device.type, config)


def folder() -> Path:
    """Where tables of links are."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else user_folder() / "links"


def tables() -> list[Path]:
    """The tables of this user's links."""
    return sorted(folder().glob("*.json")) if folder().is_dir() else []


def table_path(link: Link) -> Path:
    """Where the table of a link is, whether or not it exists."""
    return folder() / f"{link}.json"


def _fail(path: Path, what: str) -> ConfigError:
    mend = "Mend or delete the file, or write it anew with intscale_compile.communication.tune_link."
    return ConfigError(f"table of a link {path}: {what}. {mend}")


def _entry(entry: Any) -> tuple[Key, int, float]:
    """Key, bytes and microseconds of an entry; raises ValueError where it is malformed."""
    if not isinstance(entry, dict) or not {"op", "wire", "bytes", "us"} <= entry.keys():
        raise ValueError("an entry has op, wire, bytes and us")
    op, wire, nbytes, us = (entry[name] for name in ("op", "wire", "bytes", "us"))
    if op not in OPS:
        raise ValueError(f"op is one of {OPS}, not {op!r}")
    if wire != PLAIN and not (wire in LOSSLESS and op == "all_reduce"):
        wire = str(WireFormat.parse(wire))
    if not isinstance(nbytes, int) or isinstance(nbytes, bool) or nbytes < 1:
        raise ValueError(f"bytes is a positive integer, not {nbytes!r}")
    if not isinstance(us, (int, float)) or isinstance(us, bool) or not 0 < us < float("inf"):
        raise ValueError(f"us is a positive number, not {us!r}")
    return Key(op, wire), nbytes, float(us)


def read_table(path: Path) -> tuple[Link, Times]:
    """Link and times of a table.

    Raises:
        ConfigError: naming the file, and the entry where one is at fault.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _fail(path, f"cannot be read ({error})") from error
    if not isinstance(data, dict) or data.get("version") != VERSION or not isinstance(data.get("entries"), list):
        raise _fail(path, f"is not a JSON object with version {VERSION} and a list of entries")
    try:
        link = Link(**data["link"])
    except (KeyError, TypeError) as error:
        raise _fail(path, f"'link' has backend, device, ranks and hosts ({error})") from error
    times: Times = {}
    for i, entry in enumerate(data["entries"]):
        try:
            key, nbytes, us = _entry(entry)
        except ValueError as error:
            raise _fail(path, f"entry {i} ({json.dumps(entry)}): {error}") from error
        times.setdefault(key, {})[nbytes] = us
    return link, times


def times_of(link: Link) -> Times:
    """The measured times of a link; empty where there are none. A file is read again once it has changed.

    Raises:
        ConfigError: the table is malformed or of another link.
    """
    path = table_path(link)
    try:
        status = path.stat()
    except OSError:
        return {}
    return _times(path, link, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _times(path: Path, link: Link, *_: int) -> Times:
    found, times = read_table(path)
    if found != link:
        raise _fail(path, f"is for the link {found}, not {link}")
    return times


def check_table(path: Path, link: Link) -> None:
    """Raise ``ConfigError`` unless a table of this link can be written or merged here: before anything is measured."""
    if path.exists() and (found := read_table(path)[0]) != link:
        raise _fail(path, f"is for the link {found}, not {link}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"table of a link {path} cannot be written ({error.strerror or error}): name another file, or set {VARIABLE} to a "
        "folder that you may write to."
    )


def write_table(path: Path, link: Link, header: dict[str, Any], times: Times) -> None:
    """Write a table in one step, one entry a line; what it held for other keys and sizes stays.

    Raises:
        ConfigError: there is a malformed table, or one of another link, or the file cannot be written.
    """
    merged: Times = {}
    if path.exists():
        found, merged = read_table(path)
        if found != link:
            raise _fail(path, f"is for the link {found}, not {link}")
    for key, measured in times.items():
        merged[key] = {**merged.get(key, {}), **measured}
    entries = [
        {**key._asdict(), "bytes": nbytes, "us": us}
        for key, measured in sorted(merged.items())
        for nbytes, us in sorted(measured.items())
    ]
    try:
        write_entries(path, {"version": VERSION, "link": dataclasses.asdict(link), **header}, entries)
    except OSError as error:
        raise _unwritable(path, error) from error
