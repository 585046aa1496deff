"""The arithmetic of RLHF, an op a file, each behind one function with several implementations.

Per-token tensors are [B, T] over response tokens, right-padded; `mask[b, t]` is True for trained tokens, EOS included.
float64 in gives float64 out, anything else computes in and returns float32. Outputs are exactly 0 outside the mask, and
what stands there, NaN too, reaches neither values nor gradients.

`backend` picks the implementation: "triton", "cpp", "reference" (plain PyTorch, any device), or "auto", the fastest
on the tensors' device: Triton on a GPU (float64: the reference), C++ on a CPU. One for another device is a ValueError.
"""

from rlhf_fast.ops import reference
from rlhf_fast.ops._dispatch import Backend
from rlhf_fast.ops._types import CrossEntropyLoss, PPOLoss, ValueLoss
from rlhf_fast.ops.gae import gae
from rlhf_fast.ops.gather_logprobs import gather_logprobs
from rlhf_fast.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_fast.ops.linear_logprobs import linear_logprobs
from rlhf_fast.ops.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.ops.logits_ppo_loss import logits_ppo_loss
from rlhf_fast.ops.masked_whiten import masked_whiten
from rlhf_fast.ops.ppo_loss import ppo_loss
from rlhf_fast.ops.shaped_gae import shaped_gae
from rlhf_fast.ops.value_loss import value_loss

__all__ = [
    "Backend",
    "CrossEntropyLoss",
    "PPOLoss",
    "ValueLoss",
    "gae",
    "gather_logprobs",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "logits_ppo_loss",
    "masked_whiten",
    "ppo_loss",
    "reference",
    "shaped_gae",
    "value_loss",
]
