"""Weights and optimiser in files: that they are there, also after a resume, and what is said when there is no room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_fast.engine import Engine, init_distributed
from rlhf_fast.errors import ConfigError
from rlhf_fast.on_disk import zeros_on_disk
from tests.engine_cases import Home, batch, engine, offloading, train_step, weights


def is_in_a_file(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is that of a file of the folder, which has been unlinked."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return str(folder) in line and line.endswith("(deleted)")
    return False


def kept(ours: Engine, stage: int) -> list[Tensor]:
    optimizer = ours._engine.optimizer
    moments = [t for state in ours._engine.basic_optimizer.state.values() for t in state.values() if t.numel() > 1]
    if stage == 3:
        return [*moments, *optimizer.fp32_partitioned_groups_flat, *(p.ds_tensor for p in ours.module.parameters())]
    views = [p._hp_mapping.hp_fragment for p in ours.module.parameters()]  # DeepSpeed's, of the master weights
    return [*moments, *optimizer.single_partition_of_fp32_groups, *views]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_offloaded_is_in_files_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setattr("rlhf_fast.engine.memory_apart", lambda world: True)
    world, disk = init_distributed("cpu"), tmp_path / "disk"
    first, second = (engine(world, stage, "bfloat16", **offloading(stage, "disk", disk)) for _ in range(2))
    train_step(first, [batch(0)])
    first.save(tmp_path / "policy")
    second.load(tmp_path / "policy")
    train_step(second, [batch(1)])
    for ours in (first, second):
        assert all(is_in_a_file(tensor, disk) for tensor in kept(ours, stage))
    assert not list(disk.iterdir())  # no name is left: a run that is killed leaves nothing


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("before", "after"), [("host", "disk"), ("disk", "host")])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resume_may_move_to_the_disk_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int, before: Home, after: Home, steps: int
) -> None:
    monkeypatch.setattr("rlhf_fast.engine.memory_apart", lambda world: True)
    world = init_distributed("cpu")
    first, second = (engine(world, stage, "bfloat16", **offloading(stage, home, tmp_path)) for home in (before, after))
    for step in range(steps):
        train_step(first, [batch(step)])
    first.save(tmp_path / "policy")
    second.load(tmp_path / "policy")
    for step in range(steps, 4):
        assert train_step(first, [batch(step)]) == train_step(second, [batch(step)])
    for mine, theirs in zip(weights(second), weights(first), strict=True):
        assert torch.equal(mine, theirs)


def test_no_room_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"nvme_path: no {4 * 10**16} bytes to be had in {tmp_path}"):
        zeros_on_disk(torch.empty(10**16, device="meta"), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"nvme_path: no 12 bytes to be had in .*file \((File exists|Not a directory)\)"
    ):
        zeros_on_disk(torch.zeros(3), tmp_path / "file")
