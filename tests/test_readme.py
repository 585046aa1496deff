"""README's Python runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.trainers.conftest import read_metrics, save_letters_model, write_jsonl

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_letters_model(tmp_path / "runs/demo/sft/final")
    (tmp_path / "runs/demo/data").mkdir()
    write_jsonl(tmp_path / "runs/demo/data/prompts_train.jsonl", [{"prompt": p} for p in "abcd"])
    examples = blocks("python")
    assert len(examples) >= 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert len(read_metrics(tmp_path / "runs/concise")) == 3


def test_commands_name_files_and_subcommands_that_exist() -> None:
    from rlhf_fast.cli import main

    commands = [line for block in blocks("sh") for line in block.splitlines() if "rlhf-fast " in line]
    assert len(commands) >= 6
    for line in commands:
        with pytest.raises(SystemExit) as exit_:
            main([line.split()[1], "--help"])
        assert exit_.value.code == 0
        for path in re.findall(r"recipes/\S+", line):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
