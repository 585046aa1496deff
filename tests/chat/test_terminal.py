"""`rlhf-fast chat` over a pipe and on a terminal."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.chat.terminal import _coloured
from rlhf_fast.cli import main

ROOT = Path(__file__).parents[2]


def piped(
    model: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *options: str, stdout: io.StringIO | None = None
) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    if stdout is not None:
        monkeypatch.setattr(sys, "stdout", stdout)
    return main(["chat", "--model", str(model), "--max_new_tokens", "12", "--seed", "0", *options])


def test_one_line_in_one_answer_out(
    tiny_chat_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(tiny_chat_llama, "你好\n", monkeypatch) == 0
    first = capsys.readouterr().out
    assert first.endswith("\n")
    assert "\033" not in first
    assert piped(tiny_chat_llama, "你好\n\n/reset\n你好\n/exit\nnever read\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == first + first  # after /reset the same question has the same answer
    assert err.splitlines()[-1] == "a new conversation"
    assert piped(tiny_chat_llama, "你好\n你好\n", monkeypatch) == 0
    both = capsys.readouterr().out
    assert both.startswith(first)
    assert both != first + first  # the first exchange was remembered
    assert piped(tiny_chat_llama, "你好\n", monkeypatch, "--system_prompt", "Be kind.") == 0
    system = capsys.readouterr().out
    assert system != first
    assert piped(tiny_chat_llama, "/system Be kind.\n你好\n", monkeypatch) == 0
    assert capsys.readouterr().out == system


def test_mistakes_are_named(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(tiny_llama, "/sytem x\n/system x\n", monkeypatch) == 0
    err = capsys.readouterr().err
    assert "no command /sytem: /system TEXT" in err
    assert "a system prompt needs a chat template" in err
    assert piped(tiny_llama, "x\n", monkeypatch, "--system_prompt", "x") == 2
    assert piped(tiny_llama, "x\n", monkeypatch, "--top_p", "2") == 2
    assert piped(tiny_llama, "x\n", monkeypatch, "--temperature", "nan") == 2
    assert piped(tiny_llama, "x\n", monkeypatch, "--max_new_tokens", "0") == 2
    assert "max_new_tokens: must be at least 1" in capsys.readouterr().err


class Interrupting(io.StringIO):
    """Presses Ctrl-C when the first piece of an answer is written."""

    pressed = False

    def write(self, text: str) -> Any:
        written = super().write(text)
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return written


def test_ctrl_c_ends_the_answer_and_not_the_program(tiny_chat_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Interrupting()
    assert piped(tiny_chat_llama, "one\ntwo\n", monkeypatch, stdout=out) == 0
    first, _, second = out.getvalue().partition(" ...\n")
    assert len(first) == 1
    assert len(second) > 1


def test_on_a_terminal(tiny_chat_llama: Path) -> None:
    """The prompt is coloured, Ctrl-C at the prompt does nothing, Ctrl-D ends."""
    screen, keyboard = pty.openpty()
    command = [sys.executable, "-m", "rlhf_fast.cli", "chat", "--model", str(tiny_chat_llama), "--max_new_tokens", "8"]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=keyboard, stdout=keyboard, stderr=keyboard)
    try:
        os.close(keyboard)
        seen = _read(screen, until=b"> ")
        assert b"\033[1m> " in seen
        os.write(screen, "你好\n".encode())
        seen += _read(screen, until=b"> ")
        process.send_signal(signal.SIGINT)
        seen += _read(screen, until=b"> ")
        os.write(screen, b"\x04")
        assert process.wait(timeout=60) == 0
        assert seen.count(b"/reset starts over") == 2  # at the start and after Ctrl-C
    finally:
        process.kill()
        os.close(screen)


def test_colours_are_for_terminals_whose_user_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, keyboard = pty.openpty()
    with os.fdopen(keyboard, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert _coloured(terminal)
        assert not _coloured(io.StringIO())
        monkeypatch.setenv("TERM", "dumb")
        assert not _coloured(terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", "1")
        assert not _coloured(terminal)
    os.close(screen)


def _read(screen: int, until: bytes) -> bytes:
    """What the program writes, up to a prompt after a new line."""
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([screen], [], [], 0.2)[0]:
            seen += os.read(screen, 4096)
        elif until in seen[-16:]:
            return seen
    raise AssertionError(f"no {until!r} came: {seen!r}")
