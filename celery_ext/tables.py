"""Tables for terminals: by rich where it is installed, plain otherwise and in pipes.

Pure, but for `show`, which asks how wide the terminal is.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Column", "plain", "show", "size"]

#: Columns of a terminal from which `Column.wide` ones are shown.
WIDE = 120

#: A column that is cut keeps this many characters.
LEAST = 8


@dataclass(frozen=True, slots=True)
class Column:
    """One column."""

    title: str
    right: bool = False
    #: Never cut.
    keep: bool = False
    #: Only where there is room.
    wide: bool = False
    #: Only if a row has something in it.
    optional: bool = False


def show(ctx: Any, columns: Sequence[Column], rows: Sequence[Sequence[object]]) -> None:
    """Print a table as Celery's context prints; *rows* have a value for each column."""
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    narrow = width is not None and width < WIDE
    shown = [
        index
        for index, column in enumerate(columns)
        if not (narrow and column.wide)
        and not (column.optional and all(row[index] in (None, "") for row in rows))
    ]
    columns = [columns[index] for index in shown]
    rows = [[row[index] for index in shown] for row in rows]
    if width is not None and _show_rich(ctx, columns, rows, width):
        return
    for line in plain(columns, rows, width):
        ctx.echo(line)


def _show_rich(
    ctx: Any, columns: Sequence[Column], rows: Sequence[Sequence[object]], width: int
) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    # rich would shrink all columns in proportion, and leave out the last ones.
    widths = _fitted(columns, [_widest(columns, rows, column) for column in columns], width)
    for column, room in zip(columns, widths, strict=True):
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            width=room,
        )
    for row in rows:
        # As text: a task's name or an error may look like rich's markup.
        table.add_row(*(Text(_cell(value)) for value in row))
    Console(width=width, no_color=ctx.no_color, highlight=False).print(table)
    return True


def _widest(columns: Sequence[Column], rows: Sequence[Sequence[object]], column: Column) -> int:
    index = columns.index(column)
    return max([len(column.title), *(len(_cell(row[index])) for row in rows)])


def plain(
    columns: Sequence[Column], rows: Sequence[Sequence[object]], width: int | None = None
) -> list[str]:
    """Return the lines of a table, cut to *width* characters (None: not cut)."""
    cells = [[_cell(value) for value in row] for row in rows]
    table = [[column.title.upper() for column in columns], *cells]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    if width is not None:
        widths = _fitted(columns, widths, width)
    lines = []
    for row in table:
        parts = []
        for cell, column, room in zip(row, columns, widths, strict=True):
            text = cell if len(cell) <= room else cell[: room - 1] + "…"
            parts.append(text.rjust(room) if column.right else text.ljust(room))
        lines.append("  ".join(parts).rstrip())
    return lines


def _fitted(columns: Sequence[Column], widths: list[int], width: int) -> list[int]:
    """Take from the widest column that may be cut, until the line fits or none is left."""
    widths = list(widths)
    over = sum(widths) + 2 * (len(widths) - 1) - width
    while over > 0:
        room = [0 if c.keep else w - LEAST for c, w in zip(columns, widths, strict=True)]
        widest = max(range(len(widths)), key=lambda index: room[index])
        if room[widest] <= 0:
            break
        widths[widest] -= 1
        over -= 1
    return widths


def _cell(value: object) -> str:
    """Return one line: what a task's message has in it must not break a table."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    return "".join(char if char.isprintable() else " " for char in text)


def size(size_bytes: int) -> str:
    """Return bytes for people: ``512 B``, ``1.5 MiB``."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
