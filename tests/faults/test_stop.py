"""SIGTERM and SIGINT: the step under way is finished and saved, the status is 0, and nothing is done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from tests.trainers.conftest import read_metrics

from .conftest import Workplace, assert_same
from .fork_server import ROOT
from .moments import Strike

# (moment, its call, signal, the step under way). The first rollout and reward are those of the evaluation before; a
# step has six backward passes.
STOPS = [
    ("a rollout", 4, signal.SIGTERM, 3),
    ("a reward function", 2, signal.SIGINT, 1),
    ("forward and backward", 9, signal.SIGINT, 2),
    ("a step in the metrics, not yet saved", 2, signal.SIGTERM, 2),
    ("an engine's files", 4, signal.SIGTERM, 4),
]


@pytest.mark.parametrize(("moment", "call", "number", "step"), STOPS)
def test_the_step_is_finished_and_saved(
    moment: str,
    call: int,
    number: signal.Signals,
    step: int,
    workplace: Workplace,
    uninterrupted: tuple[dict[str, Any], dict[str, int]],
) -> None:
    assert workplace.run("run", at=Strike(moment, call, number)) == 0, workplace.log("run")
    assert f"stopped after step {step}; go on with --resume" in workplace.log("run")
    assert read_metrics(workplace.folder / "run")[-1]["step"] == step
    assert workplace.steps("run")[-1] == step
    assert not (workplace.folder / "run" / "final").exists()
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", uninterrupted[0])


def test_a_run_that_has_only_to_write_its_model_ends(
    workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]
) -> None:
    assert workplace.run("run", at=Strike("before final/", 1, signal.SIGTERM)) == 0, workplace.log("run")
    assert_same(workplace.folder / "run", uninterrupted[0])


IMPATIENT = """
import os, signal, time
calls = 0
def reward(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.01)  # the first has not come through yet, and two that wait are one
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    return [float(t.count('a')) for t in completions]
"""


def test_the_second_signal_interrupts_at_once(
    workplace: Workplace, uninterrupted: tuple[dict[str, Any], dict[str, int]]
) -> None:
    file = workplace.folder / "reward.py"
    patient = file.read_text()
    file.write_text(IMPATIENT)
    assert workplace.run("run") == 130
    assert "interrupted" in workplace.log("run")
    assert "Traceback" not in workplace.log("run")
    assert workplace.steps("run") == [2]
    file.write_text(patient)
    assert workplace.run("run", "--resume") == 0, workplace.log("run")
    assert_same(workplace.folder / "run", uninterrupted[0])


def test_a_signal_to_one_rank_stops_both(workplace: Workplace, on_two_ranks: Any) -> None:
    at = Strike("forward and backward", 15, signal.SIGTERM)
    assert workplace.run_ranks("run", "zero_stage=2", at=at, rank=1) == [0, 0], workplace.log("run")
    assert "stopped after step 3" in workplace.log("run")
    assert workplace.steps("run") == [2, 3]
    assert workplace.run("run", "zero_stage=2", "--resume") == 1  # and one process is not two
    assert "was saved by 2 processes, this run has 1" in workplace.log("run")
    assert "Traceback" not in workplace.log("run")
    assert workplace.run_ranks("run", "zero_stage=2", "--resume") == [0, 0], workplace.log("run")
    assert_same(workplace.folder / "run", on_two_ranks(2))


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(workplace: Workplace, on_two_ranks: Any) -> None:
    reward = workplace.folder / "reward.py"
    quick = reward.read_text()
    reward.write_text(quick.replace("    return", "    import time; time.sleep(0.5)\n    return"))
    file, output_dir = workplace.folder / "run.yaml", workplace.folder / "run"
    file.write_text(yaml.safe_dump(workplace.config | {"output_dir": str(output_dir)}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "rlhf_fast.cli", "ppo", "--config", str(file), "zero_stage=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True) as launcher:
        metrics, deadline = output_dir / "metrics.jsonl", time.monotonic() + 300
        while not (metrics.exists() and metrics.read_bytes().count(b"\n")) and time.monotonic() < deadline:
            time.sleep(0.02)
        launcher.send_signal(signal.SIGTERM)
        errors = launcher.communicate(timeout=300)[1]
    step = read_metrics(output_dir)[-1]["step"]
    assert f"stopped after step {step}" in errors, errors
    assert workplace.steps("run")[-1] == step < 8
    reward.write_text(quick)
    assert workplace.run_ranks("run", "zero_stage=2", "--resume") == [0, 0], workplace.log("run")
    assert_same(output_dir, on_two_ranks(2))
