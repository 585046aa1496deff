"""linear_ppo_loss: every backend against logits made whole and logits_ppo_loss of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend, _head_chunks
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

BACKENDS: list[Backend] = ["reference", "cpp"]
backends = pytest.mark.parametrize("backend", BACKENDS)
V, H = 7, 3
POLICY: dict[str, Any] = {
    "cliprange": 0.1,
    "cliprange_high": 0.3,
    "dual_clip": 1.5,
    "kl_coef": 0.2,
    "kl_estimator": "k2",
    "entropy_coef": 0.05,
    "num_tokens": 13,
}


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a chunk, so that small cases have several."""
    monkeypatch.setattr(sys.modules["rlhf_fast.ops.reference.linear_logprobs"], "CHUNK_ELEMENTS", 3 * V)
    monkeypatch.setitem(_head_chunks.CHUNK_ROWS, "cpu", 3)


@backends
@settings(max_examples=40, deadline=None)
@given(masks(), seeds, st.sampled_from([None, 2.0]), st.booleans())
def test_equals_logits_ppo_loss(
    backend: Backend, mask: Tensor, seed: int, softcap: float | None, with_bias: bool
) -> None:
    normal = Normals(seed)
    hidden, weight, bias = normal(*mask.shape, H), normal(V, H), normal(V) if with_bias else None
    old, advantages, ref = normal(*mask.shape) - 2, normal(*mask.shape), normal(*mask.shape) - 2
    policy = POLICY | {"ref_logprobs": ref, "weights": normal(len(mask), 1)}
    ids = torch.randint(V, mask.shape, generator=normal.generator)
    head = [x.requires_grad_() for x in (weight, bias) if x is not None]

    expected_hidden = hidden.clone().requires_grad_()
    logits = 0.5 * (expected_hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = ops.reference.logits_ppo_loss(logits, ids, old, advantages, mask, temperature=0.8, **policy)
    expected_gradients = torch.autograd.grad(expected.policy_loss, [expected_hidden, *head])

    leaf = torch.where(mask[..., None], hidden, torch.nan).requires_grad_()
    found = ops.linear_ppo_loss(
        leaf,
        weight,
        torch.where(mask, ids, -1),
        poison(old, mask),
        poison(advantages, mask),
        mask,
        bias=bias,
        temperature=0.8,
        softcap=softcap,
        scale=0.5,
        backend=backend,
        **policy,
    )
    close(found.policy_loss, expected.policy_loss)
    assert set(found.stats) == set(expected.stats)
    for name, stat in expected.stats.items():
        close(found.stats[name], stat)
    assert_zero_outside(found.stats["logprobs"], mask)
    gradients = torch.autograd.grad(found.policy_loss, [leaf, *head])
    for a, b in zip(gradients, expected_gradients, strict=True):
        close(a, b)
    assert bool((gradients[0][~mask] == 0).all())


@backends
def test_gradcheck(backend: Backend) -> None:
    normal, mask = Normals(0), torch.tensor([[True, False, True], [True, True, False]])
    old, advantages, ids = normal(2, 3) - 2, normal(2, 3), torch.randint(V, (2, 3))
    leaves = [normal(2, 3, H).requires_grad_(), normal(V, H).requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda hidden, weight: (
            ops.linear_ppo_loss(
                hidden, weight, ids, old, advantages, mask, entropy_coef=0.1, softcap=3.0, backend=backend
            ).policy_loss
        ),
        leaves,
    )


@backends
def test_micro_batches_add_up_to_the_batch(backend: Backend) -> None:
    normal, mask = Normals(2), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    hidden, weight, ids = normal(6, 4, H), normal(V, H).requires_grad_(), torch.randint(V, (6, 4))
    old, advantages = normal(6, 4) - 2, normal(6, 4)
    whole = ops.linear_ppo_loss(hidden, weight, ids, old, advantages, mask, backend=backend)
    parts = [
        ops.linear_ppo_loss(
            hidden[s], weight, ids[s], old[s], advantages[s], mask[s], num_tokens=mask.sum(), backend=backend
        )
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = torch.stack([p.policy_loss for p in parts]).sum()
    close(total, whole.policy_loss)
    close(torch.autograd.grad(total, weight)[0], torch.autograd.grad(whole.policy_loss, weight)[0])


@backends
def test_half_precision_has_an_fp32_head(backend: Backend) -> None:
    normal, mask = Normals(3, torch.bfloat16), torch.ones(2, 3, dtype=torch.bool)
    hidden, weight, ids = normal(2, 3, H).requires_grad_(), normal(V, H).requires_grad_(), torch.randint(V, (2, 3))
    old, advantages = normal(2, 3).float() - 2, normal(2, 3).float()
    loss = ops.linear_ppo_loss(hidden, weight, ids, old, advantages, mask, backend=backend).policy_loss
    assert loss.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(loss, [hidden, weight])] == [torch.bfloat16] * 2
    exact = ops.linear_ppo_loss(
        hidden.double(), weight.double(), ids, old, advantages, mask, backend=backend
    ).policy_loss
    close(loss.double(), exact, 1e-5)
