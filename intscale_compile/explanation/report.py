"""``Explanation``: what ``explain`` returns, the records with the ways to show them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from .html import page
from .records import Records
from .text import table


@dataclass(frozen=True, repr=False)
class Explanation(Records):
    """The result of :func:`explain`; ``print`` it for a table, ``to_html`` makes a page of it.

    Its fields are those of ``Records``.
    """

    def table(self, fold: bool = True) -> str:
        """The text table; with ``fold`` repeated layers that are alike take the lines of one."""
        return table(self, fold)

    def __str__(self) -> str:
        return self.table()

    __repr__ = __str__

    def to_html(self, path: Optional[Union[str, Path]] = None) -> str:
        """One page that needs nothing else: no network, no other file. Returns it; writes it to ``path`` where given."""
        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text
