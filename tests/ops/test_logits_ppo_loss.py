"""logits_ppo_loss against log_softmax, entropy and ppo_loss, each on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_fast import ops
from tests.ops.op_cases import Normals, assert_zero_outside, close, masks, poison, seeds

V = 7
POLICY: dict[str, Any] = {
    "cliprange": 0.1,
    "cliprange_high": 0.3,
    "dual_clip": 1.5,
    "kl_coef": 0.2,
    "kl_estimator": "k3",
    "entropy_coef": 0.05,
    "num_tokens": 13,
}


def by_parts(
    logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, temperature: float, **policy: Any
) -> ops.PPOLoss:
    p = torch.softmax(logits / temperature, dim=-1)
    logprobs = p.gather(-1, ids[..., None])[..., 0].log()
    entropy = torch.special.entr(p).sum(-1)
    result = ops.ppo_loss(logprobs, old, advantages, mask, entropy=entropy, **policy)
    return result._replace(stats=result.stats | {"logprobs": torch.where(mask, logprobs, 0)})


def constants(normal: Normals, mask: Tensor) -> dict[str, Tensor]:
    shape = mask.shape
    return {"old_logprobs": normal(*shape) - 2, "advantages": normal(*shape), "mask": mask}


@settings(max_examples=50, deadline=None)
@given(masks(), seeds, st.sampled_from([1.0, 0.6]))
def test_equals_its_parts(mask: Tensor, seed: int, temperature: float) -> None:
    normal = Normals(seed)
    logits, fixed = 2 * normal(*mask.shape, V), constants(normal, mask)
    policy = POLICY | {"ref_logprobs": normal(*mask.shape) - 2, "weights": normal(len(mask), 1)}
    ids = torch.randint(V, mask.shape, generator=normal.generator)

    expected_logits = logits.clone().requires_grad_()
    expected = by_parts(expected_logits, ids, fixed["old_logprobs"], fixed["advantages"], mask, temperature, **policy)
    (expected_gradient,) = torch.autograd.grad(expected.policy_loss, expected_logits)

    # Outside the mask: NaN everywhere, and ids that are none.
    leaf = torch.where(mask[..., None], logits, torch.nan).requires_grad_()
    poisoned = {name: x if name == "mask" else poison(x, mask) for name, x in fixed.items()}
    found = ops.logits_ppo_loss(leaf * 1, torch.where(mask, ids, 10**9), **poisoned, temperature=temperature, **policy)
    close(found.policy_loss, expected.policy_loss)
    assert found.value_loss is None
    assert set(found.stats) == set(expected.stats)
    for name, stat in expected.stats.items():
        close(found.stats[name], stat.detach())
        assert not found.stats[name].requires_grad
    assert_zero_outside(found.stats["logprobs"], mask)
    (gradient,) = torch.autograd.grad(found.policy_loss, leaf)
    close(gradient, expected_gradient)
    assert bool((gradient[~mask] == 0).all())


def test_gradcheck() -> None:
    normal, mask = Normals(0), torch.tensor([[True, False, True], [False, False, False]])
    fixed, ids = constants(normal, mask), torch.randint(V, (2, 3))
    policy = POLICY | {"ref_logprobs": normal(2, 3)}
    assert torch.autograd.gradcheck(
        lambda x: ops.logits_ppo_loss(x, ids, **fixed, **policy).policy_loss, [normal(2, 3, V).requires_grad_()]
    )


def test_barred_tokens() -> None:
    """Logits of -inf add nothing to loss, entropy or gradient."""
    normal, mask = Normals(1), torch.ones(1, 2, dtype=torch.bool)
    logits, fixed, ids = normal(1, 2, V), constants(normal, mask), torch.tensor([[0, 1]])
    barred = logits.clone()
    barred[..., 4:] = -torch.inf
    leaf, short = barred.requires_grad_(), logits[..., :4].clone().requires_grad_()
    found = ops.logits_ppo_loss(leaf, ids, **fixed, entropy_coef=0.5)
    expected = ops.logits_ppo_loss(short, ids, **fixed, entropy_coef=0.5)
    close(found.policy_loss, expected.policy_loss)
    (gradient,) = torch.autograd.grad(found.policy_loss, leaf)
    close(gradient[..., :4], torch.autograd.grad(expected.policy_loss, short)[0])
    assert bool((gradient[..., 4:] == 0).all())


def test_micro_batches_add_up_to_the_batch() -> None:
    normal, mask = Normals(2), torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    logits, fixed, ids = normal(6, 4, V).requires_grad_(), constants(normal, mask), torch.randint(V, (6, 4))
    whole = ops.logits_ppo_loss(logits, ids, **fixed, entropy_coef=0.1)
    parts = [
        ops.logits_ppo_loss(
            logits[s], ids[s], **{k: x[s] for k, x in fixed.items()}, entropy_coef=0.1, num_tokens=mask.sum()
        )
        for s in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    total = torch.stack([p.policy_loss for p in parts]).sum()
    close(total, whole.policy_loss)
    close(torch.autograd.grad(total, logits)[0], torch.autograd.grad(whole.policy_loss, logits)[0])
    close(torch.stack([p.stats["entropy"] for p in parts]).sum(), whole.stats["entropy"])


def test_half_precision_is_computed_in_fp32() -> None:
    normal, mask = Normals(3, torch.bfloat16), torch.ones(2, 3, dtype=torch.bool)
    logits, ids = normal(2, 3, V).requires_grad_(), torch.randint(V, (2, 3))
    fixed = {name: x.float() if x.is_floating_point() else x for name, x in constants(normal, mask).items()}
    loss = ops.logits_ppo_loss(logits, ids, **fixed).policy_loss
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.dtype == torch.bfloat16
    close(loss.double(), ops.logits_ppo_loss(logits.double(), ids, **fixed).policy_loss, 1e-5)


def test_ids_count_under_the_mask_only() -> None:
    normal, mask = Normals(4), torch.tensor([[True, False]])
    logits, fixed = normal(1, 2, V), constants(normal, mask)
    assert ops.logits_ppo_loss(logits, torch.tensor([[V - 1, V]]), **fixed).policy_loss.isfinite()
    for bad in (V, -1, -100):
        with pytest.raises(ValueError, match=rf"ids must be from 0 to 6, unless masked out; got {bad} at \[0, 0\]"):
            ops.logits_ppo_loss(logits, torch.tensor([[bad, 0]]), **fixed)
