"""Rows on disk: nothing lost by kill -9, nothing left over after a resume, any text byte for byte."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_fast.tracking.jsonl import JsonLines, drop_rows_after, encode_line, read_rows


def write(path: Path, *lines: str) -> bytes:
    data = "".join(lines).encode()
    path.write_bytes(data)
    return data


def test_resume_keeps_rows_up_to_the_step_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    kept = '{"step":1,  "loss": 1.50}\n{"step": 2, "text": "é 你好"}\n'
    write(path, kept, '{"step": 3}\n', '{"step": 2, "late": true}\n', '{"step": 4, "lo')
    drop_rows_after(path, 2)
    assert path.read_text() == kept + '{"step": 2, "late": true}\n'


@pytest.mark.parametrize(
    "torn",
    ['{"step": 3, "loss": 0.1', '{"step": 3}', "", '{"step": 3, "x": tru\n', '"step"\n', "\0\0\0\0", '{"step": "3"}\n'],
)
def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 1}\n{"step": 2}\n', torn)
    with JsonLines(path, resume_step=3) as lines:
        lines.write({"step": 4})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 4}\n'


def test_a_new_run_empties_old_files(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, '{"step": 0}\n{"step": 1}\n')
    JsonLines(path, resume_step=0).close()
    assert path.read_bytes() == b""


def test_an_interrupted_drop_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    before = write(path, '{"step": 1}\n{"step": 2}\n{"step": 3}\n')

    def fail(source: object, target: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        drop_rows_after(path, 1)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.jsonl"]


def write_for_ever(path: Path, said: Connection) -> None:
    lines = JsonLines(path)
    for step in itertools.count(1):
        lines.write({"step": step, "text": "x" * 5000})
        said.send(step)


def test_kill_9_loses_no_row_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=write_for_ever, args=(path, theirs))
    process.start()
    said = [ours.recv() for _ in range(50)]
    process.kill()
    process.join()
    rows, _ = read_rows(path)
    assert [row["step"] for row in rows[:50]] == said
    with JsonLines(path, resume_step=50) as lines:
        lines.write({"step": 51})
    rows, bad = read_rows(path)
    assert [row["step"] for row in rows] == list(range(1, 52))
    assert bad == 0


def test_values_that_json_has_no_word_for() -> None:
    row = {
        "step": 1,
        "nan": float("nan"),
        "inf": [float("inf"), {"deep": -float("inf")}],
        "tensor": torch.tensor(0.5),
        "numpy": np.float32("nan"),
        "count": np.int64(3),
        "true": True,
    }
    assert json.loads(encode_line(row)) == {
        "step": 1,
        "nan": None,
        "inf": [None, {"deep": None}],
        "tensor": 0.5,
        "numpy": None,
        "count": 3,
        "true": True,
    }
    with pytest.raises(TypeError, match="set"):
        encode_line({"step": 1, "x": {1, 2}})


@pytest.mark.parametrize(
    "text",
    ["你好，世界", "مرحبا", "नमस्ते", "👩‍👩‍👧 ok", "lone \ud83d surrogate", "\u2028\u0085\r\n\t\0", "\\ud800 is text"],
)
def test_text_in_any_script_comes_back_exactly(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1, "text": text})
    assert path.read_bytes().count(b"\n") == 1
    assert read_rows(path) == ([{"step": 1, "text": text}], 0)
    if "\ud83d" not in text and text.isprintable() and "\\" not in text:
        assert text.encode() in path.read_bytes()  # as itself, not as \u escapes
