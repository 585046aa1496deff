"""Two ranks, one of them slow, broken, killed or stopped: the other is not left waiting in the dark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.conftest import save_letters_model, write_jsonl

ROOT = Path(__file__).parents[1]


def run(fault: str, folder: Path) -> tuple[int, str]:
    """Exit status and stderr of two ranks; a run that does not end in time raises."""
    model = save_letters_model(folder / "model")
    data = write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in "abcdefxy"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "tests.watched_ranks", str(model), data, str(folder / "run"), fault],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in launch} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_slow_rank_is_named_and_waited_for(tmp_path: Path) -> None:
    status, stderr = run("slow", tmp_path)
    assert status == 0, stderr
    assert re.search(r"watchdog: rank 1 has been in score of step 1 for \d s; ranks that wait for it: 0\n", stderr)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "Signal 9 (SIGKILL) received by PID"),
        pytest.param("raises", "RuntimeError: the reward of rank 1 is broken", marks=pytest.mark.slow),
        pytest.param("stopped", "watchdog: rank 1 is gone: no sign of life for", marks=pytest.mark.slow),
    ],
)
def test_a_dead_rank_ends_the_run(fault: str, message: str, tmp_path: Path) -> None:
    status, stderr = run(fault, tmp_path)
    assert status != 0
    assert message in stderr
    assert not (tmp_path / "run" / "final").exists()
