"""The demo's independent measure: nothing here is learned, and PPO is not rewarded for it (weight 0)."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

_WORD = re.compile(r"[a-z0-9à-ÿ'’_]+|[^\sa-z0-9à-ÿ'’_]")


def word_pairs(text: str) -> list[tuple[str, str]]:
    """Neighbouring words of a reply, its start and its end among them; Chinese characters are words."""
    return list(pairwise(["<start>", *_WORD.findall(text.casefold()), "<end>"]))


@cache
def written_by_people(folder: Path) -> frozenset[tuple[str, str]]:
    """Every word pair of every real reply, held-out ones included."""
    pairs: set[tuple[str, str]] = set()
    for name in ("sft_train.jsonl", "sft_eval.jsonl"):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            pairs.update(word_pairs(json.loads(line)["completion"]))
    return frozenset(pairs)


def real_word_pairs(completions: list[str], **columns: Any) -> list[float]:
    """The share of a reply's word pairs that some person in the corpus wrote: 0 to 1.

    $RLHF_FAST_DEMO_DATA is where prepare.py wrote, if not to runs/demo/data.
    """
    real = written_by_people(Path(os.environ.get("RLHF_FAST_DEMO_DATA", "runs/demo/data")))
    shares = []
    for completion in completions:
        pairs = word_pairs(completion)
        shares.append(sum(pair in real for pair in pairs) / len(pairs))
    return shares
