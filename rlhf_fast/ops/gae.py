"""Generalised advantage estimation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend_without_gradient, load_compiled_ops


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438).

        delta_t = r_t + gamma * V_next - V_t
        A_t     = delta_t + gamma * lam * A_next
        returns = A + V

    "next" is the next masked token of the row: holes in the mask are stepped over, and what rewards and values hold
    there is not looked at. Beyond the last masked token A is 0 and V is last_values.

    Args:
        rewards: [B, T], reward for token t.
        values: [B, T], value of the state before token t.
        mask: [B, T] bool, True for trained tokens; may have holes and empty rows.
        gamma: discount a token, 0 to 1.
        lam: GAE's lambda, 0 to 1.
        last_values: [B], value of the state after the last masked token; None: 0, the episode ended there.
        backend: see rlhf_fast.ops.

    Returns:
        (advantages, returns), both [B, T]: float64 if an input is, else float32; exactly 0 outside the mask.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, a backend that there is not.
    """
    _checks.mask("gae", mask, dims=2)
    _checks.per_token("gae", mask, rewards=rewards, values=values)
    _checks.per_row("gae", mask, last_values=last_values)
    _checks.number("gae", "gamma", gamma, minimum=0.0, maximum=1.0)
    _checks.number("gae", "lam", lam, minimum=0.0, maximum=1.0)
    implementation = choose_backend_without_gradient(
        "gae", backend, mask.device, rewards=rewards, values=values, last_values=last_values
    )
    if implementation != "reference":
        return _compiled(implementation)(rewards, values, mask, gamma, lam, last_values)
    return reference.gae(rewards, values, mask, gamma=gamma, lam=lam, last_values=last_values)


def _compiled(implementation: Implementation) -> Callable[..., tuple[Tensor, Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast.gae
    from rlhf_fast.kernels import gae as kernel  # not at the top: a machine may have no Triton

    return kernel.gae
