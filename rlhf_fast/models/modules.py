"""The modules that DeepSpeed wraps: a policy, a scalar model (value or reward), a policy with a value head.

All take `input_ids` [b, L] int64, right-padded, and flat indices of the N states wanted, so that the head runs on those
alone. No attention mask is needed: attention is causal and padding comes after every wanted state, so no wanted state
sees it. With `lengths`, the tokens of each row, a model that set_padding_free prepared does not even read the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_fast.errors import ModelError
from rlhf_fast.ops import Backend, CrossEntropyLoss, PPOLoss

from .head import LMHead, ScalarHead, ValueHead, compute_dtype, name_of
from .loading import VALUE_HEAD, unwrap
from .padding_free import borders, end_to_end, is_switched, switch_attention, switch_back

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PolicyModel(nn.Module):
    """A causal language model that gives log-probs of wanted tokens.

    Construction runs the model once on a few tokens and compares: the head found must give the model's own logits.
    Raises ModelError if it does not, or if a state depends on later tokens.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.head = LMHead(model)
        _check_head(model, self.head)

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        ids: Tensor,
        *,
        temperature: float = 1.0,
        lengths: Sequence[int] | None = None,
        ops_backend: Backend = "auto",
        **loss: Any,
    ) -> tuple[Tensor, Tensor] | PPOLoss | CrossEntropyLoss:
        """Log-probs and entropies [N] (fp32; fp64 for a fp64 model) of `ids` [N].

        `rows`, `positions` [N]: the state that predicts each token, so positions is the token's own place minus one.
        Both are of softmax(logits / temperature) over the whole vocabulary, entropy in nats.

        With ppo_loss's policy arguments (old_logprobs [N], advantages [N], mask [N], cliprange, ...): the PPOLoss of
        these log-probs, as from ops.linear_ppo_loss. With mask [N] and num_tokens alone: CrossEntropyLoss, as from
        ops.linear_cross_entropy. A loss is made here because the head's weight is here: see ZeRO-3 in LMHead.
        """
        hidden = _states(decoder_of(self.model), input_ids, rows, positions, lengths)
        return self.head(hidden, ids, temperature=temperature, ops_backend=ops_backend, **loss)


class SharedModel(nn.Module):
    """A policy with a value head on its trunk: one forward, one set of weights.

    The head starts at zero, or as saved in `folder` (value_head.safetensors) if that is there.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, folder: str | Path | None = None):
        super().__init__()
        self.model = model
        self.head = LMHead(model)
        _check_head(model, self.head)
        weight = self.head.weight
        self.value_head = ValueHead(weight.shape[1], dtype=compute_dtype(weight), device=weight.device)
        if folder is not None and (Path(folder) / VALUE_HEAD).exists():
            _load_value_head(self.value_head, Path(folder) / VALUE_HEAD)

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        positions: Tensor,
        ids: Tensor,
        *,
        temperature: float = 1.0,
        lengths: Sequence[int] | None = None,
        ops_backend: Backend = "auto",
        **loss: Any,
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[PPOLoss, Tensor] | CrossEntropyLoss:
        """PolicyModel's log-probs and entropies [N], or PPOLoss, and the values [N] of the states before the tokens.

        Its CrossEntropyLoss comes without values. They count 0 there, so that all weights have a gradient, as under
        ZeRO they must in every micro-batch.
        """
        hidden = _states(decoder_of(self.model), input_ids, rows, positions, lengths)
        found = self.head(hidden, ids, temperature=temperature, ops_backend=ops_backend, **loss)
        values = self.value_head(hidden)
        if isinstance(found, CrossEntropyLoss):
            return found._replace(loss=found.loss + 0 * values.sum())
        return (found, values) if loss else (*found, values)


class ScalarModel(nn.Module):
    """A model with a `score` layer: the value of a state, or the reward of the sequence up to it.

    Construction compares it with the model's own answer. Raises ModelError if they differ (an encoder such as BERT
    scores whole texts, not states).
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        score: Any = getattr(model, "score", None)
        if getattr(score, "weight", None) is None or score.weight.shape[0] != 1:
            raise ModelError(
                f"{name_of(model)}: {type(model).__name__} has no score layer with one output, so it gives no number "
                "for each token. It can score whole texts as a reward, but it cannot be trained here."
            )
        self.head = ScalarHead(score)
        _check_score(model, self.head)

    def forward(
        self, input_ids: Tensor, rows: Tensor, positions: Tensor, *, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Values [N] (fp32; fp64 for a fp64 model) of the states at `rows`, `positions` [N] int64."""
        return self.head(_states(self.model.base_model, input_ids, rows, positions, lengths))


def set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute activations in the backward (layer by layer, non-reentrant), or stop it. Acts in train mode.

    Takes a transformers model or one of the modules above. Raises ModelError if the architecture has no support.
    """
    inner: Any = unwrap(model)
    if not on:
        inner.gradient_checkpointing_disable()
        return
    try:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(
            f"{name_of(inner)}: {type(inner).__name__} has no gradient checkpointing; set gradient_checkpointing=false."
        ) from error
    # A hook for the reentrant kind alone, which needs inputs with a gradient. The C++ decoder refuses hooked models.
    inner.disable_input_require_grads()


@torch.no_grad()
def set_padding_free(model: nn.Module) -> bool:
    """Let a model read rows without their padding where `lengths` are given: see padding_free.py.

    Takes a transformers model or one of the modules above, on one device and whole. It is tried on a few tokens: two
    sequences have the states of a padded batch, and the second has them behind another first one too. False if this
    model cannot, and nothing has changed then.
    """
    inner: Any = unwrap(model)
    backbone = decoder_of(inner)
    switch_attention(inner, backbone)
    if not is_switched(backbone):
        return False
    ids = _probe_ids(inner, 6).reshape(2, 3)
    behind_another = torch.stack([ids[0].flip(0), ids[1]])
    rows, positions = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]], device=ids.device)
    try:
        states, others = (_states(backbone, x, rows, positions, [2, 3]) for x in (ids, behind_another))
        works = _close(states, _hidden(backbone, ids)[rows, positions]) and _same(states[2:], others[2:])
    except Exception:  # takes no position_ids, or looks into its mask: whatever it raises, it cannot
        works = False
    if not works:
        switch_back(inner, backbone)
    return works


def is_padding_free(model: nn.Module) -> bool:
    """Whether set_padding_free was here and could."""
    return is_switched(decoder_of(unwrap(model)))


def decoder_of(model: Any) -> nn.Module:
    """The trunk of a causal language model: input ids -> last hidden states. The text part of a multimodal model."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 names no decoder


def _states(
    backbone: nn.Module, input_ids: Tensor, rows: Tensor, positions: Tensor, lengths: Sequence[int] | None
) -> Tensor:
    """[N, H], the states at rows, positions [N]; padding is left out if lengths are given and the model can do so."""
    if lengths is None or not is_switched(backbone):
        return _hidden(backbone, input_ids)[rows, positions]
    row, starts = end_to_end(input_ids, lengths)
    with borders(lengths):
        states = backbone(**row, use_cache=False).last_hidden_state[0]
    return states[starts[rows] + positions]


def _hidden(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    return backbone(input_ids=input_ids, use_cache=False).last_hidden_state


def _probe_ids(model: Any, count: int) -> Tensor:
    """`count` different ids [1, count] from all over the vocabulary, without the pad id."""
    embedding = model.get_input_embeddings().weight
    step = max(embedding.shape[0] // (count + 2), 1)
    ids = torch.arange(1, count + 2, device=embedding.device) * step % embedding.shape[0]
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return ids[ids != (-1 if pad is None else pad)][None, :count]


def _close(got: Tensor, wanted: Tensor) -> bool:
    """Equal but for rounding, relative to the largest number. Many models round to fp32 inside, whatever the dtype."""
    rounding = 1e-4 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
    got, wanted = got.double(), wanted.double()
    return bool((got - wanted).abs().max() <= rounding * wanted.abs().max().clamp(min=1e-3))


def _same(got: Tensor, wanted: Tensor) -> bool:
    """Equal but for the last bits, by norm: states have outliers, beside which _close sees no others. The same kernels
    on as many tokens give the same bits, but for experts, which get as many only if the router wants it."""
    rounding = max(1e-5, torch.finfo(wanted.dtype).eps)
    got, wanted = got.double(), wanted.double()
    return bool((got - wanted).norm() <= rounding * wanted.norm())


@torch.no_grad()
def _check_head(model: PreTrainedModel, head: LMHead) -> None:
    if head.weight.device.type == "meta":
        return  # sizes only
    was_training = model.training
    model.eval()
    ids = _probe_ids(model, 8)
    hidden = _hidden(decoder_of(model), ids)
    same = _close(head.logits(hidden), model(input_ids=ids, use_cache=False).logits)
    causal = _close(_hidden(decoder_of(model), ids[:, :4]), hidden[:, :4])
    model.train(was_training)
    if not same:
        raise ModelError(
            f"{name_of(model)}: {type(model).__name__} makes its logits in a way that is not known here (weight "
            f"{list(head.weight.shape)}, bias {head.bias is not None}, scale {head.scale}, softcap {head.softcap} "
            "do not give the model's own). Please report the model."
        )
    if not causal:
        raise ModelError(
            f"{name_of(model)}: {type(model).__name__} is not causal: a state changes with the tokens after it."
        )


@torch.no_grad()
def _check_score(model: Any, head: ScalarHead) -> None:
    if head.weight.device.type == "meta":
        return
    was_training = model.training
    model.eval()
    ids = _probe_ids(model, 8)
    got = head(_hidden(model.base_model, ids)[:, -1])
    same = _close(got, model(input_ids=ids).logits[:, 0])
    model.train(was_training)
    if not same:
        raise ModelError(
            f"{name_of(model)}: {type(model).__name__} is not a score layer on the last token's state, so it has no "
            "value for each token. It can score whole texts as a reward, but it cannot be trained here."
        )


def _load_value_head(head: ValueHead, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{file}: not a value head for this model: {str(error).splitlines()[0]}") from error
