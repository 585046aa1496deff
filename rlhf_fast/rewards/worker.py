"""A thread that runs other people's code, so that the caller can stop waiting for it.

Python cannot kill a thread: a job that hangs keeps its thread until the process ends. The thread is a daemon (those of
concurrent.futures are waited for at exit), so it does not keep the process alive, and the next job gets a new one.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import queue
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import torch

SLICE = 0.5  # seconds after which a signal is handled at the latest


class JobHung(Exception):
    """The job did not end in time. `frames`: where it is now, the innermost last."""

    def __init__(self, frames: list[FrameType]) -> None:
        super().__init__()
        self.frames = frames


class JobFailed(Exception):
    """The job raised `error`. Wrapped, so that what a signal handler raises while waiting is not taken for it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


class Worker:
    """Runs jobs one at a time on one thread, which has an event loop of its own.

    The loop and the thread stay the same from job to job, so that what a reward keeps (an HTTP client, a database
    connection) goes on working.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: _Thread | None = None

    def run(self, job: Callable[[], Any], timeout: float | None) -> Any:
        """What the job returns, awaited if it can be.

        timeout in seconds, None: no limit. Signals are handled while waiting: Ctrl-C raises KeyboardInterrupt here.
        Raises JobFailed, and JobHung when the time is up.
        """
        if self._thread is None:
            self._thread = _Thread(self._jobs)
            self._thread.start()
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._jobs.put((_on_same_gpu(job), answer))
        try:
            ok, value = _wait(answer, timeout)
        except queue.Empty:
            frames = self._thread.frames()
            self._abandon()
            raise JobHung(frames) from None
        except BaseException:  # KeyboardInterrupt, or whatever a signal handler raised
            self._abandon()
            raise
        if ok:
            return value
        raise JobFailed(value) from value

    def _abandon(self) -> None:
        self._jobs.put(None)  # the thread ends if the job ever does
        self._jobs, self._thread = queue.SimpleQueue(), None

    def __del__(self) -> None:
        self._jobs.put(None)


class _Thread(threading.Thread):
    def __init__(self, jobs: queue.SimpleQueue[Any]) -> None:
        super().__init__(name="rlhf_fast-reward", daemon=True)
        self.jobs = jobs
        self.loop = asyncio.new_event_loop()

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        while (item := self.jobs.get()) is not None:
            job, answer = item
            try:
                value = job()
                if inspect.isawaitable(value):
                    value = self.loop.run_until_complete(_awaited(value))
                answer.put((True, value))
            except BaseException as error:  # sys.exit() in a reward must not end this thread in silence
                answer.put((False, error))
            del item, job, answer  # nothing of the batch lives on while waiting for the next
        self.loop.close()

    def frames(self) -> list[FrameType]:
        """What runs now: frames of the coroutines that are waiting, then of the thread; inner ones after outer."""
        stack: list[FrameType] = []
        if self.loop.is_running():
            # _awaited first: the tasks that it waits for say more.
            for task in sorted(asyncio.all_tasks(self.loop), key=lambda task: _name(task) != _awaited.__name__):
                coroutine: Any = task.get_coro()
                while getattr(coroutine, "cr_frame", None) is not None:
                    stack.append(coroutine.cr_frame)
                    coroutine = coroutine.cr_await
        frame = sys._current_frames().get(self.ident or 0)
        own = []
        while frame is not None:
            own.append(frame)
            frame = frame.f_back
        return stack + own[::-1]


def _wait(answer: queue.SimpleQueue[tuple[bool, Any]], timeout: float | None) -> tuple[bool, Any]:
    """The answer; queue.Empty when the time is up. In slices: a signal that comes just before a wait begins does not
    end it, and would be handled only afterwards."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            return answer.get(timeout=max(0.0, min(left, SLICE)))
        except queue.Empty:
            if left <= SLICE:
                raise


def _name(task: asyncio.Task[Any]) -> str:
    return getattr(task.get_coro(), "__name__", "")


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _on_same_gpu(job: Callable[[], Any]) -> Callable[[], Any]:
    """The current CUDA device is a thread's own: the job gets the caller's, not device 0."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return job
    device = torch.cuda.current_device()

    def on_device() -> Any:
        with torch.cuda.device(device):
            return job()

    return on_device
