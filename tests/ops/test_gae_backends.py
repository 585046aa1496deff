"""gae in C++ and in Triton against the reference in float64. The scan is shaped_gae's: its tests cover more of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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


def make(mask: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    normal = Normals(seed, dtype)
    rewards, values = poison(normal(*mask.shape), mask), poison(normal(*mask.shape), mask)
    return {"rewards": rewards, "values": values, "mask": mask, "last_values": normal(mask.shape[0])}


def holes(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < 0.8


def compare(backend: Backend, inputs: dict[str, Any], tolerance: float = 1e-5, **options: Any) -> None:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    found = ops.gae(**inputs, **options, backend=backend)
    for actual, expected in zip(found, ops.gae(**wide, **options, backend="reference"), strict=True):
        close(actual.double(), expected, tolerance)
        assert_zero_outside(actual, inputs["mask"])


@backends
@settings(max_examples=30, deadline=None)
@given(
    masks(max_rows=9),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.booleans(),
    seeds,
)
def test_any_mask(
    backend: Backend, mask: Tensor, dtype: torch.dtype, gamma: float, lam: float, turned: bool, seed: int
) -> None:
    inputs = make(mask, dtype, seed)
    if turned:  # columns are not contiguous
        inputs |= {name: inputs[name].t().contiguous().t() for name in ("rewards", "values", "mask")}
    compare(backend, inputs, gamma=gamma, lam=lam)


@pytest.mark.parametrize("columns", [1, 128, 129, 700])
def test_cpp_blocks(columns: int) -> None:
    compare("cpp", make(holes(19, columns)))
    compare("cpp", make(holes(19, columns), torch.float64), 1e-12)


@backends
def test_a_row_has_the_same_bits_in_any_batch(backend: Backend) -> None:
    inputs = make(holes(37, 300) if backend == "cpp" else holes(3, 21))
    together = ops.gae(**inputs, backend=backend)
    threads = torch.get_num_threads()
    for row in range(0, inputs["mask"].shape[0], 2):
        torch.set_num_threads(1 + row % 4 // 2)
        alone = ops.gae(**{name: x[row : row + 1] for name, x in inputs.items()}, backend=backend)
        torch.set_num_threads(threads)
        for one, all_rows in zip(alone, together, strict=True):
            assert torch.equal(one[0], all_rows[row])
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    assert not torch.equal(together[0], ops.gae(**wide)[0].float())  # the bits can tell


@backends
def test_offsets_beyond_32_bits(backend: Backend) -> None:
    """Rows 2^31 elements apart. The memory between them is never touched, so it is never there."""
    stride = 2**31 + 40
    values = torch.empty(2 * stride + 64, dtype=torch.float32).as_strided((3, 8), (stride, 1))
    inputs = make(torch.ones(3, 8, dtype=torch.bool))
    expected = ops.gae(**inputs, backend=backend)
    values.copy_(inputs["values"])
    for a, b in zip(ops.gae(**inputs | {"values": values}, backend=backend), expected, strict=True):
        assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing(backend: Backend, shape: tuple[int, int]) -> None:
    assert ops.gae(**make(holes(*shape)), backend=backend)[0].shape == shape


@backends
def test_gradients_are_the_references(backend: Backend) -> None:
    inputs = make(holes(2, 4))
    inputs["rewards"].requires_grad_()
    with pytest.raises(ValueError, match=f"gae: backend '{backend}' has no gradient, and rewards requires one"):
        ops.gae(**inputs, backend=backend)
    assert ops.gae(**inputs)[0].requires_grad


@backends
def test_opcheck(backend: Backend) -> None:
    load_compiled_ops()
    from rlhf_fast.kernels import gae as kernel

    operator = torch.ops.rlhf_fast.gae.default if backend == "cpp" else kernel.gae
    i = make(holes(3, 8))
    for last in (None, i["last_values"]):
        torch.library.opcheck(operator, (i["rewards"], i["values"], i["mask"], 0.9, 0.8, last))


@backends
def test_compiled_graph(backend: Backend) -> None:
    def run(i: dict[str, Any]) -> Tensor:
        return torch.stack(ops.gae(**i, backend=backend)) * 2

    torch.compiler.reset()
    inputs = make(holes(3, 8))
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(inputs), run(inputs))
