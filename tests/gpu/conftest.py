"""What needs a CUDA GPU: `make test-gpu`. Without one these tests fail; compute-sanitizer's alone may be missing."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
