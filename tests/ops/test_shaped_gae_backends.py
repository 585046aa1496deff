"""shaped_gae in C++ and in Triton against the reference in float64. Triton runs by its interpreter (conftest.py)."""

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

pytestmark = [
    pytest.mark.filterwarnings("ignore:kl_estimator"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in the interpreter
]


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    normal, generator = Normals(seed, dtype), torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.8
    inputs = {name: poison(normal(rows, columns), mask) for name in ("logprobs", "ref_logprobs", "values")}
    return {"scores": normal(rows), **inputs, "mask": mask, "last_values": normal(rows), "kl_coef": 0.1, "gamma": 0.99}


def exact(inputs: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return ops.shaped_gae(**wide, **options, backend="reference")


def compare(backend: Backend, inputs: dict[str, Any], tolerance: float = 1e-5, **options: Any) -> None:
    found = ops.shaped_gae(**inputs, **options, backend=backend)
    for actual, expected in zip(found, exact(inputs, **options), strict=True):
        close(actual.double(), expected, tolerance)
        assert_zero_outside(actual, inputs["mask"])


@backends
@settings(max_examples=30, deadline=None)
@given(
    mask=masks(max_rows=9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    clip=st.sampled_from([None, 0.5]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    step=st.integers(1, 2),
    offset=st.integers(0, 3),
    seed=seeds,
)
def test_any_mask_and_strides(
    backend: Backend, mask: Tensor, dtype: torch.dtype, estimator: str, clip: float | None, lam: float, step: int,
    offset: int, seed: int,
) -> None:  # fmt: skip
    rows, columns = mask.shape
    inputs = make(rows, offset + step * columns, dtype, seed)
    for name in ("logprobs", "ref_logprobs", "values"):
        inputs[name] = inputs[name][:, offset::step].nan_to_num(1.0) if step == 1 else inputs[name][:, offset::step]
        inputs[name] = torch.where(mask, inputs[name].nan_to_num(1.0), torch.nan) if offset else inputs[name]
    inputs["mask"] = mask if offset else inputs["mask"][:, offset::step]
    compare(backend, inputs, kl_estimator=estimator, clip_score=clip, lam=lam)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("columns", [1, 4, 127, 128, 129, 1000])
def test_cpp_blocks(estimator: str, columns: int) -> None:
    compare("cpp", make(19, columns), kl_estimator=estimator)
    compare("cpp", make(19, columns, torch.float64), 1e-12, kl_estimator=estimator)


def test_triton_blocks() -> None:
    compare("triton", make(1, 1030))


@backends
def test_options(backend: Backend) -> None:
    inputs = make(3, 8)
    compare(backend, inputs | {"ref_logprobs": None, "kl_coef": 0.0, "last_values": None})
    compare(backend, inputs | {"mask": torch.zeros(3, 8, dtype=torch.bool)})
    inputs["scores"][1] = torch.nan  # is not hidden, and stays in its row
    found = ops.shaped_gae(**inputs, clip_score=1.0, backend=backend)
    assert [bool(x.isnan().any()) for x in found[0]] == [False, True, False]


@backends
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing(backend: Backend, shape: tuple[int, int]) -> None:
    for output in ops.shaped_gae(**make(*shape), backend=backend):
        assert output.shape == shape


def test_one_float64_argument_is_enough() -> None:
    inputs = make(2, 5)
    found = ops.shaped_gae(**inputs | {"scores": inputs["scores"].double()}, backend="cpp")
    assert {x.dtype for x in found} == {torch.float64}
    with pytest.raises(TypeError, match="shaped_gae: Triton takes float32"):
        ops.shaped_gae(**make(2, 5, torch.float64), backend="triton")


def pick(inputs: dict[str, Any], rows: slice) -> dict[str, Any]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}


@backends
def test_a_row_has_the_same_bits_in_any_batch(backend: Backend) -> None:
    rows, columns = (37, 300) if backend == "cpp" else (3, 21)
    inputs = make(rows, columns)
    together = ops.shaped_gae(**inputs, backend=backend)
    threads = torch.get_num_threads()
    for start in range(0, rows, 5):
        torch.set_num_threads(1 + start % 2)
        alone = ops.shaped_gae(**pick(inputs, slice(start, start + 1)), backend=backend)
        again = ops.shaped_gae(**inputs, backend=backend)
        torch.set_num_threads(threads)
        for one, same, all_rows in zip(alone, again, together, strict=True):
            assert torch.equal(one[0], all_rows[start])
            assert torch.equal(same, all_rows)
    # The bits can tell: the same sums in another order have others.
    assert not torch.equal(together[0], exact(inputs)[0].float())


@backends
def test_gradients_are_the_references(backend: Backend) -> None:
    inputs = make(2, 4)
    inputs["values"] = inputs["values"].requires_grad_()
    with pytest.raises(ValueError, match=f"shaped_gae: backend '{backend}' has no gradient, and values requires one"):
        ops.shaped_gae(**inputs, backend=backend)
    assert ops.shaped_gae(**inputs)[0].requires_grad
    with torch.no_grad():
        ops.shaped_gae(**inputs, backend=backend)


@backends
def test_opcheck(backend: Backend) -> None:
    load_compiled_ops()
    from rlhf_fast.kernels import shaped_gae as kernel

    operator = torch.ops.rlhf_fast.shaped_gae.default if backend == "cpp" else kernel.shaped_gae
    i = make(3, 8)
    tensors = (i["scores"], i["logprobs"], i["ref_logprobs"], i["values"], i["mask"])
    torch.library.opcheck(operator, (*tensors, 0.1, 1, 0.9, 0.8, 0.5, i["last_values"]))
    torch.library.opcheck(operator, (*tensors[:2], None, *tensors[3:], 0.0, 3, 0.9, 0.8, None, None))


@backends
def test_compiled_graph(backend: Backend) -> None:
    def run(i: dict[str, Any]) -> Tensor:
        return torch.stack(ops.shaped_gae(**i, backend=backend)) * 2

    torch.compiler.reset()
    inputs = make(3, 8)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(inputs), run(inputs))
