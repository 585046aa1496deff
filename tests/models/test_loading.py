"""Model folders: what is read back is what was written, and everything wrong has a message that says what to do."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models import (
    PolicyModel,
    ScalarModel,
    SharedModel,
    check_positions,
    check_vocabulary,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
)
from tests.conftest import byte_tokenizer, save_tiny_llama
from tests.families import FAMILIES, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def folder(tiny_chat_llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_chat_llama, tmp_path / "model"))


def edit_json(file: Path, **changes: object) -> None:
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_comes_back_bit_for_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_causal_lm(folder, dtype=dtype), load_tokenizer(folder)
    save_model(PolicyModel(model), tokenizer, tmp_path / "saved")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.dtype == getattr(torch, dtype)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    message = [{"role": "user", "content": "你好"}]
    tokens = tokenizer.apply_chat_template(message)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(message)["input_ids"] == tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_without_dropout(family: str, tmp_path: Path) -> None:
    saved = tiny_model(family)
    saved.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype="float32")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = saved(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        torch.testing.assert_close(model.train()(ids).logits, wanted, rtol=0, atol=1e-6)


def test_an_attention_with_a_cap_is_one_that_applies_it(tmp_path: Path) -> None:
    model = tiny_model("gemma2", attn_logit_softcapping=0.5)
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 12)[None]
    without = tiny_model("gemma2", attn_logit_softcapping=None)(ids).logits
    model.set_attn_implementation("eager")
    loaded = load_causal_lm(tmp_path, dtype="float32")(ids).logits
    assert torch.equal(loaded, model(ids).logits)
    assert (loaded - without).abs().max() > 0.1


def test_dropout_would_show_in_that_test() -> None:
    model = tiny_model("gpt2").train()
    ids = torch.arange(12)[None]
    assert (model(ids).logits - model.eval()(ids).logits).abs().max() > 0.1


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_config("qwen2")
    config.tie_word_embeddings = True
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_causal_lm(tmp_path, dtype="float32")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sampling_settings_of_the_folder_are_dropped(folder: Path, tmp_path: Path) -> None:
    # transformers refuses to save temperature without do_sample: it must not matter.
    (folder / "generation_config.json").write_text(
        json.dumps(
            {"temperature": 0.3, "repetition_penalty": 1.3, "top_k": 3, "eos_token_id": [1, 7], "pad_token_id": 0}
        )
    )
    model = load_causal_lm(folder, dtype="float32")
    save_model(model, None, tmp_path / "saved")
    for config in (
        model.generation_config.to_dict(),
        json.loads((tmp_path / "saved/generation_config.json").read_text()),
    ):
        assert config["eos_token_id"] == [1, 7]
        assert config["pad_token_id"] == 0
        assert not any(config.get(name) for name in ("temperature", "repetition_penalty", "top_k"))


def test_sharded_weights_load(folder: Path, tmp_path: Path) -> None:
    model = load_causal_lm(folder, dtype="float32")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    again = load_causal_lm(tmp_path / "sharded", dtype="float32")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tokenizer_without_pad_uses_eos_and_keeps_its_size(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(folder)
    assert loaded.pad_token_id == loaded.eos_token_id
    assert len(loaded) == len(byte_tokenizer())


def test_a_scalar_model_from_a_causal_one_has_a_small_seeded_head(folder: Path) -> None:
    torch.manual_seed(5)
    first = load_scalar_model(folder, dtype="float32")
    torch.manual_seed(5)
    second = load_scalar_model(folder, dtype="float32")
    third = load_scalar_model(folder, dtype="float32")
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, third.score.weight)
    assert 0.3 / 33 < first.score.weight.std() < 3 / 33  # hidden size 32
    trunk = load_causal_lm(folder, dtype="float32").model.state_dict()
    assert all(torch.equal(first.model.state_dict()[name], tensor) for name, tensor in trunk.items())


def test_a_reward_model_comes_back_and_loads_with_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = load_scalar_model(folder, dtype="float32")
    tokenizer = load_tokenizer(folder)
    save_model(ScalarModel(model), tokenizer, tmp_path / "reward")
    texts = tokenizer(["good", "a longer text"], padding=True, padding_side="right", return_tensors="pt")
    lengths = texts["attention_mask"].sum(1)
    with torch.no_grad():
        wanted = ScalarModel(model)(texts["input_ids"], torch.arange(2), lengths - 1)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
        assert theirs.config.num_labels == 1
        torch.testing.assert_close(theirs.eval()(**texts).logits[:, 0], wanted)
        ours = ScalarModel(load_scalar_model(tmp_path / "reward", dtype="float32"))
        torch.testing.assert_close(ours(texts["input_ids"], torch.arange(2), lengths - 1), wanted)
        assert all(map(torch.equal, ours.state_dict().values(), model.state_dict().values()))


def test_a_shared_models_value_head_comes_back(folder: Path, tmp_path: Path) -> None:
    model = SharedModel(load_causal_lm(folder, dtype="float32"))
    with torch.no_grad():
        model.value_head.weight.normal_()
    save_model(model, None, tmp_path / "shared")
    again = SharedModel(load_causal_lm(tmp_path / "shared", dtype="float32"), tmp_path / "shared")
    assert torch.equal(again.value_head.weight, model.value_head.weight)
    assert (SharedModel(load_causal_lm(tmp_path / "shared", dtype="float32")).value_head.weight == 0).all()
    save_file({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "shared/value_head.safetensors")
    with pytest.raises(ModelError, match="not a value head for this model"):
        SharedModel(load_causal_lm(tmp_path / "shared", dtype="float32"), tmp_path / "shared")


# ---- everything that is wrong with a folder -------------------------------------------------------------------------


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_a_shard(folder: Path) -> None:
    load_causal_lm(folder, dtype="float32").save_pretrained(folder, max_shard_size="20KB")
    next(iter(sorted(folder.glob("model-00002-*.safetensors")))).unlink()
    (folder / "model.safetensors").unlink(missing_ok=True)


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, r"no such folder.*not downloaded.*hf download"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config.json.*holds: .*model.safetensors"),
    "config not json": (lambda f: (f / "config.json").write_text('{\n"a": }'), r"config.json:2: not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"a JSON object was expected"),
    "config nonsense": (lambda f: edit_json(f / "config.json", hidden_size="big"), r"config.json: cannot be used"),
    "unknown type": (
        lambda f: edit_json(f / "config.json", model_type="llama9"),
        r"'llama9', which transformers .* not know",
    ),
    "no type": (lambda f: (f / "config.json").write_text("{}"), r"model_type is None"),
    "not causal": (lambda f: edit_json(f / "config.json", model_type="clip"), r"'clip' has no CausalLM form"),
    "remote code": (
        lambda f: edit_json(f / "config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Model"}),
        r"Python code of its own.*trust_remote_code=true",
    ),
    "quantised": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantised.*cannot be trained",
    ),
    "pickle": (as_pickle, r"pickles.*only safetensors are read.*save_pretrained"),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), r"GGUF file.*Dequantise"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model.safetensors and no .*index.json"),
    "missing shard": (without_a_shard, r"names \d+ files, of which 1 are missing: model-00002-of"),
    "cut short": (cut, r"model.safetensors: damaged or cut short \([\d,]+ bytes\)"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"damaged or cut short \(0 bytes\)"),
    "missing key": (
        lambda f: edit_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        r"missing from the files: model.layers.1.mlp.up_proj.weight",
    ),
    "missing head": (
        lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")),
        r"missing from the files: lm_head.weight",
    ),
    "unexpected key": (
        lambda f: edit_weights(f, lambda w: w.update({"model.extra.weight": torch.zeros(2)})),
        r"has no place for: model.extra.weight",
    ),
    "fewer layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=1), r"has no place for: model.layers.1"),
    "a weight that is NaN": (
        lambda f: edit_weights(f, lambda w: w["model.norm.weight"].index_fill_(0, torch.tensor(3), math.nan)),
        r"NaN or infinity among the weights: model.norm.weight",
    ),
    "a weight that is infinite": (
        lambda f: edit_weights(f, lambda w: w["lm_head.weight"].index_fill_(0, torch.tensor(3), math.inf)),
        r"NaN or infinity among the weights: lm_head.weight",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(7)})),
        r"wrong shapes: model.norm.weight is \[7\], the config says \[32\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_named_with_what_to_do(case: str, folder: Path) -> None:
    spoil, message = WRONG_FOLDERS[case]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_lm(folder, dtype="float32")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_not_downloaded() -> None:
    with pytest.raises(ModelError, match=r"HuggingFaceTB/SmolLM2-135M: no such folder.*not downloaded"):
        load_causal_lm("HuggingFaceTB/SmolLM2-135M", dtype="float32")


def test_an_unknown_dtype_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'fp8': one of float32, bfloat16, float16"):
        load_causal_lm(folder, dtype="fp8")


def test_code_of_the_folder_runs_only_when_asked(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    edit_json(folder / "config.json", model_type="mine", auto_map=auto_map)
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_causal_lm(folder, dtype="float32")
    assert type(load_causal_lm(folder, dtype="float32", trust_remote_code=True)).__name__ == "MyModel"


def test_tokenizers_that_cannot_serve_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="has no eos_token"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer .*holds: .*config.json"):
        load_tokenizer(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    model, tokenizer = load_causal_lm(folder, dtype="float32"), load_tokenizer(folder)
    check_vocabulary(model, tokenizer)
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(ModelError, match=r"token ids up to 261, the model's embedding 261 rows"):
        check_vocabulary(PolicyModel(model), tokenizer)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = tiny_config("llama")
    config.num_labels = 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="2 labels"):
        load_scalar_model(tmp_path, dtype="float32")


def test_a_reward_model_without_its_head_is_not_given_a_new_one(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "base")
    save_model(load_scalar_model(tmp_path / "base", dtype="float32"), None, tmp_path / "reward")
    edit_weights(tmp_path / "reward", lambda weights: weights.pop("score.weight"))
    with pytest.raises(ModelError, match=r"missing from the files: score.weight"):
        load_scalar_model(tmp_path / "reward", dtype="float32")


def test_a_reward_model_is_no_policy(folder: Path, tmp_path: Path) -> None:
    save_model(load_scalar_model(folder, dtype="float32"), None, tmp_path / "reward")
    with pytest.raises(ModelError, match=r"missing from the files: lm_head.weight"):
        load_causal_lm(tmp_path / "reward", dtype="float32")


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_end_where_they_are_learned(family: str) -> None:
    model = tiny_model(family)
    end = model.config.max_position_embeddings
    check_positions(model, end, "")
    model(torch.ones(1, end, dtype=torch.int64))
    if family in ("gpt2", "opt"):
        with pytest.raises(ConfigError, match=f"has learned {end} positions, .* {end + 1} tokens: lower max_length"):
            check_positions(PolicyModel(model), end + 1, "lower max_length")
        with pytest.raises(IndexError):
            model(torch.ones(1, end + 1, dtype=torch.int64))
    else:
        check_positions(model, end + 1, "")
        model(torch.ones(1, end + 1, dtype=torch.int64))
