"""One number that changes whenever the sources do that generated code depends on.

Inductor caches compiled graphs across processes and does not hash the sources of lowerings and templates, nor the tables of
tiles that they read. Every fused op carries this number as an argument, so a graph that was compiled by other sources or
with other tables is never found in a cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .tile_tables import user_tables

ROOT = Path(__file__).resolve().parent.parent
# What decides on generated code: kernels with their tables, lowerings and decompositions; what writes the graph and the settings
# that it is compiled with; the layout of stored weights; the kernels and formats of collectives.
FOLDERS = ("kernels", "passes", "compile", "tensors", "communication")
FILES = ("backend.py", "format.py", "ops.py", "integrations/torch.py")  # the last patches Inductor


def hashed_files(root: Path = ROOT) -> list[Path]:
    """Sources and tables of the package at ``root`` that generated code depends on, in a fixed order."""
    suffixes = {".py", ".json", ".c", ".cpp"}
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in suffixes]
    return sorted([*found, *(root / name for name in FILES)])


def _source_hash(root: Path = ROOT) -> int:
    """First 62 bits of the SHA-256 of those files, names included, and of the user's tables."""
    digest = hashlib.sha256()
    for path in hashed_files(root):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    for path in user_tables():
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


KERNEL_ABI = _source_hash()
