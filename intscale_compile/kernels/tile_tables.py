"""Tables of measured tiles: those shipped in ``tables/*.json``, one a GPU, and the user's, which :func:`tune` writes.

A table is a JSON object: ``version`` (1), ``device`` (regular expression that must match the whole name of the GPU),
``torch``, ``triton``, ``date``, and ``entries``: ``{"schedule", "n", "k", "m", "tile": {fields of Tile}}``, with the
measured microseconds ``us`` where there are any. ``schedule`` is that of :func:`~.tiles.table_schedule`.

The user's table is ``$INTSCALE_TILES``, or ``~/.cache/intscale/<GPU>.json``; its entries win over shipped ones of the same
schedule, shape and tokens. Tables are read once; :func:`reload` forgets them.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from ..errors import ConfigError
from .gluon_tiles import SCHEDULES, illegal
from .prepared import forget_all
from .tile import Tile

VERSION = 1
SHIPPED = Path(__file__).parent / "tables"
VARIABLE = "INTSCALE_TILES"
TILE_FIELDS = tuple(field.name for field in dataclasses.fields(Tile))
GROUPS = ("32", "64", "256")  # 128 is not named
_TEMPORARY = ".tmp"


class Key(NamedTuple):
    """What an entry was measured for."""

    schedule: str
    n: int
    k: int
    m: int


Entries = dict[Key, dict[str, Any]]


def device_slug(device_name: str) -> str:
    """File name of a GPU: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_path(device_name: str) -> Path:
    """Where the user's table for a GPU is, whether or not it exists."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else user_folder() / f"{device_slug(device_name)}.json"


def user_folder() -> Path:
    """Where tables are kept that no variable names."""
    return Path.home() / ".cache" / "intscale"


def user_tables() -> list[Path]:
    """Every table of the user on this machine, whatever its GPU."""
    named = os.environ.get(VARIABLE)
    found = [Path(named).expanduser()] if named else user_folder().glob("*.json")
    return sorted(path for path in found if path.is_file())


def _fail(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"tile table {path}: {what}. Mend or delete the file, or write it anew with intscale_compile.tune."
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parse_tile(fields: Any) -> Tile:
    if not isinstance(fields, dict) or not {"block_m", "block_n"} <= fields.keys() <= set(TILE_FIELDS):
        raise ValueError(f"a tile has block_m, block_n and maybe others of {TILE_FIELDS}, not {fields!r}")
    for name, value in fields.items():
        if name != "kernel" and not _is_positive(value):
            raise ValueError(f"{name} is a positive integer, not {value!r}")
    return Tile(**fields)


def _tile_fault(tile: Tile, schedule: str, k: int) -> Optional[str]:
    """Why the tile cannot be launched, or None."""
    if tile.kernel != "triton":
        name, _, group = schedule.partition("/")
        return illegal(tile, name, k, decode=group != "256")
    powers = all(size & (size - 1) == 0 for size in (tile.block_m, tile.block_n, tile.num_warps))
    if (
        not powers
        or min(tile.block_m, tile.block_n) < 16
        or max(tile.block_m, tile.block_n) > 256
        or tile.num_warps > 16
    ):
        return "blocks are powers of two from 16 to 256, warps from 1 to 16"
    return None


def _parse_entry(entry: Any) -> Key:
    """The key of an entry; raises ValueError where the entry is malformed."""
    if not isinstance(entry, dict) or not {"schedule", "n", "k", "m", "tile"} <= entry.keys():
        raise ValueError("an entry has schedule, n, k, m and tile")
    name, slash, group = str(entry["schedule"]).partition("/")
    if name not in SCHEDULES or slash and (group not in GROUPS or name not in ("fold", "accumulate", "float")):
        raise ValueError(f"schedule {entry['schedule']!r} is not known")
    for field in "nkm":
        if not _is_positive(entry[field]):
            raise ValueError(f"{field} is a positive integer, not {entry[field]!r}")
    fault = _tile_fault(_parse_tile(entry["tile"]), entry["schedule"], entry["k"])
    if fault:
        raise ValueError(f"the tile cannot run: {fault}")
    return Key(entry["schedule"], entry["n"], entry["k"], entry["m"])


def read_table(path: Path) -> tuple[re.Pattern, Entries]:
    """Device expression and entries of a table.

    Raises:
        ConfigError: naming the file, and the entry where one is at fault.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _fail(path, f"cannot be read ({error})") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise _fail(path, f"is not a JSON object with version {VERSION}")
    try:
        device = re.compile(data["device"])
    except (KeyError, TypeError, re.error) as error:
        raise _fail(path, f"'device' is not a regular expression ({error})") from error
    if not isinstance(data.get("entries"), list):
        raise _fail(path, "'entries' is not a list")
    entries: Entries = {}
    for i, entry in enumerate(data["entries"]):
        try:
            entries[_parse_entry(entry)] = entry
        except ValueError as error:
            raise _fail(path, f"entry {i} ({json.dumps(entry)}): {error}") from error
    return device, entries


class _Table:
    """Shipped and user entries for one GPU, merged."""

    def __init__(self, device_name: str):
        self.entries: Entries = {}
        user = user_path(device_name)
        for path in [*sorted(SHIPPED.glob("*.json")), *([user] if user.is_file() else [])]:
            device, entries = read_table(path)
            if device.fullmatch(device_name):
                self.entries.update(entries)
        buckets: dict[tuple[str, int, int], list[tuple[int, Tile]]] = {}
        for key in sorted(self.entries):
            tile = _parse_tile(self.entries[key]["tile"])
            buckets.setdefault((key.schedule, key.n, key.k), []).append((key.m, tile))
        self.buckets = {shape: ([m for m, _ in found], [t for _, t in found]) for shape, found in buckets.items()}

    def find(self, schedule: str, n: int, k: int, m: int) -> Optional[Tile]:
        """See :func:`lookup`."""
        if (schedule, n, k) not in self.buckets:
            return None
        tokens, tiles = self.buckets[schedule, n, k]
        i = bisect.bisect_left(tokens, m)
        if i < len(tokens):
            return tiles[i]
        return None if tiles[-1].kernel == "decode" else tiles[-1]


_table = functools.lru_cache(maxsize=None)(_Table)


def reload() -> None:
    """Read the tables again at the next use, and forget launches that were prepared with other tiles."""
    _table.cache_clear()
    forget_all()


def lookup(device_name: str, schedule: str, n: int, k: int, m: int) -> Optional[Tile]:
    """The tile measured for ``(schedule, n, k)`` at the fewest tokens that are not below ``m``.

    Beyond the most tokens measured it is the tile of those, unless that is one of the decode kernel. None where nothing
    was measured.

    Raises:
        ConfigError: a table is malformed.
    """
    return _table(device_name).find(schedule, n, k, m)


def active_tiles(device_name: str) -> list[tuple[Key, Tile]]:
    """Every entry in force on a GPU, the user's included."""
    return [(key, _parse_tile(entry["tile"])) for key, entry in sorted(_table(device_name).entries.items())]


def compact(tile: Tile) -> dict[str, Any]:
    """Fields of a tile as the tables store them: block sizes, and what differs from the defaults."""
    default = Tile(tile.block_m, tile.block_n)
    kept = [
        name for name in TILE_FIELDS if name in ("block_m", "block_n") or getattr(tile, name) != getattr(default, name)
    ]
    return {name: getattr(tile, name) for name in kept}


def read_for(path: Path, device: str) -> Entries:
    """Entries of a table to be merged with others of ``device`` (an expression); none where there is no file.

    Raises:
        ConfigError: the table is malformed or of another GPU.
    """
    if not path.exists():
        return {}
    pattern, entries = read_table(path)
    if pattern.pattern != device:
        raise _fail(path, f"is for the GPU {pattern.pattern!r}, not {device!r}")
    return entries


def write_table(path: Path, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Write a table in one step, one entry a line; what it held for other keys and the same GPU stays.

    Raises:
        ConfigError: there is a malformed table, or one of another GPU, or the file cannot be written.
    """
    merged = read_for(path, header["device"])
    merged.update({_parse_entry(entry): entry for entry in entries})
    try:
        write_entries(path, {"version": VERSION, **header}, [merged[key] for key in sorted(merged)])
    except OSError as error:
        raise ConfigError(f"tile table {path} cannot be written ({error}): give another path.") from error
    reload()


def write_entries(path: Path, header: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """Write a JSON object of a header and ``entries``, one a line, in one step: a reader sees the old file or the new one."""
    lines = ",\n    ".join(json.dumps(entry) for entry in entries)
    head = json.dumps(header, indent=2).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f'{head},\n  "entries": [\n    {lines}\n  ]\n}}\n')
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
