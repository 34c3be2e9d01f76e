"""What a conversion did, as a table; and what did not fit, as an error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One array of the target: where it came from, and what was done to it."""

    source: str  # path in the source, "" where it has none
    target: str  # path in the target, "" where it was not needed
    shape: tuple[int, ...]  # in the target
    how: str  # "as it is", "OIHW -> HWIO", ...


class Report(tuple[Row, ...]):
    """The rows of a conversion, one for each array. Its text is a table.

    >>> print(Report([Row("conv.weight", "params/conv/kernel", (3, 3, 4, 8), "OIHW -> HWIO")]))
    from         to                  shape         how
    conv.weight  params/conv/kernel  (3, 3, 4, 8)  OIHW -> HWIO
    """

    def __str__(self) -> str:
        lines = [("from", "to", "shape", "how")]
        lines += [(row.source or "-", row.target or "-", str(row.shape), row.how) for row in self]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join("  ".join((*map(str.ljust, line, widths), line[3])).rstrip() for line in lines)

    __repr__ = __str__


class ConversionError(ValueError):
    """Something does not fit, and nothing was changed. `refused` has a (path, reason) for each."""

    def __init__(self, name: str, refused: Sequence[tuple[str, str]]):
        self.refused: tuple[tuple[str, str], ...] = tuple(refused)
        shown = "\n".join(f"  {path}: {reason}" for path, reason in self.refused[:20])
        more = f"\n  and {len(self.refused) - 20} more" if len(self.refused) > 20 else ""
        super().__init__(f"{name}: nothing was changed, because this does not fit:\n{shown}{more}")
        self._given = name, self.refused

    def __reduce__(self) -> tuple[type[ConversionError], tuple[str, tuple[tuple[str, str], ...]]]:
        return type(self), self._given  # so that processes can send it
