"""The C++ decoder applies LoRA adapters beside the weights, with the numbers of PEFT's own layers."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from rlhf_fast.generation import Generator, Rollout, SamplingParams
from tests.families import tiny_model
from tests.generation.test_cpp_backend import PROMPTS, assert_numbers_of_training, recomputed, same

# family, what differs from adapters of rank 4 on every linear layer but the head
ADAPTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "r": 3, "use_rslora": True}),
    ("llama", {"target_modules": ["v_proj", "o_proj"], "lora_bias": True}),
    ("qwen2", {"rank_pattern": {"up_proj": 1, "k_proj": 9}}),
    ("qwen3", {}),
    ("mistral", {}),
    ("gpt2", {}),
    ("gemma2", {}),
    ("gemma3", {}),
    ("opt", {}),
    ("gpt_neox", {}),
    ("phi3", {}),
    ("cohere", {}),
    ("granite", {}),
]


def adapted(model: Any, **settings: Any) -> Any:
    """The model with random adapters of PEFT's; returns PEFT's wrapper, `model` itself has the layers."""
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    wrapper = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(model)
    return wrapper


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """PEFT begins with B = 0, which nothing would show of."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.2)


@pytest.mark.parametrize(("family", "settings"), ADAPTED, ids=str)
def test_numbers_are_those_of_peft(family: str, settings: dict[str, Any]) -> None:
    model = tiny_model(family)
    wrapper = adapted(model, **settings)
    generator = Generator(model, backend="cpp", max_batch_size=3)
    rollout = assert_numbers_of_training(model, generator, max_tokens=30)
    with wrapper.disable_adapter():
        without = recomputed(model, rollout, 0.9)
        plain = generator.rollout(PROMPTS, SamplingParams(max_tokens=10, seed=3))
        assert (plain.logprobs - recomputed(model, plain))[plain.mask].abs().max() <= 1e-4
    assert (without - rollout.logprobs)[rollout.mask].abs().max() > 0.1  # so the adapters were there


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own_dtype", [False, True], ids=["float32 adapters", "adapters of the model's dtype"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_in_half_precision_it_rounds_where_peft_does(family: str, own_dtype: bool, dtype: torch.dtype) -> None:
    """As test_half_precision.py, compared by means: they are a tenth of what transformers' own decoding is off by."""
    model = tiny_model(family, dtype)
    adapted(model)
    if own_dtype:
        model.to(dtype)
    params = SamplingParams(n=4, max_tokens=16, seed=3, ignore_eos=True)
    ours = Generator(model, backend="cpp").rollout(PROMPTS, params)
    theirs = Generator(model, backend="transformers").rollout(PROMPTS, params)
    alike = (ours.tokens == theirs.tokens).cumprod(dim=1).bool()
    assert alike.sum() > 100
    training = recomputed(model, ours)[alike]
    drift, allowed = ((rollout.logprobs[alike] - training).abs() for rollout in (ours, theirs))
    assert drift.mean() < 0.6 * allowed.mean()


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    model = tiny_model("llama")
    adapted(model)
    params, seeds = SamplingParams(max_tokens=30, ignore_eos=True), [4, 5, 6, 7]
    whole = Generator(model, backend="cpp").rollout(PROMPTS, params, seeds=seeds)
    assert same(Generator(model, backend="cpp", max_batch_size=3).rollout(PROMPTS, params, seeds=seeds), whole)
    for i, prompt in enumerate(PROMPTS):
        assert same(Generator(model, backend="cpp").rollout([prompt], params, seeds=[seeds[i]]), whole.select([i]))


def test_a_step_on_the_adapters_is_seen() -> None:
    model = tiny_model("llama")
    adapted(model)
    generator, params = Generator(model, backend="cpp"), SamplingParams(max_tokens=20, seed=0, ignore_eos=True)
    before = generator.rollout(PROMPTS, params)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss.backward()
    optimizer.step()
    after = generator.rollout(PROMPTS, params)
    assert (before.logprobs[:, 0] - after.logprobs[:, 0]).abs().max() > 0.01
    assert (after.logprobs - recomputed(model, after)).abs().max() <= 1e-4


def test_pefts_wrapper_will_do() -> None:
    model = tiny_model("llama")
    wrapper = adapted(model)
    rollouts: list[Rollout] = []
    for given in (wrapper, model):
        generator = Generator(given, backend="cpp")
        rollouts.append(generator.rollout(PROMPTS, SamplingParams(max_tokens=5, seed=1)))
    assert same(*rollouts)


def test_merged_adapters_are_in_the_weights() -> None:
    model = tiny_model("llama")
    wrapper = adapted(model)
    wrapper.merge_adapter()
    rollout = Generator(model, backend="cpp").rollout(PROMPTS, SamplingParams(max_tokens=10, seed=1))
    assert (rollout.logprobs - recomputed(model, rollout))[rollout.mask].abs().max() <= 1e-4


def two_active(model: Any) -> None:
    wrapper = adapted(model)
    wrapper.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapper.base_model.set_adapter(["default", "second"])


def other_kind(model: Any) -> None:
    peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


def half_adapters(model: Any) -> None:
    adapted(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()


UNSUPPORTED: list[tuple[Any, str]] = [
    (lambda model: adapted(model, use_dora=True), r"lora_magnitude_vector\.default is a .*\.DoraLinearLayer"),
    (lambda model: adapted(model, alora_invocation_tokens=[5]), "a variant of LoRA, ALoraLinearVariant"),
    (
        lambda model: adapted(model, target_modules=["embed_tokens"]),
        r"model\.embed_tokens is a peft\.tuners\.lora\.layer\.Embedding",
    ),
    (lambda model: adapted(model, target_modules=["lm_head"]), "an adapter on the head"),
    (lambda model: adapted(model, modules_to_save=["input_layernorm"]), "input_layernorm is a .*ModulesToSaveWrapper"),
    (other_kind, r"q_proj is a peft\.tuners\.ia3\.layer\.Linear"),
    (two_active, "2 active adapters on a layer: default, second"),
    (half_adapters, "an adapter in torch.bfloat16 beside weights in torch.float32"),
]


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED, ids=[reason for _, reason in UNSUPPORTED])
def test_other_adapters_go_to_transformers_with_a_reason(change: Any, reason: str) -> None:
    model = tiny_model("llama")
    change(model)
    generator, params = Generator(model), SamplingParams(max_tokens=3, seed=0)
    with pytest.warns(UserWarning, match=f"instead of C\\+\\+: .*{reason}"):
        generator.rollout(PROMPTS, params)
    assert generator.stats.backend == "transformers"
