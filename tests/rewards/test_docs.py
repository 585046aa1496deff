"""docs/rewards.md says what happens: its files are written, its code is run, its output is what comes out."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import load_config
from rlhf_fast.rewards import load_reward, reward_sources

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for _, name, text in BLOCKS:
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_code_prints_what_the_page_says() -> None:
    names: dict[str, Any] = {}
    compared = 0
    for (language, name, code), (_, _, expected) in itertools.pairwise(BLOCKS):
        if language != "python" or name:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(code, names)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        # In comprehensions Python 3.12 and later know the row by what was taken, earlier ones by the variable.
        known = {text.replace("the last row that it took was ", "") for text in (printed.getvalue(), expected)}
        assert len(known) == 1, known
        compared += 1
    assert compared == 2


def test_the_functions() -> None:
    assert load_reward("judge.py:concise").score(["p"], ["word " * 20]).total.tolist() == [0]
    assert load_reward("remote.py:judged").score(["p", "q"], ["a", "bb"]).total.tolist() == [1, 2]


def test_the_config(folder: Path) -> None:
    config = load_config(PPOConfig, folder / "ppo.yaml")
    assert [(source.name, source.weight) for source in reward_sources(config.reward)] == [
        ("reward", 1),
        ("correct", 2),
        ("brevity", 0),
    ]


def test_the_server() -> None:
    command = [sys.executable, "server.py", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        try:
            assert load_reward(url).score(["p", "q"], ["a", "bb"], answer=[1, 2]).total.tolist() == [1, 2]
        finally:
            server.kill()
