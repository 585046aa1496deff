"""Moments of a run at which something may befall it, each named by a function that is called then.

A run strikes itself: the function is wrapped in the run's own process, and its n-th call sends the signal. So a moment
is hit for certain, on a slow machine as on a fast one.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

When = Literal["before", "inside", "after"]  # inside: while the call runs, also in code that is not Python


class Moment(NamedTuple):
    when: When
    function: str  # module:attribute


class Strike(NamedTuple):
    """The signal that a run sends itself when `moment` comes for the `call`-th time, from 1."""

    moment: str
    call: int
    signal: int


MOMENTS = {
    "reading the next prompts": Moment("before", "rlhf_fast.data.order:EpochOrder.next"),
    "a rollout": Moment("inside", "rlhf_fast.generation.generator:Generator.rollout"),
    "a rollout is done": Moment("after", "rlhf_fast.generation.generator:Generator.rollout"),
    "a reward function": Moment("inside", "rlhf_fast.rewards.function:FunctionReward._score"),
    "reference and critic": Moment("inside", "rlhf_fast.trainers.ppo_models:PPOModels.forward"),
    "advantages are there": Moment("after", "rlhf_fast.trainers.ppo:PPOTrainer.experience"),
    "forward and backward": Moment("inside", "rlhf_fast.engine:Engine.backward"),
    "an optimiser step": Moment("before", "rlhf_fast.engine:Engine.step"),
    "between two optimiser steps": Moment("after", "rlhf_fast.engine:Engine.step"),
    "an evaluation": Moment("inside", "rlhf_fast.trainers.run:Run._evaluate_at"),
    "a step not yet in the metrics": Moment("before", "rlhf_fast.tracking.metrics:MetricsLogger.log"),
    "a step in the metrics, not yet saved": Moment("after", "rlhf_fast.tracking.metrics:MetricsLogger.log"),
    "a checkpoint begins": Moment("before", "rlhf_fast.trainers.run:Run._write"),
    "an engine's files": Moment("inside", "rlhf_fast.engine:Engine.save"),
    "between the files of a checkpoint": Moment("after", "rlhf_fast.engine:Engine.save"),
    "before the manifest": Moment("before", "rlhf_fast.checkpoint:_write_manifest"),
    "after the manifest": Moment("after", "rlhf_fast.checkpoint:_write_manifest"),
    "flushing a checkpoint": Moment("inside", "rlhf_fast.checkpoint:_flush"),
    "before the rename": Moment("before", "rlhf_fast.checkpoint:_publish"),
    "after the rename": Moment("after", "rlhf_fast.checkpoint:_publish"),
    "removing an old checkpoint": Moment("before", "rlhf_fast.checkpoint:_rotate"),
    "an old checkpoint out of sight": Moment("before", "shutil:rmtree"),
    "a checkpoint is loaded": Moment("inside", "rlhf_fast.trainers.run:Run._load"),
    "before final/": Moment("before", "rlhf_fast.trainers.run:Run._export"),
    "final/ is written, the report is not": Moment("after", "rlhf_fast.trainers.run:Run._export"),
    "the run is done but for its mark": Moment("before", "rlhf_fast.trainers.run:mark_finished"),
}


def strike(at: Strike) -> None:
    """Arrange for `at` in this process."""
    moment, calls = MOMENTS[at.moment], 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != at.call:
                return function(*args, **kwargs)
            if moment.when == "before":
                os.kill(os.getpid(), at.signal)
            striker = threading.Thread(target=_strike_soon, args=(at.signal,))
            if moment.when == "inside":
                striker.start()
            result = function(*args, **kwargs)
            if moment.when == "inside":
                striker.join()
            if moment.when == "after":
                os.kill(os.getpid(), at.signal)
            return result

        return wrapped

    _replace(moment.function, wrap)


def _strike_soon(number: int) -> None:
    time.sleep(0.0005)
    os.kill(os.getpid(), number)


def count_calls(file: Path) -> None:
    """Write at the end of this process how often each moment came: {moment: calls} as JSON."""
    counts: Counter[str] = Counter()

    def counting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapped

    for name in {moment.function for moment in MOMENTS.values()}:
        _replace(name, lambda function, name=name: counting(function, name))  # type: ignore[misc]

    def write() -> None:
        file.write_text(json.dumps({name: counts[moment.function] for name, moment in MOMENTS.items()}))

    atexit.register(write)


def _replace(name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    holder = importlib.import_module(module)
    for owner in owners:
        holder = getattr(holder, owner)
    setattr(holder, attribute, wrap(getattr(holder, attribute)))
