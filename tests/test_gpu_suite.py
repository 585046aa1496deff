"""`make test-gpu` and `make bench-gpu` where torch, triton, transformers and pytest are, and no more of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

COLLECT = """
import sys
for name in ("deepspeed", "datasets", "wandb", "vaderSentiment"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", "bench/gpu"]))
"""


def test_it_imports_no_deepspeed() -> None:
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_decoder", "test_ops", "test_real_sizes", "bench_machine", "bench_ops", "bench_decode"):
        assert f"{name}.py::" in done.stdout
