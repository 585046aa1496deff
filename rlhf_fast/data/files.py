"""Records of a data file, each with its place. Three formats: JSON Lines, Parquet, a saved `datasets` folder.

JSON Lines are parsed here, line by line, so that an error can name the line. A file that cannot be read at all raises
DataError; a single record that cannot be read is yielded as a RowError and the next one follows.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_fast.data.schema import RowError
from rlhf_fast.errors import DataError

Record = tuple[int, Any]  # number of the line or row, from 1; a JSON value or a RowError

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1000  # rows of Parquet and `datasets` turned into Python objects at once


def read_records(name: str) -> Iterator[Record]:
    """Yield (line, record) of the file or folder `name`. Raises DataError if it is missing or not a data set."""
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            yield from _saved_dataset(path)
        elif not path.exists():
            raise DataError(f"{name}: no such file or folder{_similar(path)}. Data is read from disk only.")
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix in (".jsonl", ".ndjson", ".json"):
            yield from _json_lines(path)
        else:
            raise DataError(f"{name}: the name must end in .jsonl or .parquet, or be a saved `datasets` folder")
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _similar(path: Path) -> str:
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _json_lines(path: Path) -> Iterator[Record]:
    # Bytes, not text: only \n ends a line (U+2028 and its like are data), and a bad byte spoils its own line alone.
    with path.open("rb") as file:
        start = 0
        for number, raw in enumerate(file, 1):
            body = raw
            if number == 1:
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path}: is UTF-16; save it as UTF-8")
                if raw[:2] == b"\x1f\x8b":
                    raise DataError(f"{path}: is compressed with gzip; unpack it first")
                body = raw.removeprefix(_BOM)
            if body.strip():
                yield number, _parse(body, start + len(raw) - len(body))
            start += len(raw)


def _parse(body: bytes, start: int) -> Any:
    """The JSON value of one line, or a RowError. start: offset of its first byte in the file."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = body[error.start]
        return RowError(
            None, f"not UTF-8: byte 0x{byte:02x} at offset {error.start} of the line, {start + error.start} of the file"
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if text.strip() in ("[", "{") or (text.lstrip().startswith("[") and start == 0):
            return RowError(None, "not JSON Lines: write each row as one object on one line, with no list around them")
        cut = "; the line breaks off there" if error.pos >= len(text.rstrip()) else ""
        return RowError(None, f"not valid JSON: {error.msg} at column {error.colno}{cut}")
    except RecursionError:
        return RowError(None, "not usable JSON: nested too deeply")
    except ValueError as error:  # a number of thousands of digits
        return RowError(None, f"not usable JSON: {error}")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_CHUNK):
                for record in _batch_rows(batch):
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, NotImplementedError) as error:
        raise DataError(f"{path}: not a Parquet file, or a damaged one: {_one_line(error)}") from error


def _batch_rows(batch: Any) -> Iterator[Any]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # Arrow does not check its strings: find the rows that hold the bad ones
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            yield RowError(None, f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of a text")


def _saved_dataset(path: Path) -> Iterator[Record]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(p.parent) for p in path.glob("*/state.json")))
        raise DataError(f"{path}: holds several splits; name one of them: {splits}")
    if not (path / "state.json").is_file():
        inside = sorted(str(p) for pattern in ("*.jsonl", "*.parquet") for p in path.glob(pattern))
        advice = f"name the files themselves: {', '.join(inside[:5])}" if inside else "name a .jsonl or .parquet file"
        raise DataError(f"{path}: a folder, but not one that datasets.save_to_disk has written; {advice}")
    import datasets
    import pyarrow

    number = 0
    try:
        # Arrow, not Python, format: features such as images stay undecoded.
        dataset = datasets.load_from_disk(str(path)).with_format("arrow")
        for table in dataset.iter(batch_size=_CHUNK):
            for batch in table.to_batches():
                for record in _batch_rows(batch):
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: a damaged `datasets` folder: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
