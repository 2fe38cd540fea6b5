"""One number that changes whenever our sources do.

Inductor caches compiled graphs across processes and does not hash the sources of lowerings and templates, nor the tables of
tiles that they read. Every fused op carries this number as an argument, so a graph that was compiled by other sources or
with other tables is never found in a cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from .tile_tables import user_tables


def _source_hash() -> int:
    """First 62 bits of the SHA-256 of all Python files and tables of the package, names included, and the user's tables."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.json")]):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    for path in user_tables():
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 2


KERNEL_ABI = _source_hash()
