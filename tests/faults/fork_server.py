"""Starts runs in a second instead of ten: a process that has imported everything and forks for each run.

A run is a process of its own all the same: it can be killed, and it shares nothing with the next one but read-only
imports. The server has started no thread and computed nothing, so its forks are like fresh interpreters.

    python -m tests.faults.fork_server      (reads one JSON request a line, answers with one line; see `ForkServer`)
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tests.faults.moments import Strike, count_calls, strike

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds until a run that does not end is killed and the test fails


@dataclass
class Process:
    """A run under way. Its output goes to `log`."""

    server: ForkServer
    pid: int
    log: Path
    seconds: float = 0.0  # of processor time, once it has ended

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, or minus the number of the signal that ended it."""
        status, self.seconds = self.server.ask({"wait": self.pid})
        assert status != "hung", f"did not end in {PATIENCE:g} s: {self.log.read_text()}"
        return status


class ForkServer:
    """The side of the tests: starts the server, and runs by it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        arguments: list[str],
        log: Path,
        *,
        at: Strike | None = None,
        counts: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> Process:
        """`rlhf-fast ARGUMENTS` in a new process.

        at: the signal that it sends itself, and when. counts: a file to write how often each moment came.
        environment: added to the server's, for several ranks.
        """
        request = {
            "arguments": arguments,
            "log": str(log),
            "at": at,
            "counts": str(counts) if counts else None,
            "environment": environment or {},
        }
        return Process(self, self.ask(request), log)

    def ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()  # end of input ends it


@dataclass
class _Server:
    answers: TextIO
    children: set[int] = field(default_factory=set)

    def serve(self) -> None:
        for line in sys.stdin:
            request = json.loads(line)
            answer = self.wait(request["wait"]) if "wait" in request else self.start(request)
            print(json.dumps(answer), file=self.answers, flush=True)
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)  # there is nothing to tidy, and it would take a second

    def start(self, request: dict[str, Any]) -> int:
        pid = os.fork()
        if pid == 0:
            _run(request)
        self.children.add(pid)
        return pid

    def wait(self, pid: int) -> tuple[int | str, float]:
        deadline = time.monotonic() + PATIENCE
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                self.children.discard(pid)
                return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.children.discard(pid)
                return "hung", 0.0
            time.sleep(0.005)


def _run(request: dict[str, Any]) -> None:
    """In the fork: what the console command does, to the end of the process."""
    from rlhf_fast.cli import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    status = 1
    try:
        if request["counts"]:
            count_calls(Path(request["counts"]))
        if request["at"]:
            strike(Strike(*request["at"]))
        status = main(request["arguments"])
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _import_everything() -> None:
    import deepspeed  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    import rlhf_fast.cli
    import rlhf_fast.trainers
    from rlhf_fast.build import load_generation, load_ops

    rlhf_fast.cli.set_environment()
    load_ops()  # compiled here if need be, before anybody waits for a run
    load_generation()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    _import_everything()
    _Server(answers).serve()
