"""A damaged newest checkpoint: a resume names it, takes the one before, and ends with the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Workplace, assert_same
from .moments import Strike


def largest(folder: Path) -> Path:
    return max(folder.rglob("*.pt"), key=lambda file: file.stat().st_size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda folder: os.truncate(largest(folder), 1000), "has 1000 bytes instead of"),
    "a byte flipped": (lambda folder: flip(largest(folder)), "does not have the bytes that were saved"),
    "a file missing": (lambda folder: largest(folder).unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize(
    "damage", ["cut short", *(pytest.param(name, marks=pytest.mark.slow) for name in DAMAGE if name != "cut short")]
)
def test_the_one_before_is_used(
    damage: str, workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]
) -> None:
    killed = Strike("a step in the metrics, not yet saved", 7, signal.SIGKILL)
    assert workplace.run("run", at=killed) == -signal.SIGKILL, workplace.log("run")
    assert workplace.steps("run") == [4, 6]
    spoil, message = DAMAGE[damage]
    newest = workplace.folder / "run" / "checkpoints" / "step-6"
    spoil(newest)
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    (line,) = [line for line in workplace.log("run").splitlines() if "is damaged" in line]
    assert str(newest) in line
    assert message in line
    assert_same(workplace.folder / "run", uninterrupted[0])
