"""masked_whiten in C++ and in Triton against the reference in float64."""

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
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import load_compiled_ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

BACKENDS: list[Backend] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def case(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7
    return poison(3 * Normals(seed, dtype)(*shape) + 5, mask), mask


def compare(backend: Backend, x: Tensor, mask: Tensor, tolerance: float = 1e-5, shift_mean: bool = True) -> None:
    found = ops.masked_whiten(x, mask, shift_mean=shift_mean, backend=backend)
    close(found.double(), ops.masked_whiten(x.double(), mask, shift_mean=shift_mean, backend="reference"), tolerance)
    assert_zero_outside(found, mask)


@backends
@settings(max_examples=30, deadline=None)
@given(
    masks(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_any_mask(
    backend: Backend, mask: Tensor, dtype: torch.dtype, shift_mean: bool, turned: bool, seed: int
) -> None:
    x = poison(3 * Normals(seed, dtype)(*mask.shape) + 5, mask)
    if mask.sum() == 1:  # alone, a number is its mean, and what rounding leaves of it is divided by sqrt(eps)
        return
    compare(backend, x.t().contiguous().t() if turned else x, mask, 2e-5, shift_mean)


@backends
@pytest.mark.parametrize("size", [1, 7, 2048, 2049, 10_001])
def test_blocks(backend: Backend, size: int) -> None:
    compare(backend, *case(size))


def test_float64() -> None:
    compare("cpp", *case(3, 5000, dtype=torch.float64), 1e-12)
    with pytest.raises(TypeError, match="masked_whiten: Triton takes float32"):
        ops.masked_whiten(*case(3, 5, dtype=torch.float64), backend="triton")


@backends
def test_large_mean_does_not_cancel(backend: Backend) -> None:
    x, mask = case(5000)
    compare(backend, x + 100_000, mask, 1e-4)


@backends
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 3, 2)])
def test_any_shape(backend: Backend, shape: tuple[int, ...]) -> None:
    compare(backend, *case(*shape))


@backends
def test_the_same_bits_with_any_threads(backend: Backend) -> None:
    x, mask = case(100_001 if backend == "cpp" else 5001)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        found.append(ops.masked_whiten(x, mask, backend=backend))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not torch.equal(found[0], ops.masked_whiten(x, mask, backend="reference"))  # the bits can tell


RANKS = 2


def whiten_on_a_rank(rank: int, backend: Backend, store: str, results: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    x, mask = case(2 * RANKS, 50)
    mine = slice(2 * rank, 2 * rank + 2)
    torch.save(ops.masked_whiten(x[mine], mask[mine], group=dist.group.WORLD, backend=backend), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@backends
def test_over_ranks_equals_one_process(backend: Backend, tmp_path: Path) -> None:
    mp.spawn(whiten_on_a_rank, args=(backend, str(tmp_path / "store"), str(tmp_path)), nprocs=RANKS)
    x, mask = case(2 * RANKS, 50)
    together = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)])
    close(together, ops.masked_whiten(x, mask, backend="reference"), 1e-5)


@backends
def test_gradients_are_the_references(backend: Backend) -> None:
    x, mask = case(2, 4)
    with pytest.raises(ValueError, match=f"masked_whiten: backend '{backend}' has no gradient, and x requires one"):
        ops.masked_whiten(x.requires_grad_(), mask, backend=backend)
    assert ops.masked_whiten(x, mask).requires_grad


@backends
def test_opcheck(backend: Backend) -> None:
    load_compiled_ops()
    from rlhf_fast.kernels import masked_whiten as kernel

    cpp = torch.ops.rlhf_fast
    moments = cpp._masked_moments.default if backend == "cpp" else kernel.masked_moments
    normalise = cpp._masked_normalise.default if backend == "cpp" else kernel.masked_normalise
    x, mask = torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool)
    torch.library.opcheck(moments, (x, mask))
    torch.library.opcheck(normalise, (x, mask, moments(x, mask), True, 1e-8))


@backends
def test_compiled_graph(backend: Backend) -> None:
    def run(x: Tensor, mask: Tensor) -> Tensor:
        return ops.masked_whiten(x, mask, backend=backend) * 2

    torch.compiler.reset()
    inputs = case(3, 8)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs), run(*inputs))
