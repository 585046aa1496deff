"""ppo_loss in C++ and in Triton against the reference in float64: what fast code gets wrong."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
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
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_high_dual": {"cliprange": 0.1, "cliprange_high": 0.28, "dual_clip": 1.5},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3_entropy": {"kl_coef": 0.3, "kl_estimator": "k3", "entropy_coef": 0.01, "num_tokens": 77},
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter


def arguments(shape: tuple[int, ...], *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.3) -> Any:
    """All tensors that the op takes by name, a mask with holes, and NaN outside the mask."""
    normal = Normals(seed, dtype)
    mask = normal(*shape) > -0.7
    logprobs = normal(*shape) - 2
    tensors = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + spread * normal(*shape),
        "advantages": normal(*shape),
        "weights": normal(*shape),
        "ref_logprobs": logprobs + 0.5 * normal(*shape),
        "entropy": normal(*shape).abs(),
    }
    return {name: poison(x, mask) for name, x in tensors.items()} | {"mask": mask}


def run(given: Any, options: dict[str, Any], backend: Backend) -> dict[str, Tensor]:
    """The loss, its gradients and the statistics."""
    leaves = {name: given[name].detach().requires_grad_() for name in ("logprobs", "entropy")}
    found = ops.ppo_loss(**given | leaves, **options, backend=backend)
    found.policy_loss.backward()
    gradients = {f"grad_{name}": x.grad for name, x in leaves.items()}
    return {"loss": found.policy_loss.detach(), **gradients, **found.stats}


def compare(given: Any, options: dict[str, Any], backend: Backend, tolerance: float = 2e-6) -> None:
    found = run(given, options, backend)
    exact = run({k: x.double() if x.is_floating_point() else x for k, x in given.items()}, options, "reference")
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        # A loss is a sum of both signs, which may cancel: what rounding leaves is of its terms' size.
        least = 0.1 if expected.dim() == 0 else 1e-3
        largest = max(float(expected.abs().max()) if expected.numel() else 0.0, least)
        torch.testing.assert_close(
            found[name].double(), expected, rtol=tolerance, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name in ("grad_logprobs", "grad_entropy"):
        assert_zero_outside(found[name], given["mask"])


@backends
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4), (3, 2731)])
def test_against_float64(backend: Backend, name: str, shape: tuple[int, ...]) -> None:
    compare(arguments(shape, seed=len(name)), OPTIONS[name], backend)


@backends
def test_wide_ratios(backend: Backend) -> None:
    """Ratios from e^-20 to e^20 and beyond, where they are clamped."""
    compare(arguments((4, 300), spread=15.0), {**OPTIONS["k3_entropy"], "dual_clip": 3.0}, backend, 5e-6)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(0, 4), st.integers(0, 40)), seeds, st.sampled_from(list(OPTIONS)))
def test_any_shape_cpp(shape: tuple[int, ...], seed: int, name: str) -> None:
    compare(arguments(shape, seed=seed), OPTIONS[name], "cpp")


@backends
@pytest.mark.parametrize("cliprange", [0.0, 0.2])
def test_derivatives_at_ties_are_autograds(backend: Backend, cliprange: float) -> None:
    """Ratio 1 with a clip range of 0, advantages of 0, a ratio at the dual clip: each a kink of max, min or clamp."""
    x = torch.tensor([[-1.0, -2.0, -0.5, -0.25]])
    given = {
        "logprobs": x,
        "old_logprobs": x.clone(),
        "advantages": torch.tensor([[1.0, -1.0, 0.0, -2.0]]),
        "entropy": x.abs(),
        "mask": torch.ones(1, 4, dtype=torch.bool),
    }
    compare(given, {"cliprange": cliprange, "cliprange_high": 0.5}, backend)


def test_float64_cpp() -> None:
    given = arguments((3, 50), dtype=torch.float64)
    options = OPTIONS["k3_entropy"] | {"dual_clip": 1.5}
    found, expected = run(given, options, "cpp"), run(given, options, "reference")
    for name, value in expected.items():
        close(found[name], value, 1e-12)


@backends
def test_half_precision_and_strides(backend: Backend) -> None:
    given = arguments((6, 40), dtype=torch.bfloat16)
    strided = {name: x.t().contiguous().t()[:, ::2] for name, x in given.items()}
    strided["weights"] = given["weights"].nan_to_num()[:, :1]
    compare({n: x.contiguous() for n, x in strided.items()}, OPTIONS["k2"], backend, 2e-2)
    found, contiguous = (
        run(x, OPTIONS["k2"], backend) for x in (strided, {n: x.contiguous() for n, x in strided.items()})
    )
    for name, value in contiguous.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bits_do_not_depend_on_threads_cpp() -> None:
    given = arguments((8, 9000))
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        results.append(run(given, OPTIONS["k3_entropy"], "cpp"))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


@backends
def test_a_row_has_the_same_gradient_bits_in_any_batch(backend: Backend) -> None:
    given, options = arguments((5, 37)), {"num_tokens": 91, "dual_clip": 1.5}
    whole = run(given, options, backend)
    for row in range(5):
        alone = run({name: x[row : row + 1] for name, x in given.items()}, options, backend)
        assert torch.equal(alone["grad_logprobs"], whole["grad_logprobs"][row : row + 1])
    other = run({n: x[:1] for n, x in given.items()}, options | {"num_tokens": 90}, backend)  # so that it can fail
    assert not torch.equal(other["grad_logprobs"], whole["grad_logprobs"][:1])


def test_the_saved_gradient_is_handed_on_without_a_pass_cpp() -> None:
    given = arguments((2, 8))
    logprobs = given["logprobs"].requires_grad_()
    loss = ops.ppo_loss(logprobs, given["old_logprobs"], given["advantages"], given["mask"]).policy_loss
    (first,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    assert first.data_ptr() == again.data_ptr()
    (half,) = torch.autograd.grad(loss, logprobs, torch.tensor(0.5))
    assert torch.equal(half, first / 2)


def test_no_gradient_is_made_without_need_cpp() -> None:
    given = arguments((2, 8))
    with torch.no_grad():
        loss = ops.ppo_loss(**given | {"logprobs": given["logprobs"].requires_grad_()}).policy_loss
    assert loss.grad_fn is None


@backends
def test_opcheck(backend: Backend) -> None:
    load_compiled_ops()
    given = arguments((3, 7))
    given["logprobs"] = given["logprobs"].nan_to_num().requires_grad_()
    given = {name: x if name in ("logprobs", "mask") else x.nan_to_num() for name, x in given.items()}
    order = ("logprobs", "old_logprobs", "advantages", "mask", "weights", "ref_logprobs", "entropy")
    namespace = torch.ops.rlhf_fast
    numbers: tuple[Any, ...] = (None, 12.0, 0.8, 1.2, 0.0, 0.1, 3, 0.01)
    if backend == "triton":
        importlib.import_module("rlhf_fast.kernels.ppo_loss")
        numbers += (True, False)
    op = namespace.ppo_loss if backend == "cpp" else namespace.ppo_loss_triton
    torch.library.opcheck(op.default, (*(given[name] for name in order), *numbers))


@backends
def test_compiled_graph(backend: Backend) -> None:
    given = {name: torch.where(x == x, x, 0) if name != "mask" else x for name, x in arguments((3, 7)).items()}

    def loss(logprobs: Tensor, scale: Tensor) -> Tensor:
        found = ops.ppo_loss(**given | {"logprobs": logprobs * scale}, entropy_coef=0.1, backend=backend)
        return found.policy_loss + found.stats["approx_kl"]

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    scale = torch.ones(3, 7, requires_grad=True)
    eager, traced = (torch.autograd.grad(f(given["logprobs"], scale), scale)[0] for f in (loss, compiled))
    close(traced, eager, 1e-6)


@backends
def test_second_derivative_is_an_error(backend: Backend) -> None:
    given = arguments((2, 3))
    logprobs = given["logprobs"].requires_grad_()
    loss = ops.ppo_loss(**given | {"logprobs": logprobs}, backend=backend).policy_loss
    with pytest.raises(RuntimeError, match=r"second derivative|differentiable twice|once_differentiable"):
        torch.autograd.grad(loss, logprobs, create_graph=True)[0].sum().backward()
