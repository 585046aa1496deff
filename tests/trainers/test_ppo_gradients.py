"""One PPO update against PPO written out in plain PyTorch, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_fast import PPOConfig, PPOTrainer
from rlhf_fast.models import head

from .conftest import save_letters_model, write_jsonl

KL_COEF, GAMMA, LAM, CLIP, CLIP_VALUE, TEMPERATURE = 0.3, 0.97, 0.9, 0.2, 0.2, 0.7


def plain_ppo_gradients(
    policy_path: Path, critic: torch.nn.Module, reference: torch.nn.Module, rollout, scores: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PPO with nothing but PyTorch and transformers: full logits, loops over time, one backward."""
    policy = AutoModelForCausalLM.from_pretrained(policy_path, dtype=torch.float64)
    batch, width = rollout.tokens.shape
    logprobs, ref, values = (torch.zeros(batch, width, dtype=torch.float64) for _ in range(3))
    new_values = torch.zeros_like(values)
    for b in range(batch):  # one row at a time: no padding anywhere
        prompt, response = rollout.prompt_ids[b], rollout.tokens[b][rollout.mask[b]].tolist()
        ids = torch.tensor([list(prompt) + response])
        states = slice(len(prompt) - 1, ids.shape[1] - 1)
        for model, into in ((policy, logprobs), (reference, ref)):
            logits = model(ids).logits[0, states] / TEMPERATURE
            into[b, : len(response)] = F.log_softmax(logits, -1)[range(len(response)), response]
        hidden = critic.model(ids).last_hidden_state[0, states]
        new_values[b, : len(response)] = critic.score(hidden)[:, 0]
    old, ref, values, mask = logprobs.detach(), ref.detach(), new_values.detach(), rollout.mask
    advantages = torch.zeros_like(values)
    for b in range(batch):
        last, carry, next_value = int(mask[b].sum()) - 1, 0.0, 0.0
        for t in range(last, -1, -1):
            reward = -KL_COEF * (old[b, t] - ref[b, t]) + (scores[b] if t == last else 0.0)
            carry = reward + GAMMA * next_value - values[b, t] + GAMMA * LAM * carry
            advantages[b, t], next_value = carry, values[b, t]
    returns = advantages + values
    flat = advantages[mask]
    advantages = (advantages - flat.mean()) / (flat.var(unbiased=False) + 1e-8).sqrt()
    ratio = (logprobs - old).exp()
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    clipped = values + (new_values - values).clamp(-CLIP_VALUE, CLIP_VALUE)
    errors = torch.maximum((new_values - returns) ** 2, (clipped - returns) ** 2) / 2
    (surrogate[mask].sum() / mask.sum()).backward()
    (errors[mask].sum() / mask.sum()).backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (policy, critic)]
    return gradients[0], gradients[1]


def count_a(prompts, completions, **columns):
    return [text.count("a") - 0.1 * len(text) for text in completions]


@pytest.mark.parametrize("padding_free", [True, False], ids=["end to end", "padded"])
@pytest.mark.parametrize(("micro_batch_tokens", "logits_bytes"), [(1, 2**30), (24, 0), (100000, 2**30)])
def test_gradients_of_a_step_equal_plain_pytorch(
    micro_batch_tokens: int, logits_bytes: int, padding_free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", logits_bytes)
    policy_path = save_letters_model(tmp_path / "policy", seed=1, dtype=torch.float64)
    reference_path = save_letters_model(tmp_path / "reference", seed=2, dtype=torch.float64)
    config = PPOConfig(
        model_name_or_path=str(policy_path),
        ref_model_path=str(reference_path),
        train_data=write_jsonl(tmp_path / "p.jsonl", [{"prompt": p} for p in ("x", "yy", "xyx", "ab")]),
        output_dir=str(tmp_path / "run"),
        dtype="float64",
        batch_size=16,
        max_new_tokens=9,
        temperature=TEMPERATURE,
        kl_coef=KL_COEF,
        gamma=GAMMA,
        lam=LAM,
        cliprange=CLIP,
        cliprange_value=CLIP_VALUE,
        micro_batch_tokens=micro_batch_tokens,
        padding_free=padding_free,
        max_steps=1,
        report_to=[],
    )
    trainer = PPOTrainer(config, reward=count_a)
    assert trainer.models.padding_free == padding_free
    critic_path = tmp_path / "critic"
    trainer.models.critic_module.model.save_pretrained(critic_path)

    prompts = trainer.next_prompts()
    scored = trainer.score(prompts, trainer.rollout(prompts, 1))
    assert len({int(n) for n in scored.rollout.lengths}) > 3, "rows should be ragged"
    experience = trainer.experience(scored)
    trainer.accumulate(experience)

    critic = AutoModelForSequenceClassification.from_pretrained(critic_path, dtype=torch.float64)
    reference = AutoModelForCausalLM.from_pretrained(reference_path, dtype=torch.float64)
    expected = plain_ppo_gradients(policy_path, critic, reference, scored.rollout, scored.rewards.total.double())
    for engine, wanted in zip((trainer.models.policy, trainer.models.critic), expected, strict=True):
        parameters = dict(engine.module.model.named_parameters())
        assert wanted
        for name, gradient in wanted.items():
            difference = (parameters[name].grad - gradient).abs().max()
            assert difference <= 1e-10, f"{name}: {difference}"
