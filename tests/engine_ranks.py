"""Run by test_engine.py under torchrun on two ranks, or alone: train, drop a bad step, save, resume, write findings.

Arguments: a folder, and the engines as "2-host": ZeRO stage and what is offloaded.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import torch

import rlhf_fast.engine
from rlhf_fast.checkpoint import latest_checkpoint, save_checkpoint
from rlhf_fast.engine import any_rank, init_distributed
from tests.engine_cases import batch, engine, loss, offloading, train_step, weights


def main(folder: Path, engines: list[str]) -> None:
    world = init_distributed("cpu")
    rlhf_fast.engine.memory_apart = lambda world: True
    for name in engines:
        stage, home = int(name[0]), name[2:]
        settings = offloading(stage, home, folder / "disk")  # type: ignore[arg-type]
        ours = engine(world, stage, **settings)
        norms, skipped = [], []
        for step in range(4):
            rows = batch(step).chunk(world.world_size)[world.rank].clone()
            if step == 2 and world.rank == world.world_size - 1:
                rows[0, 0] = float("nan")
            result = train_step(ours, list(rows.split(2)))
            norms.append(result.grad_norm)
            skipped.append(result.skipped)
        trained = weights(ours)
        save_checkpoint(folder / f"checkpoints-{name}", 3, ours.save, keep=1, world=world)
        path = latest_checkpoint(folder / f"checkpoints-{name}")
        assert path is not None
        other = engine(world, stage, **settings)
        other.load(path)
        for one in (ours, other):
            rows = batch(4).chunk(world.world_size)[world.rank]
            train_step(one, list(rows.split(2)))
        differs = any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(other), strict=True))
        findings = {
            "norms": norms,
            "skipped": skipped,
            "weights": trained,
            "resumed_is_equal": not any_rank(differs, world),
        }
        if stage in (1, 2):  # a NaN in the part of the gradient that the last rank keeps
            nan = float("nan") if world.rank == world.world_size - 1 else 0.0
            ours.backward(loss(ours, rows).float() + nan * ours.module[3].bias.sum(), last=True)
            findings["seen_by_all"] = not any_rank(ours.gradients_are_finite(), world)
        if world.is_main:
            torch.save(findings, folder / f"{name}.pt")

    if world.world_size == 1:
        ours = engine(world, 1, "bfloat16")  # DeepSpeed is talkative there
        train_step(ours, [batch(0)])
        ours.save(folder / "bfloat16")
        ours.load(folder / "bfloat16")
    else:

        def full_disk(path: Path) -> None:
            if world.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        save_checkpoint(folder / "checkpoints-0-device", 9, full_disk, keep=1, world=world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
