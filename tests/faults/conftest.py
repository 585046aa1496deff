"""A small PPO run that uses all that has state, and what an uninterrupted one leaves."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.faults.fork_server import ForkServer, Process
from tests.faults.moments import Strike
from tests.trainers.conftest import repeatable_metrics, save_letters_model, write_jsonl

PROMPTS = [a + b for a in "abcdexy" for b in "abc"]  # 21: the batch of 8 does not divide them, epochs end inside one
EPOCHS = 3


@dataclass
class Workplace:
    """A folder with a model, data and a config; `start` runs a trainer on them in a process of its own."""

    folder: Path
    server: ForkServer
    config: dict[str, Any]
    command: str = "ppo"

    def start(self, name: str, *arguments: str, **options: Any) -> Process:
        """Begin (or with "--resume" go on with) the run in folder/name."""
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(self.config | {"output_dir": str(self.folder / name)}))
        return self.server.start(
            [self.command, "--config", str(file), *arguments], self.folder / f"{name}.log", **options
        )

    def run(self, name: str, *arguments: str, **options: Any) -> int:
        process = self.start(name, *arguments, **options)
        status = process.wait()
        if "--resume" in arguments:  # for docs/faults.md: pytest -s
            print(f"\nresumed, to the end: {process.seconds:.2f} s of processor time")
        return status

    def run_ranks(self, name: str, *arguments: str, at: Strike | None = None, rank: int = 0) -> list[int]:
        """The same on two ranks, of which `rank` is struck. When one dies, the other is ended as launchers do."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [
            self.start(
                name,
                *arguments,
                at=at if number == rank else None,
                environment=here | {"RANK": str(number), "LOCAL_RANK": str(number)},
            )
            for number in range(2)
        ]
        status = ranks[rank].wait()
        if status:
            ranks[1 - rank].send(signal.SIGKILL)
        other = ranks[1 - rank].wait()
        if "--resume" in arguments:
            print(f"\nboth ranks resumed, to the end: {sum(r.seconds for r in ranks):.2f} s of processor time")
        return [status, other] if rank == 0 else [other, status]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def steps(self, name: str) -> list[int]:
        """Of the checkpoints that are there."""
        folders = (self.folder / name / "checkpoints").glob("step-*")
        return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def result(folder: Path) -> dict[str, Any]:
    """What a run leaves that no interruption may change."""
    rows = repeatable_metrics(folder)
    samples = (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else ""
    weights = {
        f"{file.parent.name}/{name}": tensor.view(torch.uint8)
        for file in folder.glob("final*/model.safetensors")
        for name, tensor in load_file(file).items()
    }
    return {"rows": rows, "samples": samples, "weights": weights}


def assert_same(folder: Path, expected: dict[str, Any]) -> None:
    """The run in `folder` is finished, and it is `expected` to the last bit."""
    found = result(folder)
    assert found["rows"] == expected["rows"]
    assert found["samples"] == expected["samples"]
    assert found["weights"].keys() == expected["weights"].keys()
    assert all(torch.equal(found["weights"][name], tensor) for name, tensor in expected["weights"].items())
    assert (folder / "report.html").exists()
    assert (folder / "finished").exists()
    assert not list(folder.rglob("*.tmp*"))
    assert not (folder / ".lock").exists()


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_letters_model(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture
def workplace(tmp_path: Path, server: ForkServer, letters: Path) -> Workplace:
    return make_workplace(tmp_path, server, letters)


def make_workplace(folder: Path, server: ForkServer, model: Path) -> Workplace:
    (folder / "reward.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [float(t.count('a')) for t in completions]\n"
    )
    config = {
        "model_name_or_path": str(model),
        "train_data": write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in PROMPTS]),
        "eval_data": write_jsonl(folder / "eval.jsonl", [{"prompt": p} for p in "xy"]),
        "reward": f"{folder / 'reward.py'}:reward",
        "batch_size": 8,
        "max_new_tokens": 6,
        "num_mini_batches": 2,
        "micro_batch_tokens": 64,
        "kl_target": 1.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": EPOCHS,
        "save_steps": 2,
        "eval_steps": 3,
        "num_sample_rows": 8,  # every prompt, in order
        "enable_ema": True,
        "unsup_coef": 0.5,
        "unsup_data": write_jsonl(folder / "texts.jsonl", [{"text": p} for p in PROMPTS[:11]]),
    }
    return Workplace(folder, server, config)


@pytest.fixture(scope="session")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, server: ForkServer, letters: Path
) -> tuple[dict[str, Any], dict[str, int]]:
    """The result of a run that nothing befell, and how often each moment came in it."""
    workplace = make_workplace(tmp_path_factory.mktemp("whole"), server, letters)
    assert workplace.run("run", counts=workplace.folder / "counts.json") == 0, workplace.log("run")
    counts = json.loads((workplace.folder / "counts.json").read_text())
    return result(workplace.folder / "run"), counts


@pytest.fixture(scope="session")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory, server: ForkServer, letters: Path) -> Callable[[int], Any]:
    """The result of an uninterrupted run on two ranks, by ZeRO stage."""

    @cache
    def whole(stage: int) -> dict[str, Any]:
        workplace = make_workplace(tmp_path_factory.mktemp("ranks"), server, letters)
        assert workplace.run_ranks("run", f"zero_stage={stage}") == [0, 0], workplace.log("run")
        return result(workplace.folder / "run")

    return whole
