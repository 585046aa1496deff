"""Puts the newest results into the README, between the marks <!-- NAME: bench/results --> and <!-- end -->.

    python -m bench.readme

`make bench` ends with it. NAME is a table of bench/summary.py; one that was not measured stays as it is, and one for
which there are no marks is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

from bench.summary import Group, tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def newest() -> Path:
    """The latest run's JSON file; a run with small pages is none of the README's."""
    return max(file for file in RESULTS.glob("*.json") if not file.stem.endswith("-small-pages"))


def with_tables(readme: str) -> str:
    """The README with what the newest results say."""
    found = json.loads(newest().read_text(encoding="utf-8"))
    groups = [Group(**group) for group in found["groups"]]
    for name, table in tables(groups, found["machine"]).items():
        mark = f"<!-- {name}: bench/results -->\n"
        before, found_mark, rest = readme.partition(mark)
        if found_mark:
            readme = before + mark + table + rest[rest.index("<!-- end -->") :]
    return readme


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{file.name} has the tables of {newest().name}")
