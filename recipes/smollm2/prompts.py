"""What people say first in chatterbot-corpus (English, BSD-3-Clause): prompts to train on, and others held out.

    python recipes/smollm2/prompts.py --output_dir runs/smollm2

writes data/prompts_{train,eval}.jsonl. Same corpus, same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import yaml

HELD_OUT = 128
MAX_WORDS = 30
NOT_DIALOGUE = {"coding"}  # programs


def corpus_folder() -> Path:
    """The corpus's English YAML; exits with what to install when it is absent."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        sys.exit(
            "prompts.py: the package chatterbot-corpus is missing. Install it: "
            f"{sys.executable} -m pip install chatterbot-corpus"
        )
    return Path(spec.origin).parent / "data" / "english"


def key(text: str) -> str:
    """What two texts have in common when they differ only in case, white space and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def read_prompts(folder: Path) -> list[dict[str, str]]:
    """The first turn of every conversation, once, with its category: reward functions are given that, too."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML has libyaml
    rows: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*.yml")):
        if file.stem in NOT_DIALOGUE:
            continue
        for turns in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            if not isinstance(turns, list):  # the corpus has a few that are a bare string
                continue
            prompt = " ".join(str(turns[0]).split())
            if key(prompt) and len(prompt.split()) <= MAX_WORDS:
                rows.setdefault(key(prompt), {"prompt": prompt, "category": file.stem})
    return list(rows.values())


def split(rows: list[dict[str, str]], held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, held out): no row is in both."""
    shuffled = random.Random(seed).sample(rows, len(rows))
    return shuffled[held_out:], shuffled[:held_out]


def main() -> None:
    parser = argparse.ArgumentParser(description="Prompts of the SmolLM2 demo.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    args = parser.parse_args()

    data: Path = args.output_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    train, held_out = split(read_prompts(corpus_folder()), HELD_OUT, args.seed)
    for name, rows in (("train", train), ("eval", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (data / f"prompts_{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{data}/: {len(train)} prompts to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
