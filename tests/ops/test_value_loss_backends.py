"""value_loss in C++ and in Triton against the reference in float64: what fast code gets wrong."""

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
from tests.ops.op_cases import Normals, assert_zero_outside, close, poison, seeds

BACKENDS: list[Backend] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


def arguments(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A mask with holes, and NaN outside it."""
    normal = Normals(seed, dtype)
    mask = normal(*shape) > -0.7
    values = normal(*shape)
    given = {"values": values, "old_values": values + 0.3 * normal(*shape), "returns": normal(*shape)}
    return {name: poison(x, mask) for name, x in given.items()} | {"mask": mask}


def run(given: Any, backend: Backend, **options: Any) -> dict[str, Tensor]:
    values = given["values"].detach().requires_grad_()
    loss, stats = ops.value_loss(**given | {"values": values}, **options, backend=backend)
    loss.backward()
    return {"loss": loss.detach(), "gradient": values.grad, **stats}


def compare(given: Any, backend: Backend, tolerance: float = 2e-6, **options: Any) -> None:
    found = run(given, backend, **options)
    exact = run({k: x.double() if x.is_floating_point() else x for k, x in given.items()}, "reference", **options)
    for name, expected in exact.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=tolerance, atol=tolerance)
    assert_zero_outside(found["gradient"], given["mask"])


@backends
@pytest.mark.parametrize("options", [{}, {"cliprange_value": None}, {"cliprange_value": 0.0, "num_tokens": 50}])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (3, 2731), (7,)])
def test_against_float64(backend: Backend, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    compare(arguments(shape), backend, **options)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(0, 4), st.integers(0, 40)), seeds, st.sampled_from([None, 0.0, 0.2]))
def test_any_shape_cpp(shape: tuple[int, ...], seed: int, cliprange_value: float | None) -> None:
    compare(arguments(shape, seed), "cpp", cliprange_value=cliprange_value)


@backends
def test_derivatives_at_ties_are_autograds(backend: Backend) -> None:
    """Value at the end of the clip range, at the old value, and at the return."""
    given = {
        "values": torch.tensor([[0.25, 0.0, 1.0, -0.25]]),
        "old_values": torch.tensor([[0.0, 0.0, 1.0, 0.0]]),
        "returns": torch.tensor([[1.0, 1.0, 1.0, 1.0]]),
        "mask": torch.ones(1, 4, dtype=torch.bool),
    }
    compare(given, backend, cliprange_value=0.25)
    compare(given, backend, cliprange_value=0.0)


def test_float64_cpp() -> None:
    given = arguments((3, 50), dtype=torch.float64)
    for name, expected in run(given, "reference").items():
        close(run(given, "cpp")[name], expected, 1e-12)


def test_bits_do_not_depend_on_threads_cpp() -> None:
    given, before = arguments((8, 9000)), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(given, "cpp"))
    torch.set_num_threads(before)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@backends
def test_nan_inside_the_mask_shows(backend: Backend) -> None:
    given = arguments((2, 3)) | {"mask": torch.ones(2, 3, dtype=torch.bool)}
    found = run({**given, "returns": torch.full((2, 3), torch.nan)}, backend)
    assert found["loss"].isnan()
    assert found["gradient"].isnan().all()


@backends
def test_opcheck_and_compiled_graph(backend: Backend) -> None:
    load_compiled_ops()
    given = {name: x if name == "mask" else x.nan_to_num() for name, x in arguments((3, 7)).items()}
    scale = torch.ones(3, 7, requires_grad=True)

    def loss(scale: Tensor) -> Tensor:
        return ops.value_loss(**given | {"values": given["values"] * scale}, backend=backend).loss  # type: ignore[arg-type]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    close(torch.autograd.grad(compiled(scale), scale)[0], torch.autograd.grad(loss(scale), scale)[0], 1e-6)
    namespace = torch.ops.rlhf_fast
    op, rest = (namespace.value_loss, ()) if backend == "cpp" else (namespace.value_loss_triton, (True,))
    inputs = [x.requires_grad_() if name == "values" else x for name, x in given.items()]
    torch.library.opcheck(op.default, (*inputs, None, 12.0, 0.2, *rest))


@backends
def test_second_derivative_is_an_error(backend: Backend) -> None:
    given = arguments((2, 3))
    values = given["values"].requires_grad_()
    loss = ops.value_loss(**given, backend=backend).loss  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, values, create_graph=True)
