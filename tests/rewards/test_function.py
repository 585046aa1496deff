"""Python functions as rewards: what they get, and how each way to fail is reported."""

from __future__ import annotations

import asyncio
import functools
import json
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_fast.errors import RewardError
from rlhf_fast.rewards import FunctionReward, Reward, load_reward

PROMPTS = ["one", "two", "three"]
COMPLETIONS = ["uno", "dos!", "tres!!"]
LENGTHS = [3.0, 4.0, 6.0]

MakeReward = Callable[..., Reward]


@pytest.fixture
def written(tmp_path: Path) -> MakeReward:
    """A reward from the text of a file called judge.py, whose function is `score`."""

    def write(text: str, **options: Any) -> Reward:
        (tmp_path / "judge.py").write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return load_reward("judge.py:score", base_dir=tmp_path, **options)

    return write


def score(reward: Reward, **columns: list[Any]) -> list[float]:
    return reward.score(PROMPTS, COMPLETIONS, **columns).total.tolist()


def test_trl_form(written: MakeReward) -> None:
    reward = written(
        """
        def score(prompts, completions, **columns):
            assert prompts == ["one", "two", "three"]
            return [len(c) + a for c, a in zip(completions, columns["answer"])]
        """
    )
    scores = reward.score(PROMPTS, COMPLETIONS, answer=[1, 1, 0])
    assert scores.total.tolist() == [4, 5, 6]
    assert scores.total.dtype == torch.float32
    assert list(scores.parts) == ["score"]
    assert torch.equal(scores.parts["score"], scores.total)


def test_conversations_come_as_they_are() -> None:
    prompts: list[Any] = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Bye"}]]
    seen: list[Any] = []

    def keep(prompts: list[Any], completions: list[str]) -> list[int]:
        seen.extend(prompts)
        return [0, 0]

    FunctionReward(keep).score(prompts, ["a", "b"])
    assert seen == prompts


def only_completions(completions: list[str]) -> list[int]:
    return [len(c) for c in completions]


def only_a_column(answer: list[int]) -> list[int]:
    return answer


def positional(completions: list[str], answer: list[int], /) -> list[int]:
    return [len(c) + a for c, a in zip(completions, answer, strict=True)]


def with_default(completions: list[str], answer: list[int] | None = None, tokenizer: Any = None) -> list[int]:
    return [len(c) for c in completions] if answer is None else answer


class Judge:
    def __call__(self, completions: list[str], **columns: Any) -> list[int]:
        return [len(c) for c in completions]

    def method(self, completions: list[str]) -> list[int]:
        return self(completions)


async def coroutine(completions: list[str], **columns: Any) -> list[int]:
    async def one(completion: str) -> int:
        await asyncio.sleep(0)
        return len(completion)

    return list(await asyncio.gather(*(one(c) for c in completions)))


class AsyncJudge:
    async def __call__(self, completions: list[str]) -> list[int]:
        return await coroutine(completions)


@pytest.mark.parametrize("timeout", [300.0, 0.0])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (only_completions, LENGTHS),
        (only_a_column, [7.0, 8.0, 9.0]),
        (positional, [10.0, 12.0, 15.0]),
        (with_default, [7.0, 8.0, 9.0]),
        (lambda completions, **_: [len(c) for c in completions], LENGTHS),
        (functools.partial(with_default, answer=None), LENGTHS),
        (Judge(), LENGTHS),
        (Judge().method, LENGTHS),
        (coroutine, LENGTHS),
        (AsyncJudge(), LENGTHS),
        (functools.partial(coroutine, extra=1), LENGTHS),
    ],
)
def test_gets_what_it_declares(function: Any, expected: list[float], timeout: float) -> None:
    columns = {} if isinstance(function, functools.partial) else {"answer": [7, 8, 9]}
    assert score(load_reward(function, timeout=timeout), **columns) == expected


def test_needs_a_column_that_is_not_there(written: MakeReward) -> None:
    reward = written("def score(completions, solution):\n    return [0] * len(completions)\n")
    with pytest.raises(
        RewardError,
        match=r"reward judge.py:score needs 'solution', which is no column.* There are: prompts, completions, answer\.",
    ):
        score(reward, answer=[1, 2, 3])


def test_what_it_changes_stays_its_own() -> None:
    prompts: list[Any] = [[{"role": "user", "content": "Hi"}]]
    completions, answer = ["b"], [[1]]

    def vandal(prompts: list[Any], completions: list[str], answer: list[Any]) -> list[int]:
        prompts[0].clear()
        completions.append("more")
        answer[0].append(2)
        return [0]

    FunctionReward(vandal).score(prompts, completions, answer=answer)
    assert (prompts, completions, answer) == ([[{"role": "user", "content": "Hi"}]], ["b"], [[1]])


def test_the_lists_pass_for_lists_in_other_processes_and_formats() -> None:
    def check(prompts: list[str], completions: list[str]) -> list[int]:
        assert isinstance(completions, list)
        assert completions == COMPLETIONS
        assert completions[1:] == ["dos!", "tres!!"]
        assert json.loads(json.dumps(completions)) == COMPLETIONS
        assert pickle.loads(pickle.dumps(completions)) == COMPLETIONS
        assert type(pickle.loads(pickle.dumps(completions))) is list
        assert sorted(completions) == ["dos!", "tres!!", "uno"]
        assert completions[-1] == "tres!!"
        return [len(c) for c in completions]

    assert score(FunctionReward(check)) == LENGTHS


def test_thread_and_loop_stay_from_batch_to_batch() -> None:
    """An HTTP client or database connection that a reward keeps is bound to them."""
    seen = []

    async def keep(completions: list[str]) -> list[int]:
        seen.append((asyncio.get_running_loop(), threading.get_ident()))
        return [0] * len(completions)

    reward = FunctionReward(keep)
    score(reward)
    score(reward)
    assert seen[0] == seen[1]
    assert seen[0][1] != threading.get_ident()


def test_without_a_limit_it_runs_on_the_callers_thread() -> None:
    """For functions that use signals, which Python allows on the main thread only."""

    def alarmed(completions: list[str]) -> list[int]:
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return [0] * len(completions)

    assert score(load_reward(alarmed, timeout=0)) == [0, 0, 0]
    with pytest.raises(RewardError, match=r"raised ValueError.*main thread.*need reward_timeout: 0"):
        score(load_reward(alarmed, timeout=10))


ROW_1 = r"row 1 \(prompt 'two', completion 'dos!'\)"
ROW_2 = r"row 2 \(prompt 'three', completion 'tres!!'\)"

RAISES = [
    (
        """
        def score(completions, **_):
            return [1 / (4 - len(c)) for c in completions]
        """,
        rf"reward judge\.py:score raised ZeroDivisionError at judge\.py:2: division by zero; .*{ROW_1}\.",
    ),
    (
        """
        def score(completions, **_):
            scores = []
            for c in completions:
                scores.append(rate(c))
            return scores
        def rate(text):
            if "!!" in text:
                raise RuntimeError("no idea")
            return 1
        """,
        rf"raised RuntimeError at judge\.py:8: no idea; {ROW_2}\.",
    ),
    (
        """
        import json
        def score(completions, **_):
            return [json.loads("1" * (c != "dos!")) for c in completions]
        """,
        rf"raised JSONDecodeError at judge\.py:3: Expecting value.*; .*{ROW_1}\.",
    ),
    (
        """
        def score(prompts, completions, **_):
            return [{"one": 1}[p] for p in prompts]
        """,
        rf"raised KeyError at judge\.py:2: 'two'; .*{ROW_1}\.",
    ),
    (
        """
        def score(completions, **_):
            scores = []
            for i in range(len(completions)):
                scores.append(1 / (6 - len(completions[i])))
            return scores
        """,
        rf"raised ZeroDivisionError at judge\.py:4: .*; the last row that it took was {ROW_2}\.",
    ),
    (
        """
        def score(prompts, completions, **_):
            lengths = [len(p) + len(c) for p, c in zip(prompts, completions)]
            return [n / 0 for n in lengths]
        """,
        r"raised ZeroDivisionError at judge\.py:3: .*; the batch starts with row 0",
    ),
    (
        """
        def score(completions, **_):
            assert not completions
        """,
        r"raised AssertionError at judge\.py:2; the batch starts with row 0 \(prompt 'one', completion 'uno'\)\.",
    ),
    (
        """
        import sys
        def score(completions, **_):
            sys.exit(3)
        """,
        r"raised SystemExit at judge\.py:3: 3; the batch starts with row 0",
    ),
    (
        """
        import asyncio
        async def score(completions, **_):
            return await asyncio.gather(*map(rate, completions))
        async def rate(text):
            await asyncio.sleep(0)
            return 1 / (4 - len(text))
        """,
        rf"raised ZeroDivisionError at judge\.py:6: division by zero; {ROW_1}\.",
    ),
    (
        """
        def score(completions, **_):
            return [len(c) for c in completions][1:]
        """,
        rf"reward judge\.py:score returned 2 scores for 3 completions: none at {ROW_2}",
    ),
    (
        """
        def score(completions, **_):
            return [float("nan") if c == "dos!" else 0 for c in completions]
        """,
        rf"reward judge\.py:score returned nan at {ROW_1}",
    ),
    (
        """
        def score(completions, **_):
            [0 for c in completions]
        """,
        r"judge\.py:score returned None \(is a `return` missing\?\)",
    ),
    (
        """
        async def score(completions, **_):
            return 1.0
        """,
        r"judge\.py:score returned 1\.0 \(a float\), not a list",
    ),
]


@pytest.mark.parametrize(("text", "message"), RAISES)
def test_failures_name_function_line_and_row(written: MakeReward, text: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(written(text))


def test_the_cause_is_kept_for_the_log(written: MakeReward) -> None:
    with pytest.raises(RewardError) as caught:
        score(written("def score(completions, **_):\n    return [1 / 0 for c in completions]\n"))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            """
            def score(completions, go):
                for c in completions:
                    if "!" in c:
                        go[0].wait()
            """,
            4,
        ),
        (
            """
            import asyncio
            async def score(completions, go):
                return await asyncio.gather(*map(rate, completions))
            async def rate(text):
                if text == "dos!":
                    await wait()
            async def wait():
                await asyncio.Event().wait()
            """,
            8,
        ),
        (
            """
            async def score(completions, go):
                for c in completions:
                    if "!" in c:
                        go[0].wait()
            """,
            4,
        ),
    ],
    ids=["sync", "async", "blocked-async"],
)
def test_a_hang_is_an_error_that_says_where(written: MakeReward, text: str, line: int) -> None:
    reward, go = written(text, timeout=0.3), threading.Event()
    with pytest.raises(RewardError) as caught:
        score(reward, go=[go] * 3)
    go.set()
    assert str(caught.value) == (
        f"reward judge.py:score did not return within 0.3 s for 3 completions; it hangs at judge.py:{line}, "
        "row 1 (prompt 'two', completion 'dos!'). Give what it waits for a time limit, or raise reward_timeout."
    )


def test_after_a_hang_the_next_batch_gets_a_new_thread() -> None:
    release = threading.Event()

    def first_hangs(completions: list[str], wait: list[bool]) -> list[int]:
        if wait[0]:
            release.wait()
        return [1] * len(completions)

    reward = FunctionReward(first_hangs, timeout=0.2)
    with pytest.raises(RewardError, match="did not return within"):
        score(reward, wait=[True] * 3)
    reward.timeout = 60
    assert score(reward, wait=[False] * 3) == [1, 1, 1]
    release.set()


def test_ctrl_c_and_other_signals_work_while_waiting() -> None:
    """What a signal handler raises comes through as it is, not as an error of the reward."""

    class Stop(Exception):
        pass

    def stop(number: int, frame: Any) -> None:
        raise Stop

    release, main = threading.Event(), threading.get_ident()

    def hangs(completions: list[str], number: list[int]) -> list[int]:
        signal.pthread_kill(main, number[0])
        release.wait()
        return [0] * len(completions)

    old = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stop):
            score(FunctionReward(hangs, timeout=60), number=[signal.SIGUSR1] * 3)
        with pytest.raises(KeyboardInterrupt):
            score(FunctionReward(hangs, timeout=60), number=[signal.SIGINT] * 3)
    finally:
        signal.signal(signal.SIGUSR1, old)
        release.set()


HANGING_RUN = """
import threading
from rlhf_fast.rewards import FunctionReward

try:
    FunctionReward(lambda completions: threading.Event().wait(), timeout=0.2).score(["a"], ["b"])
except Exception as error:
    print(type(error).__name__)
"""


def test_a_hung_function_does_not_keep_the_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", HANGING_RUN], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert (run.stdout, run.returncode) == ("RewardError\n", 0), run.stderr
