"""Log-probs of given ids and the entropy, from hidden states and the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlhf_fast.ops import _checks, reference
from rlhf_fast.ops._dispatch import Backend, choose_backend, load_compiled_ops
from rlhf_fast.ops._head_chunks import HeadChunks, Rows, fake_gradients
from rlhf_fast.ops.reference._common import compute_dtype


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`gather_logprobs` of the logits of a linear head, which are never in memory as a whole, [N, V].

        logits = (hidden @ weight.T + bias) * scale;  softcap * tanh(logits / softcap) if softcap;  then / temperature

    The product and the softmax are in fp32 (float64 for float64 inputs), whatever the weights' dtype. `scale` and
    `softcap` are what Cohere, Granite and Gemma 2 do to their logits. Under ZeRO-3 call it inside the nn.Module that
    owns `weight`, so that the weight is there.

    Args:
        hidden: [..., H], the state that predicts each id.
        weight: [V, H]; hidden, weight and bias get gradients, the weight's summed in fp32.
        ids: [...] int64 or int32.
        bias: [V] or None.
        temperature: above 0.
        softcap: above 0, or None.
        scale: factor of the logits, above 0.
        return_entropy: also the entropy of the distribution, in nats.
        ignore_index: ids equal to it give exactly 0 and no gradient, whatever hidden holds there.
        backend: see rlhf_fast.ops.

    Returns:
        logprobs [...], or (logprobs, entropy): float64 if an input is, else float32; both differentiable.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, ids out of range on the CPU (on a GPU their
        log-probs are NaN), a backend that there is not.
    """
    _checks.head("linear_logprobs", hidden, weight, bias, softcap, scale)
    _checks.ids("linear_logprobs", ids, hidden.shape[:-1], "hidden's without H", hidden.device)
    _checks.temperature("linear_logprobs", temperature)
    unless = f"equal to ignore_index ({ignore_index})"
    _checks.ids_in_range("linear_logprobs", ids, weight.shape[0], ids != ignore_index, unless)
    implementation = choose_backend("linear_logprobs", backend, hidden.device, compute_dtype(hidden, weight, bias))
    if implementation != "reference":
        if implementation == "cpp":
            load_compiled_ops()
        logprobs, entropy, _ = _forward(
            hidden, weight, ids, bias, temperature, softcap, scale, return_entropy, ignore_index, implementation
        )
        return (logprobs, entropy) if return_entropy else logprobs
    return reference.linear_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        return_entropy=return_entropy,
        ignore_index=ignore_index,
    )


@torch.library.custom_op("rlhf_fast::_linear_logprobs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
    return_entropy: bool,
    ignore_index: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy (empty unless asked for), what the row kernel's backward pass needs: [rows, 2])"""
    head = HeadChunks(hidden, weight, bias, ids != ignore_index, temperature=temperature, softcap=softcap, scale=scale)
    forward, _ = _row_kernels(implementation)
    logprobs, entropy = (torch.zeros(ids.numel(), dtype=head.dtype, device=ids.device) for _ in range(2))
    stats = logprobs.new_zeros(ids.numel(), 2)

    def kernel(rows: Rows, logits: Tensor) -> None:
        logprobs[rows], found, stats[rows] = forward(
            logits, ids.reshape(-1)[rows], head.temperature, return_entropy, ignore_index
        )
        if return_entropy:
            entropy[rows] = found

    head.run(kernel)
    entropy = entropy.reshape(ids.shape) if return_entropy else entropy.new_empty(0)
    return logprobs.reshape(ids.shape), entropy, stats


@_forward.register_fake
def _forward_fake(
    hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *_, return_entropy, _, _ = options
    logprobs = hidden.new_empty(ids.shape, dtype=compute_dtype(hidden, weight, bias))
    entropy = logprobs.new_empty(ids.shape if return_entropy else (0,))
    return logprobs, entropy, logprobs.new_empty((ids.numel(), 2))


@torch.library.custom_op("rlhf_fast::_linear_logprobs_backward", mutates_args=())
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    stats: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    implementation: str,
    gradients: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias, in fp32 (float64). The logits are made once more."""
    used = torch.zeros_like(ids, dtype=torch.bool)  # a row without a gradient is not looked at
    for g in (grad_logprobs, grad_entropy):
        if g is not None:
            used |= (ids != ignore_index) & (g != 0)
    head = HeadChunks(
        hidden,
        weight,
        bias,
        used,
        temperature=temperature,
        softcap=softcap,
        scale=scale,
        gradients=gradients,
    )
    _, backward = _row_kernels(implementation)
    g, h = (None if x is None else x.reshape(-1) for x in (grad_logprobs, grad_entropy))

    def kernel(rows: Rows, logits: Tensor) -> None:
        backward(
            None if g is None else g[rows],
            None if h is None else h[rows],
            logits,
            ids.reshape(-1)[rows],
            stats[rows],
            entropy if h is None else entropy.reshape(-1)[rows],
            head.temperature,
            ignore_index,
        )

    head.run(kernel)
    return head.gradients()


@_backward.register_fake
def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, hidden, weight, _, bias, *_, gradients = arguments
    return fake_gradients(hidden, weight, bias, gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, ids, bias, ctx.temperature, ctx.softcap, ctx.scale, return_entropy, ctx.ignore_index, _ = inputs
    ctx.implementation = inputs[-1]
    _, entropy, stats = output
    ctx.save_for_backward(hidden, weight, ids, bias, entropy, stats)
    ctx.mark_non_differentiable(*([stats] if return_entropy else [entropy, stats]))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    options = (ctx.temperature, ctx.softcap, ctx.scale, ctx.ignore_index, ctx.implementation)
    found = _backward(grad_logprobs, grad_entropy, *ctx.saved_tensors, *options, needed)
    hidden, weight, _, bias, *_ = ctx.saved_tensors
    grads = [g.to(x.dtype) if need else None for g, x, need in zip(found, (hidden, weight, bias), needed, strict=True)]
    return grads[0], grads[1], None, grads[2], None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _row_kernels(implementation: str) -> tuple[Callable[..., Any], Callable[..., None]]:
    """gather_logprobs' passes over rows of logits.

    (logits, ids, temperature, return_entropy, ignore_index) -> logprobs, entropy, stats
    (grad_logprobs, grad_entropy, logits, ids, stats, entropy, temperature, ignore_index) -> None: over the logits
    """
    if implementation == "cpp":
        load_compiled_ops()
        return torch.ops.rlhf_fast._gather_logprobs_forward, torch.ops.rlhf_fast._gather_logprobs_backward_
    from rlhf_fast.kernels import gather_logprobs as kernel  # not at the top: a machine may have no Triton

    return kernel.forward, kernel.backward_
