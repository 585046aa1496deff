"""Every op in plain PyTorch: differentiable, readable, and what the fast backends are tested against.

The arguments are rlhf_fast.ops's, without `backend` and without the checks.
"""

from rlhf_fast.ops.reference.gae import gae
from rlhf_fast.ops.reference.gather_logprobs import gather_logprobs
from rlhf_fast.ops.reference.linear_cross_entropy import linear_cross_entropy
from rlhf_fast.ops.reference.linear_logprobs import linear_logprobs
from rlhf_fast.ops.reference.linear_ppo_loss import linear_ppo_loss
from rlhf_fast.ops.reference.logits_ppo_loss import logits_ppo_loss
from rlhf_fast.ops.reference.masked_whiten import masked_whiten
from rlhf_fast.ops.reference.ppo_loss import ppo_loss
from rlhf_fast.ops.reference.shaped_gae import shaped_gae
from rlhf_fast.ops.reference.value_loss import value_loss

__all__ = [
    "gae",
    "gather_logprobs",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_ppo_loss",
    "logits_ppo_loss",
    "masked_whiten",
    "ppo_loss",
    "shaped_gae",
    "value_loss",
]
