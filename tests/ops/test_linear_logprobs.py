"""linear_logprobs: every backend against the logits made whole and log_softmax of them, and its memory."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_fast import ops
from rlhf_fast.ops import Backend, _head_chunks
from tests.ops.op_cases import Normals, close, seeds

BACKENDS: list[Backend] = ["reference", "cpp"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def by_definition(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("nh,vh->nv", hidden, weight)
    if bias is not None:
        logits = logits + bias
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = torch.softmax(logits / temperature, dim=-1)
    return p[torch.arange(len(ids)), ids].log(), torch.special.entr(p).sum(-1)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of 11 logits a chunk, so that small cases have several, the last of them shorter."""
    # By way of sys.modules: the attribute of that name in the package is the function.
    monkeypatch.setattr(sys.modules["rlhf_fast.ops.reference.linear_logprobs"], "CHUNK_ELEMENTS", 22)
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 2)


@backends
@pytest.mark.usefixtures("tiny_chunks")
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 5),
    seed=seeds,
    with_bias=st.booleans(),
    temperature=st.sampled_from([1.0, 0.7]),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.25]),
)
def test_definition_and_gradients(
    backend: Backend, rows: int, seed: int, with_bias: bool, temperature: float, softcap: float | None, scale: float
) -> None:
    normal = Normals(seed)
    hidden, weight, bias = normal(rows, 3), normal(11, 3), normal(11) if with_bias else None
    ids = torch.randint(11, (rows,), generator=normal.generator)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    options: dict[str, Any] = {"bias": bias, "temperature": temperature, "softcap": softcap, "scale": scale}

    found = ops.linear_logprobs(hidden, weight, ids, return_entropy=True, backend=backend, **options)
    expected = by_definition(hidden, weight, ids, **options)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert torch.equal(ops.linear_logprobs(hidden, weight, ids, backend=backend, **options), found[0])

    upstream = normal(rows), normal(rows)
    gradients = [torch.autograd.grad(pair, leaves, upstream) for pair in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        close(a, b)


@backends
@pytest.mark.usefixtures("tiny_chunks")
def test_gradcheck(backend: Backend) -> None:
    normal = Normals(0)
    ids = torch.tensor([[0, 10, -100], [3, 3, 7]])
    leaves = [normal(2, 3, 4).requires_grad_(), normal(11, 4).requires_grad_(), normal(11).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: ops.linear_logprobs(
            hidden,
            weight,
            ids,
            bias=bias,
            softcap=2.0,
            scale=0.5,
            temperature=0.8,
            return_entropy=True,
            backend=backend,
        ),
        leaves,
    )


@backends
@pytest.mark.usefixtures("tiny_chunks")
def test_nan_in_an_ignored_row_stays_there(backend: Backend) -> None:
    normal = Normals(1)
    hidden, weight = normal(5, 4), normal(11, 4).requires_grad_()
    hidden[1] = torch.nan
    hidden.requires_grad_()
    logprobs, entropy = ops.linear_logprobs(
        hidden, weight, torch.tensor([0, -100, 2, 3, 4]), return_entropy=True, backend=backend
    )
    assert logprobs[1].item() == entropy[1].item() == 0.0
    (logprobs + entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bool((hidden.grad[1] == 0).all())
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@backends
def test_half_precision_weights_have_an_fp32_head(backend: Backend) -> None:
    normal = Normals(2, torch.bfloat16)
    hidden, weight = normal(6, 16).requires_grad_(), normal(50, 16).requires_grad_()
    ids = torch.arange(6)
    logprobs = ops.linear_logprobs(hidden, weight, ids, backend=backend)
    exact = ops.linear_logprobs(hidden.double(), weight.double(), ids)
    assert logprobs.dtype == torch.float32
    close(logprobs.double(), exact, 1e-5)
    gradients = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    assert all(g.dtype == torch.bfloat16 for g in gradients)


@backends
def test_a_barred_token_has_no_part(backend: Backend) -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0])
    logprobs, entropy = ops.linear_logprobs(
        torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([2]), bias=bias, return_entropy=True, backend=backend
    )
    assert float(logprobs) == pytest.approx(-0.6931472)
    assert float(entropy) == pytest.approx(0.6931472)


@backends
def test_no_rows(backend: Backend) -> None:
    hidden, weight = torch.zeros(0, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    logprobs, entropy = ops.linear_logprobs(
        hidden, weight, torch.zeros(0, dtype=torch.int64), return_entropy=True, backend=backend
    )
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.usefixtures("tiny_chunks")
def test_the_references_logits_are_never_whole() -> None:
    normal = Normals(3)
    hidden, weight = normal(64, 2).requires_grad_(), normal(11, 2).requires_grad_()
    with LargestTensor() as largest:
        logprobs, entropy = ops.reference.linear_logprobs(hidden, weight, torch.arange(64) % 11, return_entropy=True)
        (logprobs + entropy).sum().backward()
    assert largest.elements == 64 * 2  # hidden itself; the logits would be 64 * 11
