"""The README's tables are what `make bench` wrote last."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import readme, summary

README = (readme.ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_shows_the_newest_results() -> None:
    assert readme.with_tables(README) == README
    for suffix in (".md", ".png"):
        assert readme.newest().with_suffix(suffix).is_file()


def test_small_pages_are_not_shown_even_if_midnight_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("2026-01-01-cpu-2-threads", "2026-01-02-cpu-2-threads", "2026-01-03-cpu-2-threads-small-pages"):
        (tmp_path / f"{name}.json").touch()
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.newest().stem == "2026-01-02-cpu-2-threads"


@pytest.mark.parametrize("name", ["kernels", "generation"])
def test_it_has_a_place_for_each_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "tables", lambda *_: {name: "a new table\n"})
    assert f"<!-- {name}: bench/results -->\na new table\n<!-- end -->\n" in readme.with_tables(README)


def test_a_table_without_a_place_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "tables", lambda *_: {"rest": "a new table\n"})
    assert readme.with_tables(README) == README


def test_each_bench_of_generation_has_its_table() -> None:
    group = summary.Group("job", "decode", {"rlhf_fast": 1.0, "llama.cpp": 1.5})
    assert "| job | 1,000 | 1.5x llama.cpp |" in summary.tables([group], {})["generation"]
