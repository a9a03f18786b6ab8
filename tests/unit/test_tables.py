from __future__ import annotations

import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_ext import tables
from celery_ext.tables import Column, plain, show, size

COLUMNS = [Column("id", right=True, keep=True), Column("task"), Column("note")]
ROWS: list[list[object]] = [["1", "shop.pay", "no such card"], ["100", "mail.send", None]]


def test_columns_are_as_wide_as_they_need() -> None:
    assert plain(COLUMNS, ROWS) == [
        " ID  TASK       NOTE",
        "  1  shop.pay   no such card",
        "100  mail.send",
    ]


def test_the_widest_column_is_cut_first() -> None:
    rows: list[list[object]] = [["123456", "a" * 30, "b" * 60]]

    assert plain(COLUMNS, rows, 80)[1] == f"123456  {'a' * 30}  {'b' * 39}…"
    assert plain(COLUMNS, rows, 60)[1] == f"123456  {'a' * 24}…  {'b' * 24}…"
    # There is a least width, and what may not be cut is not.
    assert plain(COLUMNS, rows, 10)[1] == "123456  aaaaaaa…  bbbbbbb…"


@given(
    st.lists(st.lists(st.text(max_size=40), min_size=3, max_size=3), max_size=5),
    st.integers(40, 200),
)
def test_any_text_stays_in_its_line_and_width(rows: list[list[str]], width: int) -> None:
    columns = [Column("a"), Column("b", right=True), Column("c")]

    lines = plain(columns, rows, width)

    assert len(lines) == len(rows) + 1
    assert all(len(line) <= width for line in lines)
    assert all("\n" not in line and "\x1b" not in line for line in lines)


class Context:
    """The part of Celery's context that prints."""

    no_color = True

    def __init__(self) -> None:
        self.lines: list[str] = []

    def echo(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("drawn_by", ["rich", "plain"])
def test_a_narrow_terminal_leaves_wide_columns_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    drawn_by: str,
    columns: int,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    if drawn_by == "plain":
        monkeypatch.setattr(tables, "_show_rich", lambda *args: False)
    shown = [Column("queue"), Column("detail", wide=True), Column("state", optional=True)]
    context = Context()

    show(context, shown, [["a" * 100, "high 1", ""], ["b[red]", "low 2", None]])

    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = context.lines or printed.splitlines()
    assert all(len(line) <= columns for line in lines)
    assert ("high 1" in lines[1]) is (columns == 160)
    assert "state" not in lines[0].lower()
    assert "b[red]" in lines[2]


def test_in_a_pipe_nothing_is_left_out_or_cut(capsys: pytest.CaptureFixture[str]) -> None:
    context = Context()

    show(context, [Column("queue"), Column("detail", wide=True)], [["q" * 300, "d"]])

    assert context.lines == [f"{'QUEUE'.ljust(300)}  DETAIL", f"{'q' * 300}  d"]


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 1024**2, "5.0 MiB"),
        (1024**4, "1024.0 GiB"),
    ],
)
def test_sizes_have_a_fitting_unit(size_bytes: int, shown: str) -> None:
    assert size(size_bytes) == shown


def test_no_number_is_cut_for_a_long_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    numbers = ["ready", "in flight", "delayed", "redelivered", "consumers", "oldest", "rate"]
    columns = [Column("queue"), *(Column(name, right=True, keep=True) for name in numbers)]
    rows: list[list[object]] = [["q" * 63, 1, 22, 333, 4444, 5, "6 s", "7.0"]]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")

    show(Context(), columns, rows)

    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # the head is bold
    head, row = printed.splitlines()
    assert head.split() == " ".join(["queue", *numbers]).split()
    assert row.split()[1:] == ["1", "22", "333", "4444", "5", "6", "s", "7.0"]
    assert row.startswith("qqqqqqq")
    assert len(row) <= 80
