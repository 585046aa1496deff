"""Arguments and runs that the tests of logits_ppo_loss share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast import ops
from rlhf_fast.ops import Backend
from rlhf_fast.ops._dispatch import Implementation
from tests.ops.op_cases import Normals

BACKENDS: list[Implementation] = ["cpp", "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)

ALL: dict[str, Any] = {
    "cliprange": 0.1,
    "cliprange_high": 0.3,
    "dual_clip": 1.5,
    "kl_coef": 0.2,
    "kl_estimator": "k3",
    "entropy_coef": 0.05,
    "num_tokens": 13,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip higher": {"cliprange": 0.1, "cliprange_high": 0.5},
    "dual clip": {"dual_clip": 1.2, "cliprange": 0.05},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "entropy": {"entropy_coef": 0.2},
    "negative entropy": {"entropy_coef": -0.2},
    "num_tokens": {"num_tokens": 5.5},
    "num_tokens as a tensor": {"num_tokens": torch.tensor([7])},
    "temperature": {"temperature": 0.7, "entropy_coef": 0.1},
    "all": ALL,
}


def tokens(logits: Tensor, ids: Tensor, *, seed: int = 0, temperature: float = 1.0) -> dict[str, Any]:
    """Per-token arguments: log-ratios of about 0.3, so that all branches of the clipping are taken; a masked token."""
    normals = Normals(seed)
    with torch.no_grad():
        logprobs = ops.reference.gather_logprobs(logits.double(), ids, temperature=temperature)
        mask = normals(*ids.shape) > -1
    return {
        "ids": ids,
        "old_logprobs": (logprobs + 0.3 * normals(*ids.shape)).float(),
        "advantages": normals(*ids.shape).float(),
        "mask": mask,
        "ref_logprobs": (logprobs + 0.3 * normals(*ids.shape)).float(),
        "weights": normals(*ids.shape).abs().float(),
    }


def doubles(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in arguments.items()}


def from_a_head(logits: Tensor) -> Tensor:
    """A copy that is nobody else's and no leaf."""
    return logits.detach().requires_grad_() * 1


def run(backend: Backend, logits: Tensor, **arguments: Any) -> tuple[ops.PPOLoss, Tensor]:
    """The result, and the gradient over logits, which are not a leaf."""
    result = ops.logits_ppo_loss(logits, backend=backend, **arguments)
    return result, torch.autograd.grad(result.policy_loss, logits)[0]
