"""docs/explanation/delivery-guarantees.md names tests; they must exist."""

from __future__ import annotations

import re

import pytest

from tests.servers import ROOT

PAGE = (ROOT / "docs" / "explanation" / "delivery-guarantees.md").read_text()
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)


def test_every_guarantee_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "---" not in line]

    assert len(rows) > 20
    assert [row for row in rows[1:] if not re.search(r"`test_\w+\.py::test_\w+`", row)] == []


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[f"{file}::{test}" for file, test in NAMED])
def test_the_tests_exist(file: str, test: str) -> None:
    found = [path for path in (ROOT / "tests").glob(f"*/{file}") if f"def {test}(" in _text(path)]

    assert len(found) == 1


def _text(path: object) -> str:
    with open(str(path)) as file:
        return file.read()
