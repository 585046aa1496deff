"""The whole GPU decoder on the emulated device, CUDA graphs apart: the CPU decoder's tokens and log-probs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_fast.errors import NonFiniteError
from rlhf_fast.generation import Generator, Rollout, SamplingParams, cuda_backend
from tests.conftest import byte_tokenizer
from tests.cuda import decoder
from tests.families import tiny_model

PROMPTS = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], list(range(2, 42))]
PROVEN = ["llama", "qwen3", "gpt2"]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is a GPU: backend="cuda" takes models that lie on it."""
    monkeypatch.setattr(cuda_backend, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_backend, "library_for", lambda device: decoder.address())


def both(model: Any, params: SamplingParams, prompts: Any = PROMPTS, **options: Any) -> tuple[Generator, Rollout]:
    """A rollout of the GPU decoder, whose numbers are the CPU decoder's."""
    gpu, cpu = (Generator(model, backend=backend, **options) for backend in ("cuda", "cpp"))
    ours, theirs = gpu.rollout(prompts, params), cpu.rollout(prompts, params)
    assert (gpu.stats.backend, cpu.stats.backend) == ("cuda", "cpp")
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.mask, theirs.mask)
    assert ours.finish_reasons == theirs.finish_reasons
    for name in ("logprobs", "sampled_logprobs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-5)
    return gpu, ours


@pytest.mark.parametrize("family", PROVEN)
def test_samples_and_their_log_probs_are_the_cpus(family: str) -> None:
    """Two completions a prompt, more rows than places, rows that finish early, a prompt with PyTorch's attention."""
    _, rollout = both(
        tiny_model(family), SamplingParams(n=2, max_tokens=20, stop_token_ids=range(20, 30), seed=3), max_batch_size=5
    )
    assert "stop" in rollout.finish_reasons
    assert len(set(rollout.mask.sum(dim=1).tolist())) > 3


@pytest.mark.parametrize("family", PROVEN)
def test_all_filters(family: str) -> None:
    params = SamplingParams(
        n=2,
        max_tokens=16,
        min_tokens=5,
        temperature=1.2,
        top_p=0.9,
        top_k=20,
        min_p=0.01,
        repetition_penalty=1.2,
        stop_token_ids=[20, 30, 40],
        seed=7,
    )
    both(tiny_model(family), params)


@pytest.mark.parametrize("filters", [{"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0.0}], ids=str)
def test_each_filter_alone(filters: dict[str, float]) -> None:
    both(tiny_model("llama"), SamplingParams(n=2, max_tokens=12, seed=1, **filters))


def test_a_small_cache_evicts_rows_and_changes_nothing() -> None:
    model = tiny_model("llama")
    page = cuda_backend.PAGE_TOKENS * 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers, 2 heads, 8 numbers of 4 bytes
    params = SamplingParams(n=2, max_tokens=24, ignore_eos=True, seed=2)
    small, _ = both(model, params, PROMPTS[:3], cache_bytes=5 * page)
    assert small.stats.evictions > 0
    assert small.stats.peak_cache_bytes == 5 * page
    with pytest.raises(ValueError, match="cannot hold one row"):
        Generator(model, backend="cuda", cache_bytes=page).rollout(PROMPTS[:1], params)


def test_equal_beginnings_are_computed_once() -> None:
    beginning = list(range(2, 35))
    prompts = [[*beginning, 40], [*beginning, 50, 51], beginning]
    generator, _ = both(tiny_model("qwen3"), SamplingParams(max_tokens=6, seed=0), prompts, max_batch_size=2)
    assert generator.stats.prefilled_tokens < sum(map(len, prompts))


def test_long_prompts_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_backend, "PREFILL_TOKENS", 24)
    both(tiny_model("llama"), SamplingParams(max_tokens=6, seed=0), [list(range(2, 60)), [3, 4], list(range(9, 50))])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 20}),
        ("gemma2", {}),  # capped scores, norms behind each half
        ("gpt_neox", {}),  # parallel blocks
        ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {}),  # a product behind the embeddings and before the head
        ("phi3", {"sliding_window": 6}),  # gate and value in one matrix
        ("cohere", {}),
        ("granite", {"residual_multiplier": 0.5}),
    ],
    ids=str,
)
def test_other_families(family: str, changes: dict[str, Any]) -> None:
    both(tiny_model(family, **changes), SamplingParams(max_tokens=6, seed=5), PROMPTS[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_differs_by_roundings(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    params = SamplingParams(n=2, max_tokens=12, seed=3, ignore_eos=True)
    ours, theirs = (Generator(model, backend=backend).rollout(PROMPTS, params) for backend in ("cuda", "cpp"))
    same = (ours.tokens == theirs.tokens).int().cumprod(dim=1).bool()  # up to where rounding drew another token
    assert same.float().mean() > 0.5
    assert (ours.logprobs - theirs.logprobs)[same].abs().mean() < 0.02


def test_rows_do_not_depend_on_the_batch() -> None:
    """As long as the kernels take the products: up to 16 tokens in a step."""
    model = tiny_model("llama")
    params = SamplingParams(max_tokens=10, seed=4)
    together = Generator(model, backend="cuda").rollout(PROMPTS[:3], params)
    for row in range(3):
        alone = Generator(model, backend="cuda").rollout([PROMPTS[row]], params)
        width = alone.logprobs.shape[1]
        assert torch.equal(alone.logprobs, together.logprobs[row : row + 1, :width])


@pytest.mark.parametrize("family", PROVEN)
def test_what_a_cuda_graph_holds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches for more tokens than there are, bound by the longest sequence; beyond 16 tokens PyTorch's products."""
    module, sizes = cuda_backend.load_generation(), set()

    def replay(tokens: int, launch: Callable[[int], None]) -> bool:
        sizes.add(tokens)
        launch(0)
        return True

    def settings() -> Any:
        made = module.CudaSettings()
        made.replay = replay
        return made

    fields = {"CudaSettings": settings, "cuda_backend": module.cuda_backend}
    monkeypatch.setattr(cuda_backend, "load_generation", lambda: SimpleNamespace(**fields))
    both(tiny_model(family), SamplingParams(n=5, max_tokens=40, stop_token_ids=range(20, 30), seed=3))
    assert {8, 16, 32} <= sizes  # 20 rows, and fewer as they end


def test_stop_strings_and_text() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=261), byte_tokenizer()
    params = SamplingParams(n=2, max_tokens=30, stop=["e", "a"], seed=0)
    ours, cpu = (Generator(model, tokenizer, backend=b).generate(["Hello", "You"], params) for b in ("cuda", "cpp"))
    assert [(c.text, c.finish_reason, c.token_ids) for c in ours] == [
        (c.text, c.finish_reason, c.token_ids) for c in cpu
    ]


def test_weights_are_used_where_they_lie() -> None:
    model = tiny_model("llama")
    generator, params = Generator(model, backend="cuda"), SamplingParams(max_tokens=6, seed=0)
    before = generator.rollout(PROMPTS, params)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    assert not torch.equal(generator.rollout(PROMPTS, params).logprobs, before.logprobs)
    both(model, params)


def test_adapters_of_lora() -> None:
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)
    both(model, SamplingParams(max_tokens=8, seed=0))


def test_errors_leave_the_generator_usable() -> None:
    model = tiny_model("llama")
    generator, params = Generator(model, backend="cuda"), SamplingParams(max_tokens=4, seed=0)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[3, 3] = float("nan")
        with pytest.raises(NonFiniteError):
            generator.rollout(PROMPTS, params)
        weight[3, 3] = 0.5
    both(model, params)
    assert generator.rollout(PROMPTS, params).mask.any()


def test_weights_of_several_types_are_left_to_transformers() -> None:
    model = tiny_model("llama")
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(ValueError, match="backend 'cuda': weights of several types: bfloat16, float32"):
        Generator(model, backend="cuda").rollout(PROMPTS, SamplingParams(max_tokens=2))
