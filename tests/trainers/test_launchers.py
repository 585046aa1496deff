"""The launchers that users have, each by its own command: what it starts trains as one process does.

Two nodes are two launchers on this machine. Over ssh DeepSpeed's launcher starts on each node what `--no_ssh` starts
here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from .conftest import COUNT_A, ppo_settings, read_metrics

Launcher = Callable[[int, Path], list[list[str]]]  # (a free port, a folder) -> the commands, one a node

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def one_process(port: int, folder: Path) -> list[list[str]]:
    return [[str(BIN / "rlhf-fast")]]


def deepspeed_on_one_node(port: int, folder: Path) -> list[list[str]]:
    return [["deepspeed", "--num_gpus", "2", "--master_port", str(port), "--module", "rlhf_fast.cli"]]


def deepspeed_on_two_nodes(port: int, folder: Path) -> list[list[str]]:
    hostfile = folder / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    nodes = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [["deepspeed", *nodes, "--node_rank", str(rank), "--module", "rlhf_fast.cli"] for rank in range(2)]


def torchrun_on_two_nodes(port: int, folder: Path) -> list[list[str]]:
    meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}"]
    return [["torchrun", "--nnodes", "2", "--nproc_per_node", "1", *meeting, "-m", "rlhf_fast.cli"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed_on_one_node, deepspeed_on_two_nodes, torchrun_on_two_nodes])
def test_it_trains_as_one_process_does(launcher: Launcher, letters_model: Path, tmp_path: Path) -> None:
    prompts = [a + b for a in "abcdef" for b in "abc"]
    fields = {"reward": COUNT_A, "learning_rate": 1e-3, "max_steps": 2, "save_steps": 1, "zero_stage": 2}
    config = ppo_settings(letters_model, tmp_path, prompts=prompts, **fields)
    rows = []
    for launch in (one_process, launcher):
        output_dir = tmp_path / launch.__name__
        file = output_dir.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config | {"output_dir": str(output_dir)}))
        started = [
            subprocess.Popen(
                [*command, "ppo", "--config", str(file)],
                env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in launch(free_port(), tmp_path)
        ]
        for node in started:
            said, _ = node.communicate(timeout=300)
            assert node.returncode == 0, said[-6000:]
        rows.append(read_metrics(output_dir))
    for one, several in zip(*rows, strict=True):
        for name in ("objective/scores", "loss/policy_avg", "grad_norm", "value/grad_norm", "num_tokens"):
            assert several[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (one["step"], name)
