"""What a tool did to each layer of a model, and what it left alone and why."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Row(NamedTuple):
    """One layer: its path, what was done, and why, or why not."""

    path: str
    what: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A row for each layer that a tool looked at. It prints as a table."""

    rows: tuple[Row, ...] = ()

    def __getitem__(self, path: str) -> Row:
        """The row of the layer at a path."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"no layer at {path!r}; there are {[row.path for row in self.rows]}")

    def __str__(self) -> str:
        lines = [("path", "what", "why"), *self.rows]
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, wide)).rstrip() for line in lines)
