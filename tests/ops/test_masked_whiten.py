"""masked_whiten against the statistics of the masked numbers, in one process and over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds


def by_definition(x: Tensor, mask: Tensor, shift_mean: bool, eps: float) -> Tensor:
    numbers = x[mask].tolist()
    out = torch.zeros(x.shape, dtype=torch.float64)
    if numbers:
        mean = sum(numbers) / len(numbers)
        deviation = (sum((n - mean) ** 2 for n in numbers) / len(numbers) + eps) ** 0.5
        whitened = [(n - mean) / deviation + (0 if shift_mean else mean) for n in numbers]
        out[mask] = torch.tensor(whitened, dtype=torch.float64)
    return out


@settings(max_examples=80, deadline=None)
@given(masks(), seeds, st.booleans(), st.sampled_from([1e-8, 0.1]))
def test_definition(mask: Tensor, seed: int, shift_mean: bool, eps: float) -> None:
    x = 3 * Normals(seed)(*mask.shape) + 5
    whitened = ops.masked_whiten(poison(x, mask), mask, shift_mean=shift_mean, eps=eps)
    close(whitened, by_definition(x, mask, shift_mean, eps), 1e-9)
    assert_zero_outside(whitened, mask)


def test_large_mean_in_fp32_does_not_cancel() -> None:
    x = torch.tensor([[10000.0, 10001.0, 10002.0, 10003.0]])
    mask = torch.ones_like(x, dtype=torch.bool)
    close(ops.masked_whiten(x, mask), by_definition(x.double(), mask, True, 1e-8), 1e-4)


def test_gradients_without_a_group() -> None:
    x, mask = Normals(0)(2, 4).requires_grad_(), torch.tensor([[True, True, False, True], [False, True, True, False]])
    assert torch.autograd.gradcheck(lambda x: ops.masked_whiten(x, mask), [x])
    assert torch.autograd.gradcheck(lambda x: ops.masked_whiten(x, mask, shift_mean=False), [x])

    poisoned = poison(x.detach(), mask).requires_grad_()
    ops.masked_whiten(poisoned, mask).square().sum().backward()
    assert poisoned.grad is not None
    assert_zero_outside(poisoned.grad, mask)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (2, 3, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = Normals(1)(*shape)
    mask = torch.ones(shape, dtype=torch.bool)
    close(ops.masked_whiten(x, mask), by_definition(x, mask, True, 1e-8))


RANKS = 2


def whole_batches() -> list[tuple[Tensor, Tensor]]:
    """(x, mask) with two rows for each rank; in the second batch a rank has no masked token, in the third none has."""
    x = 2 * Normals(7)(2 * RANKS, 5) + 100
    mask = torch.rand(2 * RANKS, 5, generator=torch.Generator().manual_seed(0)) > 0.4
    second = mask.clone()
    second[2:] = False
    return [(x, mask), (x, second), (x, torch.zeros_like(mask))]


def whiten_on_a_rank(rank: int, store: str, results: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mine = slice(2 * rank, 2 * rank + 2)
    parts = [
        ops.masked_whiten(poison(x, mask)[mine], mask[mine], group=dist.group.WORLD, shift_mean=shift_mean)
        for x, mask in whole_batches()
        for shift_mean in (True, False)
    ]
    torch.save(parts, f"{results}/{rank}.pt")
    with pytest.raises(ValueError, match="x must not require a gradient"):
        ops.masked_whiten(parts[0].requires_grad_(), parts[0] > 0, group=dist.group.WORLD)
    dist.destroy_process_group()


def test_over_ranks_equals_one_process(tmp_path: Path) -> None:
    mp.spawn(whiten_on_a_rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    cases = [(x, mask, shift_mean) for x, mask in whole_batches() for shift_mean in (True, False)]
    for i, (x, mask, shift_mean) in enumerate(cases):
        together = torch.cat([parts[i] for parts in ranks])
        close(together, ops.masked_whiten(x, mask, shift_mean=shift_mean), 1e-9)
        assert_zero_outside(together, mask)
