"""The README's kernel table is what `make bench` wrote last."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_newest_results() -> None:
    newest = max((ROOT / "bench" / "results").glob("*.md"))
    table = newest.read_text(encoding="utf-8").split("\n\n")[0].strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- kernels: .*? -->\n(.*?)\n<!-- end -->", readme, re.DOTALL)
    assert found is not None
    assert found[1].split("\n\n")[0].strip() == table
    assert newest.with_suffix(".json").is_file()
    assert newest.with_suffix(".png").is_file()
