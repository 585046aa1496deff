"""The GPU decoder against transformers on the same GPU, CUDA graphs included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.generation import Generator, Rollout, SamplingParams, cuda_graphs
from rlhf_fast.models import PolicyModel
from tests.families import tiny_model

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], list(range(2, 42))]
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gpt2",
    "gemma2",
    "gemma3",
    "opt",
    "gpt_neox",
    "phi3",
    "cohere",
    "granite",
]


def recomputed(model: Any, rollout: Rollout) -> Tensor:
    """Log-probs [B, T] from transformers' full forward, as training has them."""
    input_ids, rows, positions, ids = rollout.sequences(pad_id=0)
    with torch.no_grad():
        return rollout.scatter(PolicyModel(model)(input_ids, rows, positions, ids, temperature=1.0)[0])


def drift(model: Any, rollout: Rollout) -> Tensor:
    return (rollout.logprobs - recomputed(model, rollout))[rollout.mask].abs()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_training(family: str) -> None:
    model = tiny_model(family).cuda()
    generator = Generator(model)
    rollout = generator.rollout(PROMPTS, SamplingParams(n=2, max_tokens=40, seed=3))
    assert generator.stats.backend == "cuda"
    assert rollout.tokens.is_cuda
    assert drift(model, rollout).max() <= 1e-4

    greedy = generator.rollout(PROMPTS, SamplingParams(temperature=0, max_tokens=40))
    input_ids, rows, positions, ids = greedy.sequences(pad_id=0)
    with torch.no_grad():
        logits = model(input_ids).logits[rows, positions]
    assert (logits.amax(dim=-1) - logits.gather(1, ids[:, None])[:, 0]).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_drifts_no_more_than_transformers(dtype: torch.dtype) -> None:
    size = {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "head_dim": 64,
        "vocab_size": 32_000,
    }
    model = tiny_model("llama", dtype, initializer_range=0.04, num_attention_heads=16, **size).cuda()
    params = SamplingParams(n=4, max_tokens=60, seed=3, ignore_eos=True)
    ours, theirs = (Generator(model, backend=b).rollout(PROMPTS, params) for b in ("cuda", "transformers"))
    assert drift(model, ours).mean() < 1.4 * drift(model, theirs).mean()


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64])
def test_graphs_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of all buckets, rows that end early, so that one call goes through several graphs."""
    model = tiny_model("llama").cuda()
    params = SamplingParams(n=rows, max_tokens=48, seed=1, stop_token_ids=[20, 30])
    with_graphs = Generator(model).rollout(PROMPTS[:1], params)
    monkeypatch.setattr(cuda_graphs, "TIMES_BEFORE", 10**9)
    without = Generator(model).rollout(PROMPTS[:1], params)
    assert torch.equal(with_graphs.mask, without.mask)
    assert torch.equal(with_graphs.tokens, without.tokens)
    torch.testing.assert_close(with_graphs.logprobs, without.logprobs, rtol=0, atol=1e-5)


def test_all_filters_and_a_small_cache() -> None:
    model = tiny_model("qwen3").cuda()
    params = SamplingParams(
        n=3,
        max_tokens=40,
        min_tokens=5,
        temperature=1.2,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.2,
        seed=7,
    )
    page = 16 * 2 * 2 * 2 * 8 * 4
    ample, small = (Generator(model, cache_bytes=size).rollout(PROMPTS, params) for size in (None, 10 * page))
    cpu = Generator(tiny_model("qwen3"), backend="cpp").rollout(PROMPTS, params)
    assert torch.equal(ample.tokens, small.tokens)
    assert torch.equal(ample.tokens.cpu(), cpu.tokens)


def test_long_prompts() -> None:
    model = tiny_model("llama", max_position_embeddings=8192, initializer_range=0.1).cuda()
    prompt = torch.randint(2, 60, (5000,), generator=torch.Generator().manual_seed(0)).tolist()
    rollout = Generator(model).rollout([prompt, prompt[:100]], SamplingParams(n=2, max_tokens=20, seed=0))
    assert drift(model, rollout).max() <= 1e-4


def test_memory_is_given_back() -> None:
    model = tiny_model("llama").cuda()
    generator, params = Generator(model), SamplingParams(n=8, max_tokens=20, seed=0)
    generator.rollout(PROMPTS, params)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        generator.rollout(PROMPTS, params)
    assert torch.cuda.memory_allocated() == before
