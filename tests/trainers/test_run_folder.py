"""A run's folder belongs to one process at a time, and a finished run is known as one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_fast.config import SFTConfig
from rlhf_fast.distributed import init_distributed
from rlhf_fast.errors import ConfigError
from rlhf_fast.trainers.run_folder import is_finished, mark_finished, open_run_folder, release_run_folder

HOLDER = """
import sys
from pathlib import Path
from rlhf_fast.trainers.run_folder import _hold
_hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def config_of(folder: Path) -> SFTConfig:
    return SFTConfig(model_name_or_path="m", train_data="d", output_dir=str(folder), max_steps=2)


def test_another_process_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    folder, world = tmp_path / "run", init_distributed("cpu")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"{folder} \(process {holder.pid} on "):
            open_run_folder(config_of(folder), world, resume=False)
        assert not (folder / "config.yaml").exists()
        holder.kill()  # the lock goes with its process, the file may stay
    assert open_run_folder(config_of(folder), world, resume=False) is None
    assert (folder / ".lock").read_text().startswith(f"{os.getpid()} on ")
    release_run_folder(folder)
    assert not (folder / ".lock").exists()


def test_one_process_may_begin_again_in_its_own_folder(tmp_path: Path) -> None:
    folder, world = tmp_path / "run", init_distributed("cpu")
    for n in range(3):  # none of them is released, as after an error in a notebook
        open_run_folder(config_of(folder), world, resume=False)
        (folder / "metrics.jsonl").write_text("")
        assert len(list(tmp_path.iterdir())) == n + 1
    assert sorted(file.name for file in (tmp_path / "run.1").iterdir()) == ["config.yaml", "metrics.jsonl"]
    release_run_folder(folder)


def test_finished_means_this_config_and_all_its_steps(tmp_path: Path) -> None:
    config, world = config_of(tmp_path / "run"), init_distributed("cpu")
    open_run_folder(config, world, resume=False)
    release_run_folder(tmp_path / "run")
    assert not is_finished(config)
    mark_finished(tmp_path / "run", 2)
    assert is_finished(config)
    assert not is_finished(replace(config, max_steps=3))
    open_run_folder(config, world, resume=False)  # begins anew
    release_run_folder(tmp_path / "run")
    assert not is_finished(config)
