"""docs/faults.md: every row says what is lost and how one recovers, and names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in LINES
    if line.startswith("| ") and not line.startswith("| fault ") and "tests/" in line
]


def test_all_rows_are_checked_here() -> None:
    headings = sum(line.startswith("| fault ") for line in LINES)
    rows = sum(line.startswith("| ") for line in LINES) - headings
    soak = sum(bool(re.match(r"\| (steps|\d)", line)) for line in LINES)
    assert headings == 5
    assert len(ROWS) == rows - soak > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_is_whole(row: list[str]) -> None:
    assert len(row) == 5
    assert all(row)
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[4])
    assert len(tests) == row[4].count("tests/") > 0
    for file, name in tests:
        functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        assert name in functions, f"{file} has no {name}"
