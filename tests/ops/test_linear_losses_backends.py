"""linear_ppo_loss and linear_cross_entropy in C++ and in Triton against the reference in float64.

What fast code gets wrong: borders of chunks, rows left out, gradients that are made before they are asked for.
Triton runs on CPU tensors here, by its interpreter (tests/conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.memory import peak_bytes
from rlhf_fast.ops import Backend, _head_chunks
from rlhf_fast.ops.linear_cross_entropy import _rows as cross_entropy_operator
from rlhf_fast.ops.linear_ppo_loss import _rows as ppo_operator
from tests.ops.linear_loss_cases import H, cross_entropy, make, ppo, run
from tests.ops.op_cases import close, seeds

BACKENDS: list[Backend] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)
LOSSES = {"ppo": ppo, "cross-entropy": cross_entropy}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def chunks_of_four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 4)
    monkeypatch.setattr(_head_chunks, "CAST_ELEMENTS", 10 * H)


def compare(found: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float = 5e-6) -> None:
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        actual = found[name].double()
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(largest, 1.0), msg=name)


def doubles(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


@backends
@losses
@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 4, 5, 8, 13]),
    used=st.sampled_from(["some", "all", "none"]),
    without=st.sets(st.sampled_from(["bias", "weights"])),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.3]),
    factor=st.sampled_from([1.0, -2.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=seeds,
)
def test_against_float64(
    loss: Any,
    backend: Backend,
    rows: int,
    used: str,
    without: set[str],
    softcap: float | None,
    scale: float,
    factor: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Chunks of four rows, the last one of one to four; a weight in half precision is cast ten words at a time."""
    tensors = {name: x for name, x in make(rows, dtype, seed).items() if name not in without}
    if used != "some":
        tensors["mask"][:] = used == "all"
    options = {"softcap": softcap, "scale": scale}
    found = run(loss, backend, tensors, factor=factor, **options)
    exact = run(loss, "reference", doubles(tensors), factor=factor, **options)
    for name in exact:
        if name.startswith("grad_"):
            assert found[name].dtype == dtype
    rough = {name for name in exact if name.startswith("grad_") and dtype != torch.float32}
    compare({n: x for n, x in found.items() if n not in rough}, {n: x for n, x in exact.items() if n not in rough})
    compare({n: found[n] for n in rough}, {n: exact[n] for n in rough}, 2.0**-7)


@backends
@losses
@pytest.mark.parametrize("gathered", [True, False])
def test_rows_outside_the_mask(loss: Any, backend: Backend, gathered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may hold NaN, on a CPU, where they are left out, and as on a GPU, where they are zeros."""
    if not gathered:
        monkeypatch.setattr(_head_chunks, "used_rows", lambda used: None)
    clean = make(9)
    mask = clean["mask"]
    bad = {name: x.clone() for name, x in clean.items()}
    for name in ("hidden", "old_logprobs", "advantages", "ref_logprobs", "weights"):
        bad[name][~mask] = torch.nan
    bad["ids"][~mask] = -7
    found, exact = run(loss, backend, bad), run(loss, "reference", doubles(clean))
    compare(found, exact)
    assert bool((found["grad_hidden"][~mask] == 0).all())
    assert bool((found["logprobs"][~mask] == 0).all())


@backends
@losses
def test_only_the_gradients_that_are_needed(loss: Any, backend: Backend) -> None:
    """With each of hidden, weight and bias frozen in turn the others' gradients have the same bits."""
    tensors = make(6)
    everything = run(loss, backend, tensors)
    names = ("hidden", "weight", "bias")
    for frozen in names:
        leaves = {name: tensors[name].detach().requires_grad_(name != frozen) for name in names}
        loss(tensors | leaves, backend)[0].backward()
        for name, leaf in leaves.items():
            if name == frozen:
                assert leaf.grad is None
            else:
                assert leaf.grad is not None
                assert torch.equal(leaf.grad, everything[f"grad_{name}"])


@backends
@losses
def test_without_a_gradient(loss: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from one product."""
    tensors = make(9)
    expected = run(loss, backend, tensors)

    def fail(*_: Any) -> None:
        raise AssertionError("a gradient nobody asked for")

    monkeypatch.setattr(_head_chunks.HeadChunks, "_grad_x", fail)
    monkeypatch.setattr(_head_chunks.HeadChunks, "_add_grad_weight", fail)
    with torch.no_grad():
        value, stats = loss({n: x.clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}, backend)
    assert not value.requires_grad
    for name, stat in {"loss": value, **stats}.items():
        assert torch.equal(stat, expected[name])


@backends
@losses
def test_backward_twice(loss: Any, backend: Backend) -> None:
    """The gradients are handed on as they are; once they are scaled, in place, they cannot be handed on again."""
    tensors = make(6)
    weight = tensors["weight"].requires_grad_()
    value, _ = loss(tensors, backend)
    first, second = (torch.autograd.grad(value, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.autograd.grad(2 * value, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, weight)


@losses
def test_a_second_call_a_thread_more_and_other_rows(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits again; a row's own do not depend on the rows beside it, nor anything on threads over rows."""
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 64)
    tensors = make(150)
    first, again = run(loss, "cpp", tensors, num_tokens=99), run(loss, "cpp", tensors, num_tokens=99)
    for name in first:
        assert torch.equal(first[name], again[name])
    threads = torch.get_num_threads()
    head = {name: tensors[name] for name in ("weight", "bias")}
    for row in (0, 77, 149):
        torch.set_num_threads(2)
        alone = run(
            loss, "cpp", {n: x[row : row + 1] for n, x in tensors.items() if n not in head} | head, num_tokens=99
        )
        torch.set_num_threads(threads)
        for name in ("logprobs", "grad_hidden"):
            assert torch.equal(alone[name][0], first[name][row])


@losses
def test_logits_are_never_whole(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """2048 rows: what is allocated at once, beyond the gradients, is at most 5% of the logits."""
    monkeypatch.undo()
    monkeypatch.setattr(_head_chunks, "PRODUCT_ELEMENTS", 64 * 500)  # a part of the vocabulary, as where it is large
    tensors = make(2048)
    tensors["mask"][:] = True
    tensors["weight"] = torch.randn(5003, H, generator=torch.Generator().manual_seed(0))
    del tensors["bias"]
    gradients = 4 * (tensors["weight"].numel() + tensors["hidden"].numel())
    peak = peak_bytes(lambda: run(loss, "cpp", tensors))
    assert gradients < peak <= 0.05 * 4 * 2048 * 5003 + gradients


@backends
@pytest.mark.parametrize("gradients", [[True, True, True], [False, False, False]])
def test_opcheck(backend: Backend, gradients: list[bool]) -> None:
    """Schema, shapes without data, and tracing with unknown sizes."""
    t = make(3)
    count = torch.tensor(2.0, dtype=torch.float64 if backend == "cpp" else torch.float32)
    tail = (backend, gradients)
    head, tokens = (t["hidden"], t["weight"], t["ids"]), (t["old_logprobs"], t["advantages"], t["mask"])
    policy = (0.2, None, 2.0, 0.1, "k2", 0.01)
    torch.library.opcheck(
        ppo_operator, (*head, *tokens, t["bias"], None, t["ref_logprobs"], count, 0.8, 3.0, 0.5, *policy, *tail)
    )
    torch.library.opcheck(cross_entropy_operator, (*head, t["mask"], t["bias"], t["weights"], count, None, 0.5, *tail))


@backends
@losses
def test_compiled_graph(loss: Any, backend: Backend) -> None:
    def value(hidden: Tensor, weight: Tensor, bias: Tensor, rest: dict[str, Tensor]) -> Tensor:
        head = {"hidden": hidden.sin(), "weight": weight, "bias": bias}
        return 2 * loss(head | rest, backend, softcap=3.0)[0]

    torch.compiler.reset()
    compiled = torch.compile(value, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8):
        tensors = make(rows, seed=rows)
        leaves = [tensors.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
        eager, traced = (torch.autograd.grad(f(*leaves, tensors), leaves) for f in (value, compiled))
        for a, b in zip(traced, eager, strict=True):
            close(a, b, 1e-6)


def test_second_derivative_is_an_error() -> None:
    tensors = make(3)
    hidden = tensors["hidden"].requires_grad_()
    for loss in (ppo, cross_entropy):
        (gradient,) = torch.autograd.grad(loss(tensors, "cpp")[0], hidden, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.sum().backward()


def test_autocast_does_not_reach_the_head() -> None:
    tensors = make(6)
    for loss in (ppo, cross_entropy):
        outside = run(loss, "cpp", tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(loss, "cpp", tensors)
        for name in outside:
            assert torch.equal(inside[name], outside[name])
