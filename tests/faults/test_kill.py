"""kill -9 at any moment of a run: it goes on from its last checkpoint and ends with the same bits."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.trainers.conftest import write_jsonl

from .conftest import EPOCHS, PROMPTS, Workplace, assert_same, result
from .moments import MOMENTS, Strike

NO_RESUME = [name for name in MOMENTS if name != "a checkpoint is loaded"]
FAST = {
    "a rollout",
    "between two optimiser steps",
    "between the files of a checkpoint",
    "after the rename",
    "an old checkpoint out of sight",
    "final/ is written, the report is not",
}
RANKS_MOMENTS = [  # (moment, the rank that is killed, ZeRO stage)
    ("between the files of a checkpoint", 1, 2),
    ("before the rename", 0, 2),
    pytest.param("a rollout", 0, 2, marks=pytest.mark.slow),
    pytest.param("forward and backward", 1, 2, marks=pytest.mark.slow),
    pytest.param("between two optimiser steps", 1, 3, marks=pytest.mark.slow),
    pytest.param("an engine's files", 0, 3, marks=pytest.mark.slow),
    pytest.param("after the manifest", 0, 3, marks=pytest.mark.slow),
    pytest.param("after the rename", 0, 0, marks=pytest.mark.slow),
    pytest.param("a step in the metrics, not yet saved", 0, 1, marks=pytest.mark.slow),
    pytest.param("before final/", 1, 1, marks=pytest.mark.slow),
]


def kill(moment: str, calls: int) -> Strike:
    """At a random one of the times that the moment comes; another one for each moment, the same one every time."""
    return Strike(moment, random.Random(moment).randint(1, calls), signal.SIGKILL)


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NO_RESUME]
)
def test_killed_and_resumed(
    moment: str, workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]
) -> None:
    expected, counts = uninterrupted
    assert workplace.run("run", at=kill(moment, counts[moment])) == -signal.SIGKILL, workplace.log("run")
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", expected)


def test_killed_again_and_again(workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]) -> None:
    """Also while it resumes. It never goes back behind a checkpoint that it had."""
    best = 0
    for moment, call in (
        ("a rollout", 3),
        ("between two optimiser steps", 13),
        ("a checkpoint is loaded", 1),
        ("after the rename", 1),
        ("a checkpoint is loaded", 1),
        ("before final/", 1),
    ):
        status = workplace.run("run", "--resume", at=Strike(moment, call, signal.SIGKILL))
        assert status == -signal.SIGKILL, workplace.log("run")
        newest = max(workplace.steps("run"), default=0)
        assert newest >= best
        best = newest
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", uninterrupted[0])


def test_three_epochs_in_their_order(uninterrupted: tuple[dict[str, Any], dict[str, int]]) -> None:
    """What the tests above compare holds every prompt of every step: nothing is read twice, nothing left out."""
    rows = [row for row in map(json.loads, uninterrupted[0]["samples"].splitlines()) if row["split"] == "train"]
    read = [row["prompt"] for row in rows]
    size = len(PROMPTS)
    epochs = [read[e * size : (e + 1) * size] for e in range(EPOCHS)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(PROMPTS)] * EPOCHS
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS  # shuffled anew


SUPERVISED = {"sft": {"prompt": "ab", "completion": "xy"}, "reward": {"prompt": "ab", "chosen": "xx", "rejected": "y"}}


@pytest.mark.parametrize(
    "moment",
    [
        "between the files of a checkpoint",
        pytest.param("an optimiser step", marks=pytest.mark.slow),
        pytest.param("after the rename", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("command", SUPERVISED)
def test_the_other_trainers(command: str, moment: str, workplace: Workplace) -> None:
    drop = ("reward", "max_new_tokens", "num_mini_batches", "kl_target", "num_sample_rows", "enable_ema")
    drop += ("unsup_coef", "unsup_data")
    workplace.config = {key: value for key, value in workplace.config.items() if key not in drop}
    rows = [SUPERVISED[command] | {"prompt": prompt} for prompt in PROMPTS]
    write_jsonl(workplace.folder / "prompts.jsonl", rows)
    write_jsonl(workplace.folder / "eval.jsonl", rows[:3])
    workplace.command = command
    assert workplace.run("whole") == 0, workplace.log("whole")
    assert workplace.run("run", at=kill(moment, 4)) == -signal.SIGKILL, workplace.log("run")
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", result(workplace.folder / "whole"))


# ---- two ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "rank", "stage"), RANKS_MOMENTS)
def test_one_of_two_ranks_is_killed(
    moment: str, rank: int, stage: int, workplace: Workplace, on_two_ranks: Callable[[int], Any]
) -> None:
    expected = on_two_ranks(stage)
    at = kill(moment, 1 if moment == "before final/" else 3)
    statuses = workplace.run_ranks("run", f"zero_stage={stage}", at=at, rank=rank)
    assert statuses[rank] == -signal.SIGKILL, workplace.log("run")
    assert workplace.run_ranks("run", f"zero_stage={stage}", "--resume") == [0, 0], workplace.log("run")
    assert_same(workplace.folder / "run", expected)
