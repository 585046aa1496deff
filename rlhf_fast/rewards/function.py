"""A Python function as a reward: TRL's form, reward(prompts, completions, **columns) -> list[float], sync or async."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from rlhf_fast.errors import RewardError

from .base import Prompt, Reward, RewardScores, checked_scores, describe_row
from .worker import JobFailed, JobHung, Worker

MAIN_THREAD_HINT = " Functions that use signals need reward_timeout: 0, which calls them from the main thread."


class FunctionReward(Reward):
    """Calls function(prompts=..., completions=..., **columns) once a batch and checks what comes back.

    A function without **kwargs gets only what it declares. With a timeout (seconds) it runs on a thread of its own; one
    that hangs is left behind there and RewardError is raised. With None it runs on the caller's thread without limit;
    what has to be awaited always runs on the other thread.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        label: str | None = None,
        file: Path | None = None,
        timeout: float | None = 300.0,
    ) -> None:
        self.function, self.timeout = function, timeout
        self.file = _file_of(function) or str(file or "")
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.label = f"reward {label or (Path(self.file).name + ':' if self.file else '') + self.name}"
        self.worker = Worker()
        try:
            self.parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some callables written in C have none
            self.parameters = [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]

    def _score(self, prompts: list[Prompt], completions: list[str], columns: dict[str, list[Any]]) -> RewardScores:
        # Copies: a function that sorts or edits what it gets must not reach the data.
        given = _copied({"prompts": prompts, "completions": completions, **columns})
        given["prompts"], given["completions"] = _Rows(given["prompts"]), _Rows(given["completions"])
        args, kwargs = self._arguments(given)
        try:
            returned = self._call(lambda: self.function(*args, **kwargs))
        except JobHung as hung:
            raise self._hung(hung.frames, given) from None
        except JobFailed as failed:
            raise self._raised(failed.error, given) from failed.error
        scores = checked_scores(self.label, returned, prompts, completions)
        return RewardScores(scores, {self.name: scores})

    def _call(self, call: Callable[[], Any]) -> Any:
        if self.timeout is not None:
            return self.worker.run(call, self.timeout)
        try:
            returned = call()
        except Exception as error:
            raise JobFailed(error) from error
        return self.worker.run(lambda: returned, None) if inspect.isawaitable(returned) else returned

    def _arguments(self, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        kinds = [parameter.kind for parameter in self.parameters]
        if inspect.Parameter.VAR_KEYWORD in kinds:
            kwargs = dict(given)
        else:
            kwargs = {parameter.name: given[parameter.name] for parameter in self.parameters if parameter.name in given}
        args = []
        for parameter in self.parameters:
            if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                continue
            if parameter.name not in given:
                if parameter.default is inspect.Parameter.empty:
                    raise RewardError(
                        f"{self.label} needs {parameter.name!r}, which is no column of the data. "
                        f"There are: {', '.join(given)}."
                    )
            elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                args.append(kwargs.pop(parameter.name))
        return args, kwargs

    def _hung(self, frames: list[FrameType], given: dict[str, Any]) -> RewardError:
        line = self._line([(frame, frame.f_lineno) for frame in frames])
        return RewardError(
            f"{self.label} did not return within {self.timeout:g} s for {len(given['completions'])} completions; "
            f"it hangs{line}, {self._row(frames, given)}. Give what it waits for a time limit, or raise reward_timeout."
        )

    def _raised(self, error: BaseException, given: dict[str, Any]) -> RewardError:
        steps = []
        step = error.__traceback__
        while step is not None:
            steps.append((step.tb_frame, step.tb_lineno))
            step = step.tb_next
        message = f": {error}" if str(error) else ""
        hint = MAIN_THREAD_HINT if "main thread" in message and self.timeout is not None else ""
        row = self._row([frame for frame, _ in steps], given)
        return RewardError(f"{self.label} raised {type(error).__name__}{self._line(steps)}{message}; {row}.{hint}")

    def _line(self, steps: list[tuple[FrameType, int]]) -> str:
        """' at file.py:12', the innermost line of the user's file; '' where none of it was running."""
        lines = [number for frame, number in steps if frame.f_code.co_filename == self.file]
        return f" at {Path(self.file).name}:{lines[-1]}" if lines else ""

    def _row(self, frames: list[FrameType], given: dict[str, Any]) -> str:
        """The row that the code was busy with, as far as can be told."""
        prompts, completions = given["prompts"], given["completions"]
        taken = _last_taken(prompts, completions)
        for frame in reversed(frames):
            held = {id(value) for value in frame.f_locals.values()}
            # Loop variables are the very objects that were given. (Since Python 3.12 those of comprehensions are gone.)
            found = [(id(c) in held) + (id(p) in held) for p, c in zip(prompts, completions, strict=True)]
            if any(found):
                return describe_row(found.index(max(found)), prompts, completions)
        if taken is not None:
            return f"the last row that it took was {describe_row(taken, prompts, completions)}"
        return f"the batch starts with {describe_row(0, prompts, completions)}"


class _Rows(list[Any]):
    """A list that knows which row was taken from it last: None: none, its length: the end was reached."""

    last: int | None = None

    def __iter__(self) -> Iterator[Any]:
        for i, value in enumerate(super().__iter__()):
            self.last = i
            yield value
        self.last = len(self)

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        if isinstance(index, int):
            self.last = index % len(self)
        return value

    def __reduce__(self) -> tuple[type[list[Any]], tuple[list[Any]]]:
        return list, (self[:],)  # elsewhere, in another process, it is a plain list


def _last_taken(prompts: _Rows, completions: _Rows) -> int | None:
    rows = len(completions)
    row = completions.last if completions.last not in (None, rows) else prompts.last
    # zip() ends at the end of its first list, having taken the last row of the second.
    ended = rows in (prompts.last, completions.last) and row == rows - 1
    return None if ended or row == rows else row


def _copied(value: Any) -> Any:
    """Lists and mappings are new, at every depth; what they hold is the same."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def _file_of(function: Callable[..., Any]) -> str:
    """The file of a callable's code, as its frames name it; '' for one written in C."""
    inner: Any = inspect.unwrap(function)
    inner = getattr(inner, "func", inner)  # functools.partial
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    return str(code.co_filename) if code else ""
