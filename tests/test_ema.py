"""Averaged weights: the recurrence, at every ZeRO stage and in half precision; what is left when they are looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from rlhf_fast.ema import WeightAverage
from rlhf_fast.engine import Engine, World, init_distributed
from rlhf_fast.errors import CheckpointError
from tests.engine_cases import batch, engine, net, scramble, train_step, weights

DECAY = 0.8  # the average is far from both ends after a few steps
KINDS = [(stage, dtype) for stage in (0, 1, 2, 3) for dtype in ("float32", "bfloat16", "float16")]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


pytestmark = pytest.mark.usefixtures("float16")


@pytest.fixture(scope="module")
def world() -> World:
    return init_distributed("cpu")


def averaged(ours: Engine) -> list[torch.Tensor]:
    with ours.averaged():
        return [p.detach().clone() for p in ours.module.parameters()]


def masters(ours: Engine, dtype: str) -> list[torch.Tensor]:
    """fp32 weights as DeepSpeed itself gives them, in the module's order."""
    if dtype == "float32":
        return weights(ours)
    return [safe_get_full_fp32_param(p).detach().clone() for p in ours.module.parameters()]


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_the_recurrence(world: World, stage: int, dtype: str) -> None:
    ours, plain = engine(world, stage, dtype, ema_decay=DECAY), engine(world, stage, dtype)
    expected = [w.double() for w in masters(ours, dtype)]
    rounded = [w.double() for w in weights(ours)]
    for step in range(6):
        train_step(ours, [batch(step)])
        train_step(plain, [batch(step)])
        expected = [DECAY * e + (1 - DECAY) * w.double() for e, w in zip(expected, masters(ours, dtype), strict=True)]
        rounded = [DECAY * e + (1 - DECAY) * w.double() for e, w in zip(rounded, weights(ours), strict=True)]
        if step == 3:  # looking changes nothing: the steps after it are those of an engine that has no average
            averaged(ours)
    for mine, theirs in zip(weights(ours), weights(plain), strict=True):
        assert torch.equal(mine, theirs)
    found = averaged(ours)
    if dtype == "float32":
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)
    else:  # the average itself, before it is rounded for the module, is of the fp32 weights and not of the rounded ones
        with ours.averaged():
            exact = masters(ours, dtype)
        for mine, working, theirs in zip(exact, found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)
            assert torch.equal(working, mine.to(DTYPES[dtype]))
        assert max(float((r - e).abs().max()) for r, e in zip(rounded, expected, strict=True)) > 1e-5
    assert not torch.equal(found[0], weights(ours)[0])


@pytest.mark.parametrize(("stage", "dtype"), KINDS)
def test_resume_continues_the_same_bits(world: World, tmp_path: Path, stage: int, dtype: str) -> None:
    straight = engine(world, stage, dtype, ema_decay=DECAY)
    for step in range(3):
        train_step(straight, [batch(step)])
    straight.save(tmp_path / "policy")
    resumed = engine(world, stage, dtype, ema_decay=DECAY, module=net().apply(scramble))
    resumed.load(tmp_path / "policy")
    for step in range(3, 5):
        for one in (straight, resumed):
            train_step(one, [batch(step)])
    assert all(torch.equal(a, b) for a, b in zip(averaged(straight), averaged(resumed), strict=True))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_dropped_step_is_not_averaged(world: World, stage: int) -> None:
    ours = engine(world, stage, ema_decay=DECAY)
    train_step(ours, [batch(0)])
    train_step(ours, [batch(1)])
    before = averaged(ours)
    assert train_step(ours, [batch(2) * float("nan")]).skipped
    assert all(torch.equal(a, b) for a, b in zip(averaged(ours), before, strict=True))


def test_load_says_what_does_not_fit(tmp_path: Path) -> None:
    average = WeightAverage([torch.zeros(3)], DECAY)
    with pytest.raises(CheckpointError, match=r"ema-0\.pt: no averaged weights"):
        average.load(tmp_path / "ema-0.pt")
    average.save(tmp_path / "ema-0.pt")
    with pytest.raises(CheckpointError, match="averages of other weights"):
        WeightAverage([torch.zeros(4)], DECAY).load(tmp_path / "ema-0.pt")
