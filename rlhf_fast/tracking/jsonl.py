"""JSON Lines that survive crashes: one object a line, each with a step; on resume what came after it is dropped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO


def json_value(value: Any) -> Any:
    """`value` as JSON can say it: NaN and infinities become None, tensors and NumPy values plain numbers."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    raise TypeError(f"cannot write a {type(value).__name__} to a JSON line")


def encode_line(row: Mapping[str, Any]) -> bytes:
    """One line of UTF-8. Text stays as it is; only lone surrogates, which UTF-8 has no bytes for, are escaped."""
    text = json.dumps(json_value(row), ensure_ascii=False, allow_nan=False)
    # Python's escape for a surrogate, \udc80, is also JSON's.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The row of one line, or None: cut off (no newline), not JSON, or not an object with a whole number as step."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    return row


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole rows of a file and the number of lines that are not one. A missing file has no rows."""
    if not path.exists():
        return [], 0
    with path.open("rb") as file:
        rows = [parse_line(line) for line in file]
    good = [row for row in rows if row is not None]
    return good, len(rows) - len(good)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on the disk; on an error `path` stays."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def drop_rows_after(path: Path, step: int) -> None:
    """Keep the whole rows up to and with `step`, byte for byte. Step 0 is a new run: nothing is kept."""
    if not path.exists():
        return
    with path.open("rb") as source, replacing(path) as target:
        for line in source if step else ():
            row = parse_line(line)
            if row is not None and row["step"] <= step:
                target.write(line)


class JsonLines:
    """Appends rows to a file; each is on its way to the disk when `write` returns.

    Args:
        path: created with its folders if missing.
        resume_step: the step that the run continues after; later rows and a line cut off by a crash are dropped.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_rows_after(path, resume_step)
        self._path = path
        self._file = path.open("ab", buffering=0)  # unbuffered: kill -9 finds nothing left to lose

    def write(self, *rows: Mapping[str, Any]) -> None:
        view = memoryview(b"".join(encode_line(row) for row in rows))
        try:
            while view:  # an unbuffered write may take only a part
                view = view[self._file.write(view) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None  # the system names no file

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
