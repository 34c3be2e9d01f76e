"""What a tool did to a model, and what it left alone, and why: one row for each place, printed as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """One row of an `Outcome`: a place in a model, what was done there, and why."""

    path: str  # keys joined by "/"; "" is the whole model
    what: str  # what was done, such as "BatchNorm -> GroupNorm", or what was not
    why: str = ""  # a reason, or what follows from it
    done: bool = True  # False: left alone


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a tool did to a model. It prints as a table, and `rows` is the same as data.

    A tool makes its rows, `Row(path, what, why)` for what it did and `Row(path, what, why, done=False)` for what it
    left alone, and returns `Outcome(name, rows)` with its result:

        rows = [Row("a/norm", "folded into a/conv"), Row("head/norm", "LayerNorm", "no layer follows it", done=False)]
        return folded, Outcome("fold", rows)

    Args:
      tool: the name of the tool.
      rows: in the order of the model. Any iterable; kept as a tuple.

    >>> from jaxnorm import models
    >>> outcome = models.Outcome("swap", [models.Row("a/norm", "BatchNorm -> GroupNorm", "kept scale, bias")])
    >>> outcome = models.Outcome("swap", [*outcome, models.Row("head", "LayerNorm", "no rule matches it", done=False)])
    >>> print(outcome)
    swap: 1 changed, 1 left alone
      path    what                   why
    + a/norm  BatchNorm -> GroupNorm kept scale, bias
      head    LayerNorm              no rule matches it
    >>> [row.path for row in outcome.changed], outcome["head"].why
    (['a/norm'], 'no rule matches it')
    """

    tool: str
    rows: tuple[Row, ...]

    def __init__(self, tool: str, rows: Iterable[Row]):
        object.__setattr__(self, "tool", tool)
        object.__setattr__(self, "rows", tuple(rows))

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows of what was done."""
        return tuple(row for row in self.rows if row.done)

    @property
    def left(self) -> tuple[Row, ...]:
        """The rows of what was left alone."""
        return tuple(row for row in self.rows if not row.done)

    def __getitem__(self, path: str) -> Row:
        """The first row of a path."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(f"{self.tool}: no row of the path {path!r}. There are {[row.path for row in self.rows]}.")

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [("path", "what", "why"), *((row.path or '""', row.what, row.why) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(2)]
        marks = [" ", *("+" if row.done else " " for row in self.rows)]
        table = [
            f"{mark} {path:{widths[0]}}  {what:{widths[1]}} {why}".rstrip()
            for mark, (path, what, why) in zip(marks, lines, strict=True)
        ]
        title = f"{self.tool}: {len(self.changed)} changed, {len(self.left)} left alone"
        return "\n".join([title, *table]) if self.rows else title

    __repr__ = __str__
