"""Tables as plain text, and by rich where it is installed."""

from __future__ import annotations

from typing import Any


def as_text(columns: list[str], rows: list[list[str]]) -> str:
    """Columns under their names, numbers to the right."""
    numbers = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    place = lambda cells: "  ".join(
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(cells, widths, numbers, strict=True)
    ).rstrip()
    return "\n".join(map(place, [columns, ["-" * width for width in widths], *rows]))


def _is_number(cell: str) -> bool:
    try:
        return cell == "" or float(cell.rstrip("%")) is not None
    except ValueError:
        return False


def rich_table(columns: list[str], rows: list[list[str]], notes: list[str]) -> Any:
    """The same for `rich.print`."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_edge=False)
    for i, name in enumerate(columns):
        number = all(_is_number(row[i]) for row in rows)
        table.add_column(name, justify="right" if number else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*map(escape, row))
    return Group(table, "", *map(escape, notes))


def print_table(shown: Any) -> None:
    """Print an object that has `__rich__` and `__str__`."""
    try:
        import rich
    except ImportError:
        print(shown)
    else:
        rich.print(shown)
