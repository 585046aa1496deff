"""Looks a model folder over before transformers reads it, so that every problem has a plain message.

transformers would download what is missing, run pickles, initialise missing weights at random or fail deep inside.
Nothing here touches the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_fast.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's names
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_BASE = "base"  # beside a folder of adapters: the model they belong to, where that was in no folder before
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def existing_folder(path: str | Path) -> Path:
    """The folder, made sure to exist. Raises ModelError."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{folder}: is a file; a model is a folder with config.json and *.safetensors in it.")
    raise ModelError(
        f"{folder}: no such folder. Models are read from disk; names of hub models are not downloaded. "
        f"Fetch it first, for example: hf download {path} --local-dir models/{folder.name}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError with the place of the mistake."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}:{error.lineno}: not JSON: {error.msg}. Copy or download the file again.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds a {type(value).__name__}, a JSON object was expected.")
    return value


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds PEFT's adapters to another folder's model."""
    return (folder / ADAPTER_CONFIG).exists()


def with_bases(folder: Path) -> list[Path]:
    """[the folder] of a whole model; of adapters [the model they belong to, ..., the folder]. Raises ModelError."""
    chain = [folder]
    while is_adapter(chain[0]):
        file = chain[0] / ADAPTER_CONFIG
        base = read_json(file).get("base_model_name_or_path")
        beside = chain[0].resolve().parent / ADAPTER_BASE
        if isinstance(base, str) and Path(base).name == ADAPTER_BASE and beside.is_dir():
            base = str(beside)  # also where both have been moved
        if not isinstance(base, str) or not Path(base).is_dir():
            raise ModelError(
                f"{file}: base_model_name_or_path is {base!r}, which is no folder here. These are adapters, no whole "
                "model: fetch the model that they were trained on, and write its folder there."
            )
        if Path(base).resolve() in [known.resolve() for known in chain]:
            raise ModelError(f"{file}: base_model_name_or_path leads back to {base}.")
        chain.insert(0, Path(base))
    return chain


def scores_sequences(folder: Path) -> bool:
    """Whether it is a reward model's folder, rather than a language model's. Raises ModelError."""
    if is_adapter(folder):
        return read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
    return any("ForSequenceClassification" in name for name in read_config(folder).get("architectures") or [])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that can be trained: not quantised. Raises ModelError."""
    file = folder / "config.json"
    if not file.exists():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder. It holds: {_listing(folder)}.")
    config = read_json(file)
    if config.get("quantization_config"):
        raise ModelError(
            f"{file}: the weights are quantised (quantization_config), which cannot be trained. "
            "Dequantise the model and save it in float32 or bfloat16."
        )
    return config


def check_weights(folder: Path) -> None:
    """All safetensors files are there and whole. Raises ModelError."""
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = _shards(folder)
    else:
        raise ModelError(_no_weights(folder))
    for file in files:
        _check_safetensors(file)


def check_adapter_weights(folder: Path) -> None:
    """The file of the adapters is there and whole. Raises ModelError."""
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise ModelError(
            f"{folder}: no {ADAPTER_WEIGHTS}; only safetensors are read. The folder holds: {_listing(folder)}."
        )
    _check_safetensors(folder / ADAPTER_WEIGHTS)


def has_tokenizer_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def check_tokenizer_files(folder: Path) -> None:
    """The folder holds a tokenizer. Raises ModelError."""
    if not has_tokenizer_files(folder):
        raise ModelError(
            f"{folder}: no tokenizer (tokenizer.json, tokenizer_config.json). Save it there with "
            f"tokenizer.save_pretrained. The folder holds: {_listing(folder)}."
        )


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: has no weight_map. Copy or download the file again.")
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder}: {INDEX} names {len(names)} files, of which {len(missing)} are missing: {some(missing)}. "
            "Copy or download them again."
        )
    return [folder / name for name in names]


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):  # reads the header and compares it with the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: damaged or cut short ({file.stat().st_size:,} bytes): {error}. Copy or download it again."
        ) from error


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return (
            f"{folder}: the weights are pickles (pytorch_model.bin), which can run any code when loaded, so only "
            'safetensors are read. If you trust them, convert once: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}', use_safetensors=False)"
            f".save_pretrained('{folder}-safetensors')\", then copy the tokenizer's files there too."
        )
    if any(folder.glob("*.gguf")):
        return (
            f"{folder}: holds a GGUF file. Dequantise it once: AutoModelForCausalLM.from_pretrained(folder, "
            "gguf_file=name).save_pretrained(other_folder), the same for AutoTokenizer."
        )
    return f"{folder}: no {WEIGHTS} and no {INDEX}. The folder holds: {_listing(folder)}."


def _listing(folder: Path) -> str:
    return some(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def some(names: list[str], limit: int = 8) -> str:
    """The first few names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
