"""KL estimators against the exact divergence, and the controllers against the paper's rule."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_fast.algorithms import AdaptiveKLController, FixedKLController, kl_estimate
from tests.ops.op_cases import Normals, close


def test_terms() -> None:
    logprobs, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -1.0])
    assert kl_estimate(logprobs, ref).tolist() == [0.5, -2.0]
    assert kl_estimate(logprobs, ref, "k2").tolist() == [0.125, 2.0]
    close(kl_estimate(logprobs, ref, "k3"), [math.exp(-0.5) - 1 + 0.5, math.exp(2) - 1 - 2], 1e-6)


def test_expectations() -> None:
    """Under the policy k1 and k3 have the KL as their mean; k2's gradient has the KL's gradient as its mean."""
    normal = Normals(0)
    logits, ref = normal(6).requires_grad_(), torch.log_softmax(normal(6), -1)
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    exact = (p * (logp - ref)).sum()
    for estimator in ("k1", "k3"):
        close((p * kl_estimate(logp, ref, estimator)).sum(), exact.detach())
    (gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    expected_k2, expected_k1 = (
        torch.autograd.grad((p.detach() * kl_estimate(logp, ref, e)).sum(), logits, retain_graph=True)[0]
        for e in ("k2", "k1")
    )
    close(expected_k2, gradient)
    close(expected_k1, torch.zeros(6))  # why k1 in a loss is refused


def test_k3_stays_finite() -> None:
    logprobs = torch.tensor([-1e4, 0.0], requires_grad=True)
    k3 = kl_estimate(logprobs, torch.tensor([0.0, -1e4]), "k3")
    assert k3.isfinite().all()
    assert bool((k3 >= 0).all())
    k3.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"kl_estimate: ref_logprobs must have shape \[2\], like logprobs; got \[3\]"):
        kl_estimate(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"kl_estimator must be one of k1, k2, k3; got 'abs'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "abs")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logprobs must hold floating-point numbers"):
        kl_estimate(torch.zeros(2, dtype=torch.int64), torch.zeros(2))


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 64)
    assert controller.value == 0.05
    controller.load_state_dict(FixedKLController(0.3).state_dict())
    assert controller.value == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.0064), (60.0, 1 + 0.2 * 0.0064), (3.0, 1 - 0.2 * 0.0064), (-1.0, 1 - 0.2 * 0.0064)],
)
def test_adaptive_controller_rule(kl: float, factor: float) -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=10000)
    controller.update(kl, completions=64)
    assert controller.value == pytest.approx(0.1 * factor, rel=1e-12)


def test_adaptive_controller_steers_to_its_target() -> None:
    """A policy whose KL falls as the coefficient rises: the controller finds the coefficient that gives the target."""
    controller = AdaptiveKLController(0.01, target=4.0, horizon=1000)
    for _ in range(2000):
        controller.update(kl=0.8 / controller.value, completions=64)
    assert controller.value == pytest.approx(0.2, rel=1e-3)


def test_adaptive_controller_resumes() -> None:
    first, second = (AdaptiveKLController(0.1, target=6.0, horizon=1000) for _ in range(2))
    first.update(20.0, 64)
    second.load_state_dict(first.state_dict())
    first.update(5.0, 64)
    second.update(5.0, 64)
    assert first.value == second.value != 0.1


@pytest.mark.parametrize("name", ["kl_coef", "target", "horizon"])
def test_adaptive_controller_wants_positive_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite; got 0"):
        AdaptiveKLController(**({"kl_coef": 0.1, "target": 6.0, "horizon": 1000} | {name: 0}))
