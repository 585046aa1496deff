"""docs/cuda_on_cpu.md: its example runs and prints what it says, its table is what the tests assert."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .test_faults import FAULTS, RIGHT, WRONG

HERE = Path(__file__).parent
PAGE = (HERE.parent.parent / "docs" / "cuda_on_cpu.md").read_text(encoding="utf-8")


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (printed,) = re.findall(r"prints\n\n```\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(example, "cuda_on_cpu.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == printed


def test_the_table_of_faults() -> None:
    words = {RIGHT: "–", WRONG: "values"}
    expected = [(kernel, *(words.get(found, "report") for found in columns)) for kernel, columns in FAULTS.items()]
    assert re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\S+) \|$", PAGE, re.MULTILINE) == expected


def test_the_table_of_files() -> None:
    named = set(re.findall(r"[\w/]+\.(?:cpp|h|py)\b", PAGE.partition("## How it works")[2]))
    for path in [*HERE.glob("*.h"), *(HERE / "runtime").glob("*.cpp"), HERE / "build.py", HERE / "device.py"]:
        if path.name not in ("launch.h", "site.h", "python.cpp"):
            assert named & {path.name, f"runtime/{path.name}"}, path.name
