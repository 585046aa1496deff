"""A whole PPO step on the CPU: 15M weights in float32, 16 prompts of 64 tokens, 64 new tokens, a new rollout each step.

The peer is PPO as one writes it with PyTorch and transformers alone: generate, full logits of policy and reference, a
loop over time for the advantages, one update. Both train policy and critic with AdamW and ask the same reward. Ragged:
800 of the 32,000 tokens end a completion, which makes the mean length half of the longest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bench.generation.shapes import SHAPES
from rlhf_fast import PPOConfig, PPOTrainer

ROWS, PROMPT, NEW = 16, 64, 64
VOCABULARY = SHAPES["15M"]["vocab_size"]
ROUNDS = 3
STOP = {"fixed": [], "ragged": list(range(2, 802))}
KL_COEF, LAM, CLIP, LEARNING_RATE = 0.05, 0.95, 0.2, 1e-6

Step = Callable[[], None]


def config_of_model(**changes: Any) -> LlamaConfig:
    return LlamaConfig(
        **SHAPES["15M"], initializer_range=0.05, bos_token_id=None, eos_token_id=1, pad_token_id=0, **changes
    )


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(text) / 100 for text in completions]


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """Ids as words: "7 12 9"; 0 pads, 1 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {name: i for i, name in enumerate(["<pad>", "<end>", *map(str, range(2, vocabulary))])}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)


def prompts() -> Tensor:
    return torch.randint(802, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))


@contextmanager
def with_trainer(folder: Path, lengths: str, rollout_backend: str) -> Iterator[Step]:
    """PPOTrainer's loop, a step at a time, with all that it writes."""
    torch.manual_seed(0)
    LlamaForCausalLM(config_of_model()).save_pretrained(folder / "model")
    save_tokenizer(folder / "model", VOCABULARY)
    rows = [{"prompt": " ".join(map(str, row))} for row in prompts().tolist()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PPOConfig(
        model_name_or_path=str(folder / "model"),
        train_data=str(folder / "prompts.jsonl"),
        output_dir=str(folder / "run"),
        batch_size=ROWS,
        max_prompt_length=PROMPT,
        max_new_tokens=NEW,
        min_new_tokens=0 if STOP[lengths] else NEW,
        stop_token_ids=STOP[lengths] or None,
        rollout_backend=rollout_backend,  # type: ignore[arg-type]
        learning_rate=LEARNING_RATE,
        lam=LAM,
        kl_coef=KL_COEF,
        cliprange=CLIP,
        max_steps=ROUNDS + 1,
        report_to=[],
    )
    trainer = PPOTrainer(config, reward=reward)
    steps = trainer.run.steps()

    def step() -> None:
        number = next(steps)
        batch = trainer.next_prompts()
        scored = trainer.score(batch, trainer.rollout(batch, number))
        assert scored is not None
        trainer.update(trainer.experience(scored), number)

    yield step
    next(steps, None)  # ends the run


@contextmanager
def with_plain_loop(folder: Path, lengths: str) -> Iterator[Step]:
    """PyTorch and transformers, and nothing of this project."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config_of_model())
    reference = LlamaForCausalLM(config_of_model()).eval()
    reference.load_state_dict(policy.state_dict())
    critic = LlamaForSequenceClassification(config_of_model(num_labels=1))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE) for model in (policy, critic)]
    generation = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=NEW, pad_token_id=0, eos_token_id=STOP[lengths] or None
    )
    asked = prompts()

    def step() -> None:
        with torch.no_grad():
            whole = policy.generate(asked, attention_mask=torch.ones_like(asked), generation_config=generation)
        response = whole[:, PROMPT:]
        stops = torch.isin(response, torch.tensor(STOP[lengths]))
        mask = (stops.cumsum(dim=1) - stops.long()) == 0  # up to the first stop token, itself included
        attention = torch.cat([torch.ones_like(asked), mask.long()], dim=1)

        def logprobs(model: Any) -> Tensor:
            logits = model(whole, attention_mask=attention).logits[:, PROMPT - 1 : -1]
            return logits.log_softmax(dim=-1).gather(-1, response[..., None])[..., 0]

        def values() -> Tensor:
            hidden = critic.model(whole, attention_mask=attention).last_hidden_state
            return critic.score(hidden)[:, PROMPT - 1 : -1, 0]

        with torch.no_grad():
            old, ref, old_values = logprobs(policy), logprobs(reference), values() * mask
        texts = [" ".join(map(str, row[keep].tolist())) for row, keep in zip(response, mask, strict=True)]
        rewards = -KL_COEF * (old - ref) * mask
        rewards[torch.arange(ROWS), mask.sum(dim=1) - 1] += torch.tensor(reward(texts, texts))
        advantages, carry = torch.zeros_like(rewards), torch.zeros(ROWS)
        for t in reversed(range(rewards.shape[1])):
            after = old_values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(ROWS)
            carry = rewards[:, t] + after - old_values[:, t] + LAM * carry
            advantages[:, t] = carry
        returns = advantages + old_values
        chosen = advantages[mask]
        advantages = (advantages - chosen.mean()) / (chosen.var() + 1e-8).sqrt()

        ratio = (logprobs(policy) - old).exp()
        surrogate = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
        (surrogate * mask).sum().div(mask.sum()).backward()
        new_values = values()
        clipped = old_values + (new_values - old_values).clamp(-CLIP, CLIP)
        errors = torch.max((new_values - returns).square(), (clipped - returns).square()) / 2
        (errors * mask).sum().div(mask.sum()).backward()
        for model, optimizer in zip((policy, critic), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    yield step


DOERS = {
    "rlhf_fast": lambda folder, lengths: with_trainer(folder, lengths, "cpp"),
    "rlhf_fast, transformers decodes": lambda folder, lengths: with_trainer(folder, lengths, "transformers"),
    "plain PyTorch and transformers": with_plain_loop,
}


@pytest.mark.parametrize("name", DOERS)
@pytest.mark.parametrize("lengths", STOP)
def test_step(benchmark: Any, tmp_path: Path, lengths: str, name: str) -> None:
    what = f"{NEW} new tokens" if lengths == "fixed" else f"1 to {NEW} new tokens"
    benchmark.group, benchmark.param = f"PPO step, 15M float32, {ROWS} prompts of {PROMPT}, {what}", name
    with DOERS[name](tmp_path, lengths) as step:
        benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
