"""The engine against plain PyTorch: same updates for any split, bad steps change nothing, resume continues the bits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf_fast.checkpoint import latest_checkpoint
from rlhf_fast.engine import World, init_distributed
from rlhf_fast.errors import CheckpointError, ConfigError
from tests.engine_cases import (
    Home,
    batch,
    engine,
    learning_rate,
    loss,
    net,
    offloading,
    plain_training,
    scramble,
    train_step,
    weights,
)

ROOT = Path(__file__).parents[1]
STAGES = [0, 1, 2, 3]
HOMES: list[tuple[int, Home]] = [(stage, "device") for stage in STAGES]
HOMES += [(stage, home) for stage in STAGES[1:] for home in ("host", "disk")]
KINDS = [(*home, dtype) for home in HOMES for dtype in ("float32", "bfloat16")]
BAD = [(*kind, float("nan")) for kind in KINDS] + [(*home, "float32", float("inf")) for home in HOMES]


@pytest.fixture(scope="module")
def world() -> World:
    return init_distributed("cpu")


@pytest.fixture(autouse=True)
def everything_can_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed offloads from a CPU too, from memory to memory, as it does from a GPU."""
    monkeypatch.setattr("rlhf_fast.engine.memory_apart", lambda world: True)


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "home"), HOMES)
def test_update_is_plain_adamw_for_any_number_of_micro_batches(
    world: World, tmp_path: Path, stage: int, home: Home
) -> None:
    expected, norms = plain_training(net(), [0, 1, 2, 3, 4])
    ours = engine(world, stage, **offloading(stage, home, tmp_path))
    for step, sizes in enumerate([[8], [3, 5], [1, 1, 6], [2, 2, 2, 2], [8]]):
        assert ours.learning_rate == pytest.approx(learning_rate(step))
        result = train_step(ours, list(batch(step).split(sizes)))
        assert result.grad_norm == pytest.approx(norms[step], rel=1e-5)
        assert not result.skipped
    assert max(norms) > 1.0  # clipping was at work
    assert_close(weights(ours), expected, 1e-6)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 2e-4), ("float16", 2e-5)])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("float16")
def test_half_precision_trains_float32_weights(world: World, stage: int, dtype: str, rate: float) -> None:
    # One step is less than half a unit of a weight of 0.2: without fp32 weights nothing would ever move.
    fields = {"warmup_ratio": 0.0, "lr_scheduler_type": "constant", "learning_rate": rate, "weight_decay": 0.0}
    ours, exact = engine(world, stage, dtype, **fields), engine(world, **fields)
    for step in range(20):
        train_step(ours, [batch(step)])
        train_step(exact, [batch(step)])
    start = torch.cat([p.detach().flatten() for p in net().parameters()])
    mine, theirs = (torch.cat([p.flatten().float() for p in weights(one)]) for one in (ours, exact))
    large = start.abs() > 0.2
    assert (mine - theirs)[large].abs().mean() < 0.5 * (theirs - start)[large].abs().mean()


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_gradients_are_summed_in_float32(world: World, stage: int) -> None:
    ours = engine(world, stage, "bfloat16", module=nn.Linear(1, 1, bias=False))
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    ours.backward(ours(one).sum(), last=False)
    for i in range(33):
        ours.backward(ours(one).sum() / 512, last=i == 32)  # in bf16 1 + 1/512 is 1, and 1 + 33/512 is not itself
    assert ours.step().grad_norm == pytest.approx(1 + 33 / 512, rel=1e-6)


def test_float64_gradients_are_exact_at_stage_0(world: World) -> None:
    ours = engine(world, 0, "float64", module=net(torch.float64))
    for i, rows in enumerate(batch(0).split([1, 4, 3])):
        ours.backward(loss(ours, rows), last=i == 2)
    reference = net(torch.float64)
    loss(reference, batch(0)).backward()
    for mine, theirs in zip(ours.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_biases_and_norms_do_not_decay(world: World) -> None:
    module = net()
    nn.init.ones_(module[0].bias)
    ours = engine(world, module=module, weight_decay=0.5, warmup_ratio=0.0)
    before = weights(ours)
    ours.backward(0 * loss(ours, batch(0)).float(), last=True)
    ours.step()
    for old, new in zip(before, weights(ours), strict=True):
        torch.testing.assert_close(new, old * (1 - 0.5 * 1e-2) if old.ndim == 2 else old)


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_and_tied_weights(world: World, stage: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(5, 6)
            self.body = nn.Linear(6, 6)
            self.head = nn.Linear(6, 5, bias=False)
            self.head.weight = self.embed.weight
            self.body.weight.requires_grad_(False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.body(self.embed(ids)))).logsumexp(-1).sum()

    reference, ids = Tied(), torch.tensor([0, 1, 3])
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95))
    ours = engine(world, stage, module=Tied(), warmup_ratio=0.0, lr_scheduler_type="constant", weight_decay=0.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(3):
        ours.backward(ours(ids), last=True)
        ours.step()
        reference(ids).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(weights(ours), list(reference.parameters()), 1e-6)
    with ours.gathered():
        assert ours.module.head.weight is ours.module.embed.weight
        assert torch.equal(ours.module.body.weight, Tied().body.weight)


# ---- bad steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "home", "dtype", "bad"), BAD)
def test_a_bad_micro_batch_changes_nothing(
    world: World, tmp_path: Path, stage: int, home: Home, dtype: str, bad: float
) -> None:
    settings = offloading(stage, home, tmp_path)
    ours, never = engine(world, stage, dtype, **settings), engine(world, stage, dtype, **settings)
    for one in (ours, never):
        train_step(one, [batch(0)])
        train_step(one, [batch(1)])
    before, rate = weights(ours), ours.learning_rate
    spoiled = batch(2)
    spoiled[1, 2] = bad
    for micro_batches in ([spoiled[:4], batch(2)[4:]], [batch(2)[4:], spoiled[:4]]):
        result = train_step(ours, micro_batches)
        assert result.skipped
        assert not torch.isfinite(torch.tensor(result.grad_norm))
        assert_same(weights(ours), before)
        assert ours.learning_rate == rate
    for step in (3, 4):
        mine = train_step(ours, list(batch(step).split(4)))
        theirs = train_step(never, list(batch(step).split(4)))
        assert mine == theirs  # same gradient norm to the bit, not skipped
        assert_same(weights(ours), weights(never))
        assert ours.learning_rate == never.learning_rate


@pytest.mark.parametrize(("stage", "home", "dtype"), KINDS)
def test_zero_grad_forgets_part_of_a_step_and_a_whole_one(
    world: World, tmp_path: Path, stage: int, home: Home, dtype: str
) -> None:
    settings = offloading(stage, home, tmp_path)
    ours, never = engine(world, stage, dtype, **settings), engine(world, stage, dtype, **settings)
    train_step(ours, [batch(0)])
    train_step(never, [batch(0)])
    ours.backward(loss(ours, batch(7)).float(), last=False)
    ours.zero_grad()
    ours.backward(loss(ours, batch(8)).float(), last=False)
    ours.backward(loss(ours, batch(9)).float(), last=True)
    ours.zero_grad()
    for step in (1, 2):
        assert train_step(ours, list(batch(step).split(4))) == train_step(never, list(batch(step).split(4)))
    assert_same(weights(ours), weights(never))


@pytest.mark.parametrize(("stage", "home", "dtype"), KINDS)
def test_finiteness_can_be_asked_before_the_step(
    world: World, tmp_path: Path, stage: int, home: Home, dtype: str
) -> None:
    settings = offloading(stage, home, tmp_path)
    ours = engine(world, stage, dtype, **settings)
    spoiled = batch(0)
    spoiled[0, 0] = float("nan")
    for rows, finite in ((spoiled, False), (batch(0), True)):
        ours.backward(loss(ours, rows[:4]).float(), last=False)
        ours.backward(loss(ours, rows[4:]).float(), last=True)
        assert ours.gradients_are_finite() is finite
        if not finite:
            ours.zero_grad()
    never = engine(world, stage, dtype, **settings)
    assert ours.step() == train_step(never, [batch(0)[:4], batch(0)[4:]])


@pytest.mark.parametrize(("stage", "home", "dtype"), KINDS)
def test_a_spike_changes_nothing(world: World, tmp_path: Path, stage: int, home: Home, dtype: str) -> None:
    settings = offloading(stage, home, tmp_path)
    ours, never = engine(world, stage, dtype, skip_grad_norm=100.0, **settings), engine(world, stage, dtype, **settings)
    for one in (ours, never):
        assert not train_step(one, [batch(0)]).skipped
    before, rate = weights(ours), ours.learning_rate
    ours.backward(300 * loss(ours, batch(1)).float(), last=True)
    result = ours.step()
    assert result.skipped
    assert 100 < result.grad_norm < float("inf")
    assert_same(weights(ours), before)
    assert ours.learning_rate == rate
    assert train_step(ours, [batch(2)]) == train_step(never, [batch(2)])
    assert_same(weights(ours), weights(never))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("float16")
def test_float16_halves_its_loss_scale_instead_of_stopping(world: World, tmp_path: Path, stage: int) -> None:
    one = torch.ones(1, 1, dtype=torch.float16)
    ours = engine(world, stage, "float16", module=nn.Linear(1, 1, bias=False))
    for finite in (False, True):  # a gradient of 20 is beyond fp16 at a scale of 4096, not at 2048
        ours.backward(20 * ours(one).sum(), last=True)
        assert ours.gradients_are_finite() is finite
        ours.zero_grad()

    ours, exact = engine(world, stage, "float16"), engine(world)
    spoiled = batch(9)
    spoiled[0, 0] = float("nan")
    for _ in range(15):  # down to a scale of 1, and no further
        assert train_step(ours, [spoiled]).skipped
    for step in range(3):
        result = train_step(ours, list(batch(step).split(4)))
        assert result.grad_norm == pytest.approx(train_step(exact, [batch(step)]).grad_norm, rel=1e-2)
    ours.save(tmp_path / "policy")
    resumed = engine(world, stage, "float16")
    resumed.load(tmp_path / "policy")
    assert train_step(resumed, [spoiled]).skipped  # with a fresh scale this would halve it...
    assert train_step(ours, [spoiled]).skipped
    assert train_step(resumed, [batch(3)]) == train_step(ours, [batch(3)])  # ...and this would round otherwise
    assert_same(weights(resumed), weights(ours))


# ---- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "home", "dtype"), KINDS)
def test_resume_continues_the_same_bits(world: World, tmp_path: Path, stage: int, home: Home, dtype: str) -> None:
    settings = offloading(stage, home, tmp_path)
    straight = engine(world, stage, dtype, **settings)
    first = engine(world, stage, dtype, **settings)
    for step in range(3):
        train_step(straight, list(batch(step).split(4)))
        train_step(first, list(batch(step).split(4)))
    first.save(tmp_path / "policy")
    second = engine(world, stage, dtype, **settings, module=net().apply(scramble))
    second.load(tmp_path / "policy")
    assert_same(weights(second), weights(straight))
    for step in range(3, 6):
        assert second.learning_rate == straight.learning_rate
        assert train_step(second, list(batch(step).split(4))) == train_step(straight, list(batch(step).split(4)))
        assert_same(weights(second), weights(straight))


@pytest.mark.parametrize(("stage", "home", "dtype"), KINDS)
def test_an_engine_that_has_not_stepped_is_saved_too(
    world: World, tmp_path: Path, stage: int, home: Home, dtype: str
) -> None:
    settings = offloading(stage, home, tmp_path)
    first = engine(world, stage, dtype, **settings)
    first.save(tmp_path / "policy")
    second = engine(world, stage, dtype, **settings, module=net().apply(scramble))
    second.load(tmp_path / "policy")
    for step in range(2):
        assert train_step(second, [batch(step)]) == train_step(first, [batch(step)])
    assert_same(weights(second), weights(first))


def test_two_engines_train_and_save_side_by_side(world: World, tmp_path: Path) -> None:
    policy, critic = engine(world, 0), engine(world, 2, learning_rate=5e-3)
    alone = engine(world, 2, learning_rate=5e-3)
    for step in range(2):
        for half in batch(step).split(4):
            last = bool(torch.equal(half, batch(step)[4:]))
            policy.backward(loss(policy, half).float(), last=last)
            critic.backward(loss(critic, half).float(), last=last)
        policy.step()
        critic.step()
        train_step(alone, list(batch(step).split(4)))
    assert_same(weights(critic), weights(alone))
    policy.save(tmp_path / "policy")
    critic.save(tmp_path / "critic")
    loaded = engine(world, 2, learning_rate=5e-3)
    loaded.load(tmp_path / "critic")
    assert_same(weights(loaded), weights(critic))
    assert not list(tmp_path.rglob("*.py"))
    assert not list(tmp_path.rglob("latest"))


def test_load_says_what_does_not_fit(world: World, tmp_path: Path) -> None:
    ours = engine(world, 0)
    train_step(ours, [batch(0)])
    ours.save(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"policy.*zero_stage 0, this run has 1"):
        engine(world, 1).load(tmp_path / "policy")
    with pytest.raises(CheckpointError, match=r"nothing.*no saved engine"):
        ours.load(tmp_path / "nothing")
    other = engine(world, 0, module=nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(CheckpointError, match=r"policy.*another model"):
        other.load(tmp_path / "policy")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_constant_schedule_warms_up_too(world: World) -> None:
    ours = engine(world, lr_scheduler_type="constant", warmup_ratio=0.2)
    rates = []
    for step in range(4):
        rates.append(ours.learning_rate)
        train_step(ours, [batch(step)])
    assert rates == pytest.approx([0.0, 5e-3, 1e-2, 1e-2])


def test_a_short_run_does_not_waste_its_only_step(world: World) -> None:
    assert engine(world, warmup_ratio=0.03).learning_rate == 1e-2


def test_no_clipping_at_max_grad_norm_0(world: World) -> None:
    ours = [engine(world, stage, max_grad_norm=0.0, warmup_ratio=0.0) for stage in STAGES]
    for one in ours:
        train_step(one, [batch(0)])
    reference = net()
    loss(reference, batch(0)).backward()
    for mine in ours[1:]:
        assert_close(weights(mine), weights(ours[0]), 1e-6)
    expected = nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    assert train_step(engine(world, max_grad_norm=0.0), [batch(0)]).grad_norm == pytest.approx(float(expected))


def test_settings_that_cannot_work(world: World) -> None:
    with pytest.raises(ConfigError, match=r"offload_optimizer.*zero_stage 1, 2 or 3"):
        engine(world, 0, offload_optimizer=True)
    with pytest.raises(ConfigError, match=r"float64 needs zero_stage 0"):
        engine(world, 1, "float64")
    with pytest.raises(ConfigError, match=r"float64 needs .* a single process"):
        engine(World(rank=0, world_size=2, local_rank=0, device=world.device), 0, "float64")
    with pytest.raises(ConfigError, match="no trainable parameter"):
        engine(world, module=net().requires_grad_(False))
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        with pytest.raises(ConfigError, match=r"float16.*cpu"):
            engine(world, 0, "float16")


def test_init_distributed_again_is_the_same_world(world: World) -> None:
    assert init_distributed("cpu") == world
    assert (world.rank, world.world_size, world.device) == (0, 1, torch.device("cpu"))


# ---- other processes -------------------------------------------------------------------------------------------------


def run(launcher: list[str], tmp_path: Path, engines: list[str]) -> subprocess.CompletedProcess[str]:
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in launch}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    command = [sys.executable, *launcher, "-m", "tests.engine_ranks", str(tmp_path), *engines]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_alone_without_launcher_it_is_quiet_and_compiles_nothing(tmp_path: Path) -> None:
    done = run([], tmp_path, ["0-device", "1-host"])
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert not (tmp_path / "extensions").exists()


def test_two_ranks_do_as_one(world: World, tmp_path: Path) -> None:
    engines = [f"{stage}-{home}" for stage, home in HOMES]
    done = run(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], tmp_path, engines)
    for (stage, _), name in zip(HOMES, engines, strict=True):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        alone = engine(world, stage)
        for step in (0, 1, 3):  # the ranks dropped step 2: rank 1 alone had a NaN in it
            result = train_step(alone, [batch(step)])
            assert found["norms"][step] == pytest.approx(result.grad_norm, rel=1e-5)
        assert found["skipped"] == [False, False, True, False]
        assert_close(found["weights"], weights(alone), 1e-6)
        assert found["resumed_is_equal"]
        assert found.get("seen_by_all", True)
        files = json.loads((tmp_path / f"checkpoints-{name}" / "step-3" / "manifest.json").read_text())["files"]
        assert (stage == 0) != any("pp_rank_1" in name for name in files)  # what rank 1 wrote is in it
    # At the end rank 1 finds its disk full: the launcher ends rank 0, which waits for it; the old checkpoint is whole.
    assert done.returncode != 0
    assert re.search(r"CheckpointError: .*step-9 could not be written or read: No space left", done.stderr)
    assert latest_checkpoint(tmp_path / "checkpoints-0-device") == tmp_path / "checkpoints-0-device" / "step-3"
