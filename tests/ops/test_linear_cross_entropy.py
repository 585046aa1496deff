"""linear_cross_entropy: every backend against torch's cross_entropy of logits made whole."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend, _head_chunks
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

BACKENDS: list[Backend] = ["reference", "cpp"]
backends = pytest.mark.parametrize("backend", BACKENDS)
V, H = 7, 3


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a chunk, so that small cases have several."""
    for module in ("linear_logprobs", "linear_cross_entropy"):
        monkeypatch.setattr(sys.modules[f"rlhf_fast.ops.reference.{module}"], "CHUNK_ELEMENTS", 3 * V)
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 3)


@backends
@settings(max_examples=40, deadline=None)
@given(masks(), seeds, st.sampled_from([None, 2.0]), st.booleans(), st.booleans(), st.sampled_from([None, 13]))
def test_definition_and_gradients(
    backend: Backend,
    mask: Tensor,
    seed: int,
    softcap: float | None,
    with_bias: bool,
    with_weights: bool,
    num_tokens: int | None,
) -> None:
    normal = Normals(seed)
    hidden, weight, bias = normal(*mask.shape, H), normal(V, H), normal(V) if with_bias else None
    weights = normal(*mask.shape) if with_weights else None
    ids = torch.randint(V, mask.shape, generator=normal.generator)
    head = [x.requires_grad_() for x in (weight, bias) if x is not None]
    count = num_tokens or max(1, int(mask.sum()))

    expected_hidden = hidden.clone().requires_grad_()
    logits = 0.5 * (expected_hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").reshape(mask.shape)
    expected = (losses * (1 if weights is None else weights))[mask].sum() / count

    leaf = torch.where(mask[..., None], hidden, torch.nan).requires_grad_()
    found = ops.linear_cross_entropy(
        leaf,
        weight,
        torch.where(mask, ids, -1),
        mask,
        bias=bias,
        softcap=softcap,
        scale=0.5,
        weights=None if weights is None else poison(weights, mask),
        num_tokens=num_tokens,
        backend=backend,
    )
    close(found.loss, expected)
    close(found.stats["logprobs"], torch.where(mask, -losses, 0))
    assert_zero_outside(found.stats["logprobs"], mask)
    close(found.stats["accuracy"], int((logits.argmax(-1) == ids)[mask].sum()) / count)
    assert not any(stat.requires_grad for stat in found.stats.values())

    gradients = [torch.autograd.grad(loss, [x, *head]) for loss, x in ((expected, expected_hidden), (found.loss, leaf))]
    for a, b in zip(*gradients, strict=True):
        close(b, a)
    assert bool((gradients[1][0][~mask] == 0).all())


@backends
def test_gradcheck(backend: Backend) -> None:
    normal, mask = Normals(0), torch.tensor([[True, False, True], [True, True, False]])
    ids, weights = torch.randint(V, (2, 3), generator=normal.generator), normal(2, 1)
    leaves = [normal(2, 3, H).requires_grad_(), normal(V, H).requires_grad_(), normal(V).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: (
            ops.linear_cross_entropy(
                hidden, weight, ids, mask, bias=bias, softcap=3.0, weights=weights, backend=backend
            ).loss
        ),
        leaves,
    )


@backends
def test_micro_batches_add_up_to_the_batch(backend: Backend) -> None:
    normal, mask = Normals(2), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    hidden, weight, ids = normal(6, 4, H), normal(V, H).requires_grad_(), torch.randint(V, (6, 4))
    whole = ops.linear_cross_entropy(hidden, weight, ids, mask, backend=backend)
    parts = [
        ops.linear_cross_entropy(hidden[s], weight, ids[s], mask[s], num_tokens=mask.sum(), backend=backend)
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = torch.stack([part.loss for part in parts]).sum()
    close(total, whole.loss)
    close(torch.autograd.grad(total, weight)[0], torch.autograd.grad(whole.loss, weight)[0])
    close(torch.stack([part.stats["accuracy"] for part in parts]).sum(), whole.stats["accuracy"])


@backends
def test_equal_logits_count_as_right(backend: Backend) -> None:
    found = ops.linear_cross_entropy(
        torch.zeros(3, H), torch.zeros(V, H), torch.tensor([0, 3, 6]), torch.ones(3, dtype=torch.bool), backend=backend
    )
    assert float(found.stats["accuracy"]) == 1.0


@backends
@pytest.mark.parametrize("shape", [(0,), (2, 0), ()])
def test_no_tokens_and_a_single_one(backend: Backend, shape: tuple[int, ...]) -> None:
    hidden, weight = torch.zeros(*shape, H, requires_grad=True), torch.zeros(V, H, requires_grad=True)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
    found = ops.linear_cross_entropy(hidden, weight, ids, mask, backend=backend)
    close(found.loss, 0.0 if 0 in shape else 1.9459101, 1e-6)
    found.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
