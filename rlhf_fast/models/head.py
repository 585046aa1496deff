"""How a causal language model turns hidden states into logits, and that product on the wanted tokens only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_fast import ops
from rlhf_fast.errors import ModelError

# Up to this size the logits of a call are made whole, and where there is a gradient it is written over them. Beyond it
# the linear ops never hold them, which saves memory and costs time: their products are of a few rows each, and take
# half as long again or more.
LOGITS_BYTES = 256 << 20


class LMHead(nn.Module):
    """The output layer of a causal language model: logits = softcap(scale * (hidden @ weight^T + bias)).

    It holds the model's own parameters under a second name, so that they are used inside a module that owns them:
    ZeRO-3 gathers partitioned weights when such a module is called.

    The product and the softmax are in fp32 also for half-precision models (fp64 for fp64): a log-prob is a difference
    of large logits, and rounding those to 8 bits moves the importance ratio of single tokens out of the clip range.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, model: Any):
        super().__init__()
        output = model.get_output_embeddings()
        if output is None or getattr(output, "weight", None) is None:
            raise ModelError(
                f"{name_of(model)}: {type(model).__name__} has no output embeddings; not a language model?"
            )
        config = model.config.get_text_config()
        self.weight = output.weight
        self.register_parameter("bias", getattr(output, "bias", None))
        self.softcap: float | None = None
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma, RecurrentGemma
            self.softcap = self.softcap or getattr(config, name, None)
        self.scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
            if isinstance(getattr(config, name, None), int | float):
                self.scale *= getattr(config, name)
        if isinstance(getattr(config, "logits_scaling", None), int | float):  # Granite
            self.scale /= config.logits_scaling

    def forward(
        self,
        hidden: Tensor,
        ids: Tensor,
        *,
        temperature: float = 1.0,
        ops_backend: ops.Backend = "auto",
        **loss: Any,
    ) -> tuple[Tensor, Tensor] | ops.PPOLoss | ops.CrossEntropyLoss:
        """hidden [N, H], ids [N] int64 -> log-probs [N] and entropies [N] of softmax(logits / temperature).

        With ppo_loss's arguments (old_logprobs [N], advantages [N], mask [N], cliprange, ...): PPOLoss. With mask [N]
        and num_tokens alone: CrossEntropyLoss, at temperature 1.
        """
        ppo = "advantages" in loss
        if hidden.shape[0] * self.weight.shape[0] * compute_dtype(hidden).itemsize > LOGITS_BYTES:
            head: dict[str, Any] = {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}
            head["backend"] = ops_backend
            if ppo:
                return ops.linear_ppo_loss(hidden, self.weight, ids, temperature=temperature, **head, **loss)
            if loss:
                return ops.linear_cross_entropy(hidden, self.weight, ids, **head, **loss)
            return ops.linear_logprobs(hidden, self.weight, ids, temperature=temperature, return_entropy=True, **head)
        logits = F.linear(*self._cast(hidden))
        if self.softcap is None:
            temperature = temperature / self.scale  # no pass over the logits for the scale
        else:
            logits = _softcap(logits * self.scale, self.softcap)
        if ppo:
            return ops.logits_ppo_loss(logits, ids, temperature=temperature, backend=ops_backend, **loss)
        if loss:
            return _cross_entropy(logits, ids, temperature=temperature, ops_backend=ops_backend, **loss)
        return ops.gather_logprobs(
            logits, ids, temperature=temperature, return_entropy=True, inplace_backward=True, backend=ops_backend
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> logits [..., V], fp32 (fp64 for fp64)."""
        logits = F.linear(*self._cast(hidden))
        return logits * self.scale if self.softcap is None else _softcap(logits * self.scale, self.softcap)

    def _cast(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dtype = compute_dtype(hidden)
        bias = None if self.bias is None else self.bias.to(dtype)
        return hidden.to(dtype), self.weight.to(dtype), bias


class ScalarHead(nn.Module):
    """A model's `score` layer, one number a token, in fp32 (fp64 for fp64). Shares its parameters, as LMHead does."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, score: Any):
        super().__init__()
        self.weight = score.weight
        self.register_parameter("bias", getattr(score, "bias", None))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N]."""
        return scalar_product(hidden, self.weight, self.bias)


class ValueHead(nn.Linear):
    """A linear layer H -> 1 of its own, zero at the start: the first advantages are the rewards themselves."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, device: torch.device):
        super().__init__(hidden_size, 1, dtype=dtype, device=device)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> [N]."""
        return scalar_product(hidden, self.weight, self.bias)


def scalar_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(hidden)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).squeeze(-1)


def _cross_entropy(
    logits: Tensor, ids: Tensor, *, mask: Tensor, num_tokens: int, temperature: float, ops_backend: ops.Backend
) -> ops.CrossEntropyLoss:
    """What ops.linear_cross_entropy gives, from logits, which the backward writes over."""
    logprobs = ops.gather_logprobs(
        logits,
        torch.where(mask, ids, -100),
        temperature=temperature,
        inplace_backward=True,
        backend=ops_backend,
    )
    chosen = logits.detach().gather(-1, ids[:, None]).squeeze(-1)
    right = mask & (chosen == logits.detach().amax(-1))
    stats = {"logprobs": logprobs.detach(), "accuracy": right.sum() / num_tokens}
    return ops.CrossEntropyLoss(-logprobs.sum() / num_tokens, stats)


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def name_of(model: Any) -> str:
    """What to call a model in a message: its folder, else its class."""
    return getattr(model.config, "name_or_path", "") or type(model).__name__
