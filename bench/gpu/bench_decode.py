"""Decoding on a GPU: milliseconds a step, sampling at temperature 1, a Llama of 1.2B random weights in bfloat16.

As bench/generation/bench_decode.py: a round generates one token, then all of them, and the difference is the steps
after the first.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from bench.gpu.timing import CLOCK, time_gpu
from rlhf_fast.generation import Generator, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(timer=CLOCK)]

SHAPE = {  # Llama 3.2 1B's
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
PROMPT, TOKENS = 128, 129
COMPILED = "transformers, static cache, compiled"
FLOOR = "floor: one read of the weights"
VLLM = importlib.util.find_spec("vllm") is not None

# tokens of each row -> nothing; how many rows is fixed
Generate = Callable[[int], object]


@functools.cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def prompts(rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SHAPE["vocab_size"], (rows, PROMPT), generator=generator).tolist()


def ours(rows: int) -> Generate:
    generator = Generator(model(), backend="cuda", max_batch_size=rows)
    return lambda tokens: generator.rollout(prompts(rows), SamplingParams(max_tokens=tokens, ignore_eos=True, seed=0))


def transformers(rows: int, **options: Any) -> Generate:
    ids = torch.tensor(prompts(rows), device="cuda")

    def generate(tokens: int) -> None:
        config = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0, **options
        )
        with torch.no_grad():
            model().generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)

    return generate


def vllm(rows: int, folder: Path) -> Generate:
    from vllm import LLM
    from vllm import SamplingParams as VllmParams

    model().save_pretrained(folder)
    engine = LLM(str(folder), skip_tokenizer_init=True, gpu_memory_utilization=0.5, max_model_len=1024)
    given = [{"prompt_token_ids": prompt} for prompt in prompts(rows)]
    return lambda tokens: engine.generate(given, VllmParams(max_tokens=tokens, ignore_eos=True), use_tqdm=False)


def names(rows: int) -> list[str]:
    return ["rlhf_fast", "transformers", COMPILED, *(["vLLM"] if VLLM and rows == 16 else []), FLOOR]


@pytest.mark.parametrize(("rows", "name"), [(rows, name) for rows in (1, 16, 64) for name in names(rows)], ids=str)
def test_decode_step(benchmark: Any, tmp_path: Path, rows: int, name: str) -> None:
    benchmark.group, benchmark.param = f"decode step, 1.2B bfloat16, batch {rows}", name
    weights = list(model().parameters())
    benchmark.extra_info["bytes"] = sum(weight.nbytes for weight in weights)
    if name == FLOOR:
        read = [weight.detach().view(torch.int32) for weight in weights if weight.dim() > 1]
        time_gpu(benchmark, lambda: [weight.sum() for weight in read], calls=3)
        return
    makers: dict[str, Callable[[], Generate]] = {
        "rlhf_fast": lambda: ours(rows),
        "transformers": lambda: transformers(rows),
        COMPILED: lambda: transformers(rows, cache_implementation="static"),  # which compiles its forward
        "vLLM": lambda: vllm(rows, tmp_path),
    }
    generate = makers[name]()
    generate(TOKENS)  # compiles, records graphs

    def seconds(tokens: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        generate(tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def step() -> None:
        first = seconds(1)
        CLOCK.now += (seconds(TOKENS) - first) / (TOKENS - 1)

    benchmark.pedantic(step, rounds=3)
