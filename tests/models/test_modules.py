"""PolicyModel, SharedModel and ScalarModel against the models' own forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_fast import ops
from rlhf_fast.errors import ModelError
from rlhf_fast.models import (
    PolicyModel,
    ScalarModel,
    SharedModel,
    head,
    load_causal_lm,
    set_gradient_checkpointing,
)
from tests.families import FAMILIES, VOCABULARY, tiny_config, tiny_model

LENGTHS = (9, 4, 12)


def ragged_batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids [3, 12] right-padded with arbitrary ids, and rows, positions, ids of what is predicted inside."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    inside = torch.arange(max(LENGTHS) - 1)[None] < torch.tensor(LENGTHS)[:, None] - 1
    rows, positions = inside.nonzero(as_tuple=True)
    return input_ids, rows, positions, input_ids[rows, positions + 1]


def plain(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return log_probs.gather(-1, ids[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_entropy_are_the_models_own(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(family, dtype)
    input_ids, rows, positions, ids = ragged_batch()
    with torch.no_grad():
        for temperature in (1.0, 0.7):
            wanted = plain(model(input_ids).logits[rows, positions], ids, temperature)
            got = PolicyModel(model)(input_ids, rows, positions, ids, temperature=temperature)
            for ours, theirs in zip(got, wanted, strict=True):
                assert ours.dtype == dtype
                torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    input_ids, rows, positions, ids = ragged_batch()
    logprobs, _ = PolicyModel(model)(input_ids, rows, positions, ids)
    for row, length in enumerate(LENGTHS):
        alone = model(input_ids[row : row + 1, :length]).logits[0, :-1]
        torch.testing.assert_close(logprobs[rows == row], plain(alone, ids[rows == row])[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits never whole"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "cohere"])
def test_gradients_are_the_plain_ones(family: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", 2**30 if kept else 0)
    model = tiny_model(family, torch.float64)
    input_ids, rows, positions, ids = ragged_batch()
    weights = torch.randn(2, len(ids), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gradients(logprobs: Tensor, entropy: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((weights[0] * logprobs + weights[1] * entropy).sum(), list(model.parameters())))

    wanted = gradients(*plain(model(input_ids).logits[rows, positions], ids, 0.8))
    got = gradients(*PolicyModel(model)(input_ids, rows, positions, ids, temperature=0.8))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [True, False], ids=["logits kept", "logits never whole"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "cohere"])
def test_with_its_arguments_a_policy_gives_the_ppo_loss(
    family: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", 2**30 if kept else 0)
    model = tiny_model(family, torch.float64)
    shared, batch = SharedModel(model), ragged_batch()
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, len(batch[3]), dtype=torch.float64, generator=generator)
    mask = torch.arange(len(batch[3])) % 5 != 1
    logprobs, entropy = PolicyModel(model)(*batch, temperature=0.8)
    arguments: dict[str, Any] = {
        "old_logprobs": logprobs.detach() + 0.3 * noise[0],
        "advantages": noise[1],
        "mask": mask,
        "ref_logprobs": logprobs.detach() + noise[2],
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "num_tokens": 40,
    }
    wanted = ops.ppo_loss(logprobs, entropy=entropy, **arguments)
    gradients = torch.autograd.grad(wanted.policy_loss, list(model.parameters()))
    of_policy = PolicyModel(model)(*batch, temperature=0.8, **arguments)
    of_shared, values = shared(*batch, temperature=0.8, **arguments)
    assert values.shape == logprobs.shape
    for loss in (of_policy, of_shared):
        torch.testing.assert_close(loss.policy_loss, wanted.policy_loss, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(loss.stats["logprobs"], torch.where(mask, logprobs.detach(), 0))
        for ours, theirs in zip(
            torch.autograd.grad(loss.policy_loss, list(model.parameters())), gradients, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_the_head_of_a_half_precision_model_is_fp32() -> None:
    model = tiny_model("llama", torch.bfloat16)
    input_ids, rows, positions, ids = ragged_batch()
    with torch.no_grad():
        hidden = model.model(input_ids).last_hidden_state[rows, positions]
        exact = plain(hidden.float() @ model.lm_head.weight.float().T, ids)[0]
        logprobs, entropy = PolicyModel(model)(input_ids, rows, positions, ids)
        rounded = plain(model(input_ids).logits[rows, positions].float(), ids)[0]
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-3  # what is avoided


def test_no_wanted_token_is_no_special_case() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    logprobs, entropy = PolicyModel(tiny_model("llama"))(torch.ones(2, 3, dtype=torch.int64), none, none, none)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()


class _Sharper(nn.Module):
    """An output layer that does more than a product."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.5 * self.inner(hidden)


def test_an_unknown_head_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head = _Sharper(model.lm_head)
    with pytest.raises(ModelError, match="makes its logits in a way that is not known"):
        PolicyModel(model)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_forgotten_scale_would_be_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = {"final_logit_softcapping": "gemma2", "logit_scale": "cohere", "logits_scaling": "granite"}[name]
    model = tiny_model(family)
    original = head.LMHead.__init__

    def forgets(self: Any, model: Any) -> None:
        original(self, model)
        self.scale, self.softcap = 1.0, None

    monkeypatch.setattr(head.LMHead, "__init__", forgets)
    with pytest.raises(ModelError, match="makes its logits in a way that is not known"):
        PolicyModel(model)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match=r"BertLMHeadModel"):
        PolicyModel(BertLMHeadModel(config))


def test_construction_leaves_mode_and_generator_alone() -> None:
    model = tiny_model("llama").train()
    before = torch.get_rng_state()
    PolicyModel(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("cohere", "granite")])
def test_a_scalar_model_scores_as_the_classifier_does(family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(family)
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    input_ids, rows, positions, _ = ragged_batch()
    values = ScalarModel(model)(input_ids, rows, positions)
    assert values.dtype == torch.float32
    assert values.abs().max() > 0.01
    for row, length in enumerate(LENGTHS):  # the value of a state is the score of the text so far
        for end in range(1, length):
            wanted = model(input_ids[row : row + 1, :end]).logits[0, 0]
            torch.testing.assert_close(values[(rows == row) & (positions == end - 1)][0], wanted, rtol=0, atol=1e-5)


def test_a_text_classifier_has_no_values() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    with pytest.raises(ModelError, match="no number for each token"):
        ScalarModel(BertForSequenceClassification(config))


def test_a_shared_model_is_a_policy_with_values_from_its_trunk() -> None:
    model = tiny_model("llama", torch.float64)
    shared, batch = SharedModel(model), ragged_batch()
    logprobs, entropy, values = shared(*batch, temperature=0.9)
    policy = PolicyModel(model)(*batch, temperature=0.9)
    assert torch.equal(logprobs, policy[0])
    assert torch.equal(entropy, policy[1])
    assert (values == 0).all()
    values.sum().backward()
    hidden = model.model(batch[0]).last_hidden_state[batch[1], batch[2]]
    torch.testing.assert_close(shared.value_head.weight.grad, hidden.sum(0)[None])


def test_the_value_head_of_a_half_precision_model_is_fp32() -> None:
    shared = SharedModel(tiny_model("llama", torch.bfloat16))
    assert shared.value_head.weight.dtype == torch.float32
    assert shared(*ragged_batch())[2].dtype == torch.float32


# ---- gradient checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_runs_layers_again_for_the_same_gradient(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    policy, batch = PolicyModel(load_causal_lm(tmp_path, dtype="float64").train()), ragged_batch()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for name, module in policy.named_modules():
        if name.endswith(("mlp", "fc1")):
            module.register_forward_pre_hook(count)

    def gradients() -> list[Tensor]:
        policy.zero_grad()
        policy(*batch)[0].sum().backward()
        return [p.grad.clone() for p in policy.parameters() if p.grad is not None]

    wanted, plain_calls, calls = gradients(), calls, 0
    set_gradient_checkpointing(policy, True)
    got, checkpointed_calls, calls = gradients(), calls, 0
    set_gradient_checkpointing(policy, False)
    gradients()
    assert (plain_calls, checkpointed_calls, calls) == (2, 4, 2)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
