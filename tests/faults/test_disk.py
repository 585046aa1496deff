"""A disk that refuses in the middle of a run. No root is needed: a limit on file sizes refuses as a full disk does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .conftest import Workplace, assert_same

FILLING = """
import resource, signal
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls in {limits}:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGXFSZ])
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limits}[calls], resource.RLIM_INFINITY))
    return [float(t.count('a')) for t in completions]
"""


@pytest.mark.parametrize(
    ("call", "limit", "settings", "message", "saved"),
    [
        # The reward of step 3 is the fourth, that of step 7 the tenth: evaluations come before steps 1, 4 and 7.
        (4, 50_000, {}, r"checkpoints/step-4 could not be written or read: .*is the disk full", [2]),
        (4, 3_000, {}, r"\.jsonl: File too large\. Mend that, then --resume", [2]),
        (10, 50_000, {"save_steps": 6}, r"final_ema could not be written or read: .*", [6]),
    ],
    ids=["a checkpoint", "metrics", "the model"],
)
def test_what_is_saved_stays_and_the_run_goes_on_when_there_is_room(
    call: int,
    limit: int,
    settings: dict[str, Any],
    message: str,
    saved: list[int],
    workplace: Workplace,
    uninterrupted: tuple[dict[str, Any], dict[str, int]],
) -> None:
    workplace.config |= settings
    file = workplace.folder / "reward.py"
    good = file.read_text()
    file.write_text(FILLING.format(limits={call: limit}))
    assert workplace.run("run") == 1
    log = workplace.log("run")
    assert re.search(message, log), log
    assert "Traceback" not in log
    assert workplace.steps("run") == saved
    assert not (workplace.folder / "run" / "final").exists()
    file.write_text(good)
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", uninterrupted[0])


def test_by_option_it_goes_on_without_the_checkpoint(
    workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]
) -> None:
    (workplace.folder / "reward.py").write_text(FILLING.format(limits={4: 50_000, 7: -1}))  # of steps 3 and 5
    assert workplace.run("run", "on_save_error=continue") == 0, workplace.log("run")
    assert re.search(r"step 4: .*/step-4 could not be written.*; the run goes on unsaved", workplace.log("run"))
    assert workplace.steps("run") == [6, 8]
    assert_same(workplace.folder / "run", uninterrupted[0])


def test_several_processes_cannot_go_on_so(workplace: Workplace) -> None:
    statuses = workplace.run_ranks("run", "on_save_error=continue")
    assert 2 in statuses
    assert 0 not in statuses  # one that was still connecting when the other left says that it lost it
    assert "on_save_error: continue needs a single process" in workplace.log("run")
