"""LoRA in a model: what is adapted, what is trained, and folders that PEFT, transformers and we read alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_fast.config import SFTConfig
from rlhf_fast.errors import ConfigError, ModelError
from rlhf_fast.models import (
    PolicyModel,
    ScalarModel,
    adapters_off,
    add_adapters,
    export_merged,
    head,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    save_model,
    set_gradient_checkpointing,
)
from tests.conftest import byte_tokenizer
from tests.families import tiny_model
from tests.generation.test_lora import randomise

IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 6, 7]])


def lora(targets: str | list[str] | None = "all-linear", **fields: Any) -> SFTConfig:
    return SFTConfig(
        model_name_or_path="m",
        train_data="d",
        use_peft=True,
        lora_r=4,
        lora_alpha=8,
        lora_target_modules=targets,
        **fields,
    )


def adapted(folder: Path, load: Callable[..., Any] = load_causal_lm, **fields: Any) -> Any:
    """The folder's model with adapters that do something."""
    model = load(folder, dtype="float32")
    add_adapters(model, lora(**fields))
    randomise(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def with_peft(folder: Path) -> Any:
    """The model as PEFT alone reads it."""
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@pytest.fixture(params=["llama", "gpt2", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    tiny_model(request.param, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- in the model ----------------------------------------------------------------------------------------------------


def test_adapters_alone_are_trained_and_begin_as_nothing() -> None:
    model = tiny_model("llama")
    before = logits(model)
    add_adapters(model, lora())
    assert torch.equal(logits(model), before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven products each
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("family", "targets", "adapted"),
    [
        ("llama", None, {"q_proj", "v_proj"}),
        ("gpt2", None, {"c_attn"}),
        ("llama", ["k_proj", "down_proj"], {"k_proj", "down_proj"}),
        ("llama", r".*layers\.1\..*_proj", {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}),
    ],
)
def test_target_modules(family: str, targets: Any, adapted: set[str]) -> None:
    model = tiny_model(family)
    add_adapters(model, lora(targets))
    assert {
        name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad
    } == adapted


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        (
            "llama",
            ["q_proj", "query"],
            "'query' matches nothing. LlamaForCausalLM has down_proj, embed_tokens, gate_proj",
        ),
        ("gpt2", ["q_proj"], "'q_proj' matches nothing. GPT2LMHeadModel has c_attn, c_fc, c_proj, wpe, wte"),
        ("llama", r"layers\.7.*", r"'layers\\\\.7.*' matches nothing"),
        ("llama", ["q_proj", "lm_head"], "'lm_head' is the head"),
        ("phi3", None, "no usual choice for phi3; name some, or all-linear. Phi3ForCausalLM has down_proj"),
    ],
)
def test_target_modules_that_are_not_there(family: str, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"lora_target_modules: .*{message}"):
        add_adapters(tiny_model(family), lora(targets))


def test_adapters_off_is_the_model_without_them() -> None:
    model = tiny_model("llama")
    before = logits(model)
    add_adapters(model, lora())
    randomise(model)
    with_them = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), with_them)
    assert not torch.equal(with_them, before)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 28


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("logits_bytes", [0, 1 << 30], ids=["linear ops", "logits"])
def test_gradients_are_those_of_plain_pytorch(
    logits_bytes: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOGITS_BYTES", logits_bytes)
    model = tiny_model("llama", torch.float64)
    add_adapters(model, lora())
    randomise(model)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    wanted = torch.autograd.grad(loss, trained)

    set_gradient_checkpointing(model, checkpointing)
    rows, positions = torch.ones(2, 4).nonzero(as_tuple=True)
    policy = PolicyModel(model).train()
    found = policy(IDS, rows, positions, IDS[rows, positions + 1], mask=torch.ones(8).bool(), num_tokens=8)
    found.loss.backward()
    for parameter, gradient in zip(trained, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert policy.head.weight.grad is None


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_peft_transformers_and_us(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    wanted = logits(model)
    save_model(PolicyModel(model), load_tokenizer(folder), tmp_path / "final")
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    final = tmp_path / "final"
    assert torch.equal(logits(with_peft(final)), wanted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(final)), wanted)
    ours = load_causal_lm(final, dtype="float32")
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-5)
    assert not any("lora" in name for name, _ in ours.named_parameters())  # merged: a plain model
    assert load_tokenizer(final).get_vocab() == load_tokenizer(folder).get_vocab()

    export_merged(final, tmp_path / "whole")
    shutil.rmtree(final)
    shutil.rmtree(folder)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), wanted, rtol=0, atol=1e-5
    )
    with pytest.raises(ConfigError, match="whole: is there already"):
        export_merged(tmp_path / "whole", tmp_path / "whole")


def test_adapters_on_adapters_come_with_the_model_between(folder: Path, tmp_path: Path) -> None:
    first = adapted(folder)
    (tmp_path / "first").mkdir()
    save_model(first, load_tokenizer(folder), tmp_path / "first" / "final")
    (tmp_path / "second").mkdir()
    second = adapted(tmp_path / "first" / "final")
    wanted = logits(second)
    save_model(second, None, tmp_path / "second" / "final")
    final = tmp_path / "second" / "final"
    torch.testing.assert_close(logits(with_peft(final)), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load_causal_lm(final, dtype="float32")), wanted, rtol=0, atol=1e-5)

    # A run that is moved aside takes its base with it; another may have taken its place.
    (tmp_path / "second").rename(tmp_path / "second.1")
    torch.testing.assert_close(
        logits(load_causal_lm(tmp_path / "second.1" / "final", dtype="float32")), wanted, rtol=0, atol=1e-5
    )


def test_a_reward_models_head_is_trained_beside_its_adapters(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, load_scalar_model)
    model.config.system_prompt = "Be brief."
    scalar = ScalarModel(model)
    assert scalar.head.weight.requires_grad
    with torch.no_grad():
        scalar.head.weight.add_(0.1)
    wanted = logits(model)
    save_model(scalar, load_tokenizer(folder), tmp_path / "final")
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "final", num_labels=1)
    theirs.config.pad_token_id = 0
    assert torch.equal(logits(theirs), wanted)
    ours = load_scalar_model(tmp_path / "final", dtype="float32")
    torch.testing.assert_close(logits(ours), wanted, rtol=0, atol=1e-5)
    assert ours.config.system_prompt == "Be brief."

    export_merged(tmp_path / "final", tmp_path / "whole")
    torch.testing.assert_close(
        logits(load_scalar_model(tmp_path / "whole", dtype="float32")), wanted, rtol=0, atol=1e-5
    )


def test_a_scalar_model_from_a_policys_adapters_has_a_new_head(folder: Path, tmp_path: Path) -> None:
    policy = adapted(folder)
    save_model(policy, None, tmp_path / "final")
    trunk = load_scalar_model(tmp_path / "final", dtype="float32").base_model
    with torch.no_grad():
        wanted = policy.base_model(IDS).last_hidden_state
        torch.testing.assert_close(trunk(IDS).last_hidden_state, wanted, rtol=0, atol=1e-5)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file)


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda f: edit(f, base_model_name_or_path="gone/model"), r"'gone/model', which is no folder here"),
    "no base named": (lambda f: edit(f, base_model_name_or_path=None), r"is None, which is no folder here"),
    "its own base": (lambda f: edit(f, base_model_name_or_path=str(f)), r"leads back to"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"no adapter_model.safetensors; only safet"),
    "cut short": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"), r"damaged or cut short \(2 bytes\)"),
    "not finite": (spoil, r"NaN or infinity among the weights: model.layers.0.self_attn.q_proj.weight"),
    "other rank": (lambda f: edit(f, r=3), r"cannot be merged into a LlamaForCausalLM: .*size"),
    "more layers": (lambda f: edit(f, target_modules=["q_proj", "k_proj"]), r"missing .*: .*k_proj.lora_A"),
    "fewer layers": (lambda f: edit(f, target_modules=["v_proj"]), r"without a place: .*q_proj.lora_A"),
    "not json": (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config.json:1: not JSON"),
    "unknown kind": (lambda f: edit(f, peft_type="TELEPATHY"), r"cannot be merged.*TELEPATHY"),
}


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_named(case: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    folder = tmp_path / "final"
    save_model(adapted(tmp_path / "model", targets=["q_proj"]), None, folder)
    change, message = WRONG_FOLDERS[case]
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_lm(folder, dtype="float32")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
