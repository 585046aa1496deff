"""The processes of a run: who am I, and a few collectives on plain values. Knows torch.distributed only."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rlhf_fast.errors import ConfigError

Value = TypeVar("Value", float, torch.Tensor)

# A rank may wait for another one's rewards or its checkpoint; DeepSpeed and torch give up after 10 to 30 minutes.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes what is written once."""
        return self.rank == 0


def init_distributed(device: str | None = None) -> World:
    """Join the other ranks (as torchrun or the deepspeed launcher tell by environment), or be alone.

    One process needs no launcher and opens no port. Calling it again returns the same World.

    Args:
        device: "cpu" or "cuda"; None takes the GPU when there is one.
    Raises:
        ConfigError: "cuda" without a GPU, more local ranks than GPUs, or a launcher's environment with holes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected 'cpu' or 'cuda', got {kind!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: 'cuda' was asked for, but torch sees no GPU; see `rlhf-fast doctor`")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: torch sees {torch.cuda.device_count()}; "
                "start as many processes on this machine as it has GPUs"
            )
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        _join("nccl" if kind == "cuda" else "gloo", place)
    return World(dist.get_rank(), dist.get_world_size(), local_rank, place)


def _join(backend: str, device: torch.device) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set; start with torchrun or deepspeed"
        )
    if missing:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    else:
        # Binding the device lets NCCL connect at once and barriers know their GPU.
        bound = device if backend == "nccl" and world_size > 1 else None
        dist.init_process_group(backend, init_method="env://", timeout=TIMEOUT, device_id=bound)
    atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        alone = dist.get_world_size() == 1
        dist.destroy_process_group()
        if not alone:
            # A thread of gloo's may still wait for the interpreter's lock, to let go of the last collective's tensors.
            # Where the interpreter ends first that aborts a process that has done all its work.
            time.sleep(0.1)


def all_reduce_sum(value: Value, world: World) -> Value:
    """Sum over all ranks of a float or a tensor (any shape, equal on all ranks; a new tensor comes back)."""
    return _all_reduce(value, world, dist.ReduceOp.SUM)


def all_reduce_max(value: Value, world: World) -> Value:
    """The largest over all ranks, element by element."""
    return _all_reduce(value, world, dist.ReduceOp.MAX)


def any_rank(flag: bool, world: World) -> bool:
    """True on every rank if it is True on one."""
    return all_reduce_max(float(flag), world) > 0


def _all_reduce(value: Value, world: World, op: Any) -> Value:
    if world.world_size == 1:
        return value
    if isinstance(value, torch.Tensor):
        total = value.detach().to(world.device, copy=True)
        dist.all_reduce(total, op)
        return total.to(value.device)
    number = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(number, op)
    return number.item()


def broadcast_object(obj: Any, world: World, src: int = 0) -> Any:
    """What rank `src` passed, on every rank. Goes through pickle: for values of ours, never for a stranger's."""
    if world.world_size == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=src, device=world.device)
    return box[0]


def gather_objects(obj: Any, world: World) -> list[Any]:
    """What each rank passed, in rank order, on every rank. Goes through pickle, as broadcast_object does."""
    if world.world_size == 1:
        return [obj]
    boxes: list[Any] = [None] * world.world_size
    dist.all_gather_object(boxes, obj)
    return boxes


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.world_size > 1:
        dist.barrier()
