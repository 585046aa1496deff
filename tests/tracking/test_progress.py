"""What a person sees while it runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from rlhf_fast.tracking import Progress
from rlhf_fast.tracking.numbers import duration, short


def test_without_a_terminal_the_first_and_the_last_step_get_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, 2, "ppo", interval=1e9)
    for step in (3, 4, 5):
        progress.update(step, {"score": step / 3, "KL": 2.0, "tokens/s": 5123.4})
    progress.close()
    out, err = capsys.readouterr()
    first, last = err.splitlines()
    assert out == ""
    assert first.startswith("ppo 3/5  score 1  KL 2  tokens/s 5,123  ")
    assert first.endswith(" left")
    assert last == "ppo 5/5  score 1.67  KL 2  tokens/s 5,123"


def test_a_run_that_ends_early_still_shows_its_last_step_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(100, description="sft", interval=1e9)
    for step in (1, 2, 3):
        progress.update(step, {"loss": 0.5})
    progress.close()
    progress.close()
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["1/100", "3/100"]


def test_disabled_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, disable=True)
    progress.update(2, {"loss": 1.0})
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [100, 0])  # 0: a terminal that does not know its width, as under some CI
def test_on_a_terminal_there_is_a_bar_with_the_numbers(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress(4, 0, "ppo")
        progress.update(3, {"score": 0.25, "KL": 1.5})
        progress.close()
    written = b""
    with contextlib.suppress(OSError):  # the end, for a terminal whose other side is closed
        while chunk := os.read(ours, 65536):
            written += chunk
    os.close(ours)
    shown = written.decode()
    assert "ppo 3/4" in shown
    assert "left, score 0.250  KL 1.50" in shown


def test_numbers_are_short() -> None:
    values = [None, float("nan"), 0.0, 3.0, 0.01234, -1.2345, 123.4, 12345.6, 2.34e-6, 1e-6, 5e9]
    shown = ["–", "–", "0", "3", "0.0123", "-1.23", "123", "12,346", "2.3e-6", "1e-6", "5e9"]
    assert [short(value) for value in values] == shown
    assert [duration(s) for s in (0.25, 59.6, 192, 7500)] == ["0.2 s", "1 min 0 s", "3 min 12 s", "2 h 5 min"]
