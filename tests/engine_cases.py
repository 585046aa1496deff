"""A small model, its batches and a plain AdamW loop: what the engine is compared with, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from rlhf_fast.config import Dtype, SFTConfig
from rlhf_fast.engine import Engine, StepResult, World

Home = Literal["device", "host", "disk"]  # of optimiser and, in ZeRO-3, weights

TOTAL_STEPS = 10
ROWS = 8  # of one optimiser step, over all micro-batches and ranks


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def scramble(module: nn.Module) -> None:
    """For apply(): other weights, of which a load must leave none."""
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


def batch(step: int) -> torch.Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(100 + step))


def config(stage: int = 0, dtype: Dtype = "float32", **fields: object) -> SFTConfig:
    settings: dict[str, object] = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_ratio": 0.2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
    }
    return SFTConfig(  # type: ignore[arg-type]
        model_name_or_path="-", train_data="-", zero_stage=stage, dtype=dtype, **(settings | fields)
    )


def engine(
    world: World,
    stage: int = 0,
    dtype: Dtype = "float32",
    module: nn.Module | None = None,
    ema_decay: float | None = None,
    **fields: object,
) -> Engine:
    settings = config(stage, dtype, **fields)
    return Engine(module or net(), config=settings, world=world, total_steps=TOTAL_STEPS, ema_decay=ema_decay)


def offloading(stage: int, home: Home, disk: Path) -> dict[str, object]:
    """Fields of a configuration. What goes to the host needs engine.memory_apart to be True, which no CPU is."""
    if home == "device":
        return {}
    fields: dict[str, object] = {"offload_optimizer": True, "offload_param": stage == 3}
    return fields | ({"nvme_path": str(disk)} if home == "disk" else {})


def loss(model, rows: torch.Tensor) -> torch.Tensor:
    """This micro-batch's part of the mean over the step's rows. Large enough that clipping bites."""
    parameter = next(iter(model.module.parameters() if isinstance(model, Engine) else model.parameters()))
    return 3 * model(rows.to(parameter.dtype)).double().pow(2).sum() / ROWS


def train_step(engine: Engine, micro_batches: list[torch.Tensor]) -> StepResult:
    for i, rows in enumerate(micro_batches):
        engine.backward(loss(engine, rows).float(), last=i == len(micro_batches) - 1)
    return engine.step()


def learning_rate(step: int) -> float:
    """Linear warm-up over two steps, then linear decay to 0 at step 10; step counts from 0."""
    return 1e-2 * (step / 2 if step < 2 else (TOTAL_STEPS - step) / (TOTAL_STEPS - 2))


def plain_training(model: nn.Module, steps: list[int]) -> tuple[list[torch.Tensor], list[float]]:
    """PyTorch alone on whole batches: the weights afterwards and the gradient norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95)
    )
    norms = []
    for i, step in enumerate(steps):
        loss(model, batch(step)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], norms


def weights(engine: Engine) -> list[torch.Tensor]:
    with engine.gathered():
        return [p.detach().clone() for p in engine.module.parameters()]
