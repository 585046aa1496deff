"""Sequences end to end in one row: the same log-probs, values and gradients as in a padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_fast.config import SFTConfig
from rlhf_fast.distributed import World
from rlhf_fast.models import (
    PolicyModel,
    ScalarModel,
    SharedModel,
    add_adapters,
    is_padding_free,
    load_causal_lm,
    set_gradient_checkpointing,
    set_padding_free,
)
from rlhf_fast.models.modules import decoder_of
from rlhf_fast.trainers.batching import use_padding_free
from tests.families import FAMILIES, VOCABULARY, tiny_config, tiny_model

LENGTHS = [9, 1, 4, 12, 1]  # the windows of Mistral and Gemma are of 4 tokens


def batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids [5, 12], right-padded with arbitrary ids; rows, positions of all states inside; ids to predict."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    inside = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    rows, positions = inside.nonzero(as_tuple=True)
    return input_ids, rows, positions, torch.randint(2, VOCABULARY, rows.shape, generator=generator)


@pytest.fixture
def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each embedding was given: padding counts."""
    counts: list[int] = []
    forward = nn.Embedding.forward

    def counted(self: nn.Embedding, ids: Tensor) -> Tensor:
        if self.num_embeddings == VOCABULARY:
            counts.append(ids.numel())
        return forward(self, ids)

    monkeypatch.setattr(nn.Embedding, "forward", counted)
    return counts


@torch.no_grad()
def same_without_padding(module: nn.Module, inputs: Sequence[Tensor], tokens_read: list[int]) -> Any:
    """Holds what the module gives without reading padding to what it gives of the padded batch, which is returned."""
    wanted = module(*inputs)
    assert set_padding_free(module)
    tokens_read.clear()
    torch.testing.assert_close(module(*inputs, lengths=LENGTHS), wanted, rtol=0, atol=1e-5)
    assert tokens_read == [sum(LENGTHS)]
    return wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_rows_without_padding(family: str, tokens_read: list[int]) -> None:
    policy, inputs = PolicyModel(tiny_model(family)), batch()
    wanted, _ = same_without_padding(policy, inputs, tokens_read)

    # The check can fail: without the borders, all but the first sequence's are others.
    row = torch.cat([ids[:n] for ids, n in zip(inputs[0], LENGTHS, strict=True)])[None]
    places = torch.arange(sum(LENGTHS))
    with torch.no_grad():
        mixed, _ = policy(row, torch.zeros_like(places), places, inputs[3], lengths=[sum(LENGTHS)])
    assert (mixed - wanted).abs()[LENGTHS[0] :].max() > 0.05
    torch.testing.assert_close(mixed[: LENGTHS[0]], wanted[: LENGTHS[0]], rtol=0, atol=1e-5)


def gradients(model: nn.Module, inputs: Sequence[Tensor], **options: Any) -> list[Tensor]:
    logprobs, entropy = model(*inputs, **options)
    weights = torch.randn(2, len(logprobs), dtype=logprobs.dtype, generator=torch.Generator().manual_seed(2))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((weights[0] * logprobs + weights[1] * entropy).sum(), trained))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_padded_batch(family: str) -> None:
    policy, inputs = PolicyModel(tiny_model(family, torch.float64)), batch()
    wanted = gradients(policy, inputs)
    assert set_padding_free(policy)
    # Many modules make their norms or angles in float32 whatever the dtype.
    for ours, theirs in zip(gradients(policy, inputs, lengths=LENGTHS), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_layers_that_run_again_attend_as_before(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    policy, inputs = PolicyModel(load_causal_lm(tmp_path, dtype="float64").train()), batch()
    assert set_padding_free(policy)
    wanted = gradients(policy, inputs, lengths=LENGTHS)
    set_gradient_checkpointing(policy, True)
    for ours, theirs in zip(gradients(policy, inputs, lengths=LENGTHS), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("cohere", "granite")])
def test_values_are_those_of_a_padded_batch(family: str, tokens_read: list[int]) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(family)
    config.num_labels = 1
    torch.manual_seed(0)
    critic = ScalarModel(AutoModelForSequenceClassification.from_config(config).eval())
    same_without_padding(critic, batch()[:3], tokens_read)


def test_a_shared_trunk_and_adapters_read_rows_without_padding(tmp_path: Path, tokens_read: list[int]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype="float32")
    add_adapters(model, SFTConfig(model_name_or_path=str(tmp_path), train_data="", use_peft=True))
    shared = SharedModel(model)
    nn.init.normal_(shared.value_head.weight)
    same_without_padding(shared, batch(), tokens_read)


def other_model(kind: str) -> Any:
    """Models whose states cannot be kept apart: attention of their own making (Bloom), none at all (Mamba), or
    convolutions besides (LFM2: with such weights they mix no more than bfloat16 might have rounded)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes: dict[str, Any] = {
        "bloom": {"n_layer": 2, "n_head": 4},
        "mamba": {"num_hidden_layers": 2, "state_size": 4},
        "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1], "initializer_range": 0.06, **heads},
    }[kind]
    torch.manual_seed(0)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings, **sizes)).eval()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("bloom", torch.float32), ("mamba", torch.float32), ("lfm2", torch.bfloat16)]
)
def test_a_model_that_cannot_reads_padded_rows(kind: str, dtype: torch.dtype, tokens_read: list[int]) -> None:
    policy, inputs = PolicyModel(other_model(kind).to(dtype)), batch()
    wanted, _ = policy(*inputs)
    assert not set_padding_free(policy)
    tokens_read.clear()
    got, _ = policy(*inputs, lengths=LENGTHS)
    assert tokens_read == [inputs[0].numel()]
    assert torch.equal(got, wanted)


def test_a_run_warns_of_models_that_cannot() -> None:
    config = SFTConfig(model_name_or_path="-", train_data="-")
    world = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    unable, able = other_model("bloom"), tiny_model("llama")
    with pytest.warns(UserWarning, match=r"^padding_free: BloomForCausalLM cannot keep sequences apart"):
        assert not use_padding_free(config, [unable, able], world)
    assert is_padding_free(able)
    assert use_padding_free(config, [able], world)
    assert not use_padding_free(replace(config, padding_free=False), [able], world)


def test_one_whose_layers_mix_sequences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer, forward = decoder_of(model).layers[0], decoder_of(model).layers[0].forward

    def mixing(hidden: Tensor, **options: Any) -> Tensor:
        return forward(hidden + 0.1 * hidden.roll(1, dims=1), **options)  # as a convolution does

    monkeypatch.setattr(layer, "forward", mixing)
    assert not set_padding_free(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt"])
def test_all_other_calls_are_as_before(family: str, tmp_path: Path) -> None:
    """With padding on the left, as transformers generates, and from the folder."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(4))
    seen = torch.ones_like(ids).index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor(0))

    def answers(model: Any) -> list[Tensor]:
        logits = model(ids, attention_mask=seen).logits[:, 2:]
        return [logits, model.generate(ids, attention_mask=seen, max_new_tokens=6, do_sample=False)]

    with torch.no_grad():
        wanted = answers(model)
        assert set_padding_free(model)
        assert all(map(torch.equal, answers(model), wanted))
        model.save_pretrained(tmp_path)
        assert "per_sequence" not in (tmp_path / "config.json").read_text()
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert again.config._attn_implementation in ("sdpa", "eager")
        assert all(map(torch.equal, answers(again), wanted))
