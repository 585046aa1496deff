"""logits_ppo_loss writes the gradient over the logits: whose they may be, who is told, and what stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.kernels._rows import rows_are_disjoint
from rlhf_fast.ops import Backend
from tests.ops.logits_loss_cases import ALL, backends, from_a_head, run, tokens
from tests.ops.op_cases import close
from tests.ops.test_gather_logprobs_backends import VIEWS, likely_ids, make

# numpy's remarks on inf - inf in the interpreter
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@backends
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    """A view gives the same as its copy, back to the whole; what is around it stays; shared rows are not written."""
    whole = make((2, 4, 21), torch.float32)
    arguments = tokens(view(whole), likely_ids(view(whole).contiguous())) | ALL
    plain, leaf = whole.clone().requires_grad_(), whole.clone().requires_grad_()
    inside = leaf * 1
    expected = ops.logits_ppo_loss(view(plain).contiguous(), backend=backend, **arguments)
    found = ops.logits_ppo_loss(view(inside), backend=backend, **arguments)
    assert torch.equal(found.policy_loss, expected.policy_loss)
    gradient = torch.autograd.grad(found.policy_loss, leaf)[0]
    assert torch.equal(gradient, torch.autograd.grad(expected.policy_loss, plain)[0])
    touched = (inside != whole).any(dim=-1)
    around = torch.ones_like(whole, dtype=torch.bool)
    if view(whole).stride(0) != 0:
        view(around).fill_(False)
    assert torch.equal(inside.detach()[around], whole[around])
    assert bool(touched.any()) == rows_are_disjoint(view(whole))


@backends
def test_saved_logits_are_an_error(backend: Backend) -> None:
    """Whoever saved the logits gets an error instead of the gradient in their place, and so does a second backward."""
    logits = from_a_head(make((2, 9), torch.float32))
    squares = logits.square().sum()
    arguments = tokens(logits, torch.tensor([1, 2])) | {"mask": torch.ones(2, dtype=torch.bool)}
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_a_later_write_is_an_error(backend: Backend) -> None:
    logits = from_a_head(make((2, 9), torch.float32))
    loss = ops.logits_ppo_loss(logits, backend=backend, **tokens(logits, torch.tensor([1, 2]))).policy_loss
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
def test_others_who_use_the_logits(backend: Backend) -> None:
    """Gradients from elsewhere are added, and those who only needed the logits' shape go on."""
    leaf = make((2, 9), torch.float32).requires_grad_()
    arguments = tokens(leaf, torch.tensor([1, 2])) | ALL
    logits = leaf * 1
    elsewhere = 2 * logits.sum()
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    (gradient,) = torch.autograd.grad(loss + elsewhere, leaf)
    (expected,) = torch.autograd.grad(ops.reference.logits_ppo_loss(leaf, **arguments).policy_loss, leaf)
    close(gradient, expected + 2, 1e-5)


LEAVES: dict[str, Callable[[Tensor], Tensor]] = {
    "leaf": lambda x: x,
    "view": lambda x: x[:, :-1],
    "view of a view": lambda x: x[:1].view(-1, 9),
}


@backends
@pytest.mark.parametrize("view", LEAVES.values(), ids=LEAVES)
def test_leaves_are_not_overwritten(backend: Backend, view: Callable[[Tensor], Tensor]) -> None:
    """They are the caller's. Their gradient can be asked for any number of times, scaled or not."""
    whole = make((2, 9), torch.float32)
    leaf = whole.clone().requires_grad_()
    logits = view(leaf)
    arguments = tokens(logits, torch.tensor([1, 2])[: len(logits)]) | ALL
    loss = ops.logits_ppo_loss(logits, backend=backend, **arguments).policy_loss
    first, scaled, again = (torch.autograd.grad(f * loss, leaf, retain_graph=True)[0] for f in (1, -3, 1))
    (expected,) = torch.autograd.grad(ops.reference.logits_ppo_loss(view(leaf), **arguments).policy_loss, leaf)
    close(first, expected, 1e-5)
    close(scaled, -3 * first, 1e-6)
    assert torch.equal(first, again)
    assert torch.equal(leaf.detach(), whole)


@backends
def test_without_a_gradient_the_logits_stay(backend: Backend) -> None:
    whole = make((2, 3, 50), torch.float32)
    arguments = tokens(whole, likely_ids(whole)) | ALL
    expected = ops.logits_ppo_loss(from_a_head(whole), backend=backend, **arguments)
    with torch.no_grad():
        logits = whole.clone().requires_grad_()
        under_no_grad = ops.logits_ppo_loss(logits, backend=backend, **arguments)
    constant = whole.clone()
    without = ops.logits_ppo_loss(constant, backend=backend, **arguments)
    for found in (under_no_grad, without):
        assert not found.policy_loss.requires_grad
        close(found.policy_loss, expected.policy_loss.detach(), 1e-6)
        assert torch.equal(found.stats["logprobs"], expected.stats["logprobs"])
    assert torch.equal(logits, whole)
    assert torch.equal(constant, whole)
    assert logits._version == constant._version == 0


@backends
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
def test_scaled_loss(backend: Backend, factor: float) -> None:
    whole = make((2, 3, 50), torch.float32)
    arguments = tokens(whole, likely_ids(whole)) | ALL
    leaf = whole.clone().requires_grad_()
    _, expected = run(backend, from_a_head(whole), **arguments)
    loss = factor * ops.logits_ppo_loss(leaf * 1, backend=backend, **arguments).policy_loss
    close(torch.autograd.grad(loss, leaf)[0], factor * expected, 1e-7)
