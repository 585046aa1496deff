"""Rows of a data set, and what becomes of the bad ones.

`load_rows` reads files (files.py), checks every record (schema.py) and keeps the place of each row, so that whatever
goes wrong with it later can still be named as file:line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from rlhf_fast.data.files import read_records
from rlhf_fast.data.schema import Kind, RowError, check_row
from rlhf_fast.errors import DataError

OnBadRow = Literal["error", "skip"]

_SHOWN = 3  # bad rows that a message spells out


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `line` counts from 1: the line of a JSONL file, else the number of the row."""

    path: str
    line: int
    field: str | None
    reason: str

    def __str__(self) -> str:
        field = f"field '{self.field}': " if self.field else ""
        return f"{self.path}:{self.line}: {field}{self.reason}"


class Rows(Sequence[dict[str, Any]]):
    """Checked rows in the order of the files, with their places and the bad rows left out.

    A row holds the fields of its kind only (schema.py), for kind "prompt" all of its columns.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        places: list[tuple[str, int]],
        bad_rows: list[BadRow],
        on_bad_row: OnBadRow,
    ) -> None:
        self._rows = rows
        self.places = places  # (path, line) of each row
        self.bad_rows = bad_rows
        self.on_bad_row: OnBadRow = on_bad_row

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Rows:
        if isinstance(index, slice):  # a part of the rows answers only for what becomes bad in it later
            return Rows(self._rows[index], self.places[index], [], self.on_bad_row)
        return self._rows[index]

    def report(self) -> str:
        """One line on the bad rows left out; "" if there are none."""
        return report_bad_rows(self.bad_rows, len(self))


def load_rows(path: str | os.PathLike[str] | Sequence[str], *, kind: Kind, on_bad_row: OnBadRow = "error") -> Rows:
    """Rows of one or several JSONL files, Parquet files or folders written by `datasets.save_to_disk`, joined.

    kind: "sft", "preference" or "prompt"; the fields of each are in docs/data.md.
    on_bad_row: "error" raises if any row is bad; "skip" leaves bad rows out and lists them in `.bad_rows`.

    Raises DataError for a file that is missing, unreadable or empty, for a bad row with "error", and if no good row is
    left with "skip". The message names file, line and field, and what to do.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip', not {on_bad_row!r}")
    paths = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else [os.fspath(p) for p in path]
    if not paths:
        raise DataError("no data file is given; name a .jsonl file, a .parquet file or a saved `datasets` folder")
    rows: list[dict[str, Any]] = []
    places: list[tuple[str, int]] = []
    bad_rows: list[BadRow] = []
    for name in paths:
        read_before = len(rows) + len(bad_rows)
        for line, record in read_records(name):
            try:
                if isinstance(record, RowError):
                    raise record
                rows.append(check_row(record, kind))
                places.append((name, line))
            except RowError as error:
                bad_rows.append(BadRow(name, line, error.field, error.reason))
        if len(rows) + len(bad_rows) == read_before:
            raise DataError(f"{name}: there is no row in it")
    settle_bad_rows(bad_rows, len(rows), on_bad_row)
    return Rows(rows, places, bad_rows, on_bad_row)


def settle_bad_rows(bad_rows: Sequence[BadRow], good: int, on_bad_row: OnBadRow) -> None:
    """Raise DataError if bad rows are errors, or if no good row is left."""
    if not bad_rows:
        return
    if on_bad_row == "error":
        one = len(bad_rows) == 1
        advice = f"Mend {'it' if one else 'them'}, or leave bad rows out with on_bad_row=skip."
        if one:
            raise DataError(f"{bad_rows[0]}. {advice}")
        raise DataError("\n".join([f"{len(bad_rows):,} bad rows:", *_first(bad_rows, "  "), advice]))
    if not good:
        raise DataError("\n".join([f"all {len(bad_rows):,} rows are bad, none is left:", *_first(bad_rows, "  ")]))


def report_bad_rows(bad_rows: Sequence[BadRow], good: int) -> str:
    """One line that counts bad rows among good ones and spells out the first few; "" if there are none."""
    if not bad_rows:
        return ""
    return f"{len(bad_rows):,} of {len(bad_rows) + good:,} rows left out: {'; '.join(_first(bad_rows))}"


def _first(bad_rows: Sequence[BadRow], indent: str = "") -> list[str]:
    lines = [f"{indent}{row}" for row in bad_rows[:_SHOWN]]
    if len(bad_rows) > _SHOWN:
        lines.append(f"{indent}and {len(bad_rows) - _SHOWN:,} more")
    return lines
