"""Whitening over masked tokens of one process or of many."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, Implementation, choose_backend_without_gradient, load_compiled_ops
from rlhf_fast.ops.reference.masked_whiten import merge_moments


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the masked tokens, the variance being the biased one.

    With a group the mean and variance are those of all its ranks' tokens together: every rank must call, also one
    with an empty mask. Counts, means and squared deviations are merged (Chan, Golub and LeVeque 1983), on the device.

    Args:
        x: any shape, e.g. advantages [B, T].
        mask: x's shape, bool, True for tokens that count.
        group: ranks to whiten over, e.g. torch.distributed.group.WORLD; None: this process alone.
        shift_mean: False keeps the mean (added back), as is usual for rewards.
        eps: added to the variance.
        backend: see rlhf_fast.ops.

    Returns:
        x's shape: float64 if x is, else float32; exactly 0 outside the mask.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, a backend that there is not, or an x that wants a
        gradient together with a group (gradients do not cross ranks).
    """
    _checks.mask("masked_whiten", mask)
    _checks.per_token("masked_whiten", mask, x=x)
    _checks.number("masked_whiten", "eps", eps, minimum=0.0)
    if group is not None and x.requires_grad:
        raise ValueError("masked_whiten: x must not require a gradient when a group is given; use x.detach()")
    implementation = choose_backend_without_gradient("masked_whiten", backend, mask.device, x=x)
    if implementation != "reference":
        local_moments, normalise = _compiled(implementation)
        moments = local_moments(x, mask)
        if group is not None:
            count, mean, squares = moments.unbind()
            moments = torch.stack(merge_moments(count, mean, squares, group))
        return normalise(x, mask, moments, shift_mean, eps)
    return reference.masked_whiten(x, mask, group=group, shift_mean=shift_mean, eps=eps)


def _compiled(implementation: Implementation) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast._masked_moments, torch.ops.rlhf_fast._masked_normalise
    from rlhf_fast.kernels import masked_whiten as kernel  # not at the top: a machine may have no Triton

    return kernel.masked_moments, kernel.masked_normalise
