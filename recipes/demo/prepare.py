"""Data, tokenizer and fresh model of the demo, from the real dialogues of chatterbot-corpus (BSD-3-Clause).

    python recipes/demo/prepare.py --output_dir runs/demo

writes data/{sft,preference,prompts}_{train,eval}.jsonl and base/, a small Llama with random weights. Same inputs, same
bytes. Held out are whole groups of dialogues that share a prompt or a reply, so that neither is ever trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import yaml

HELD_OUT_PROMPTS = {"english": 120, "chinese": 90}
LARGEST_HELD_OUT_GROUP = 4  # pairs; greetings and jokes, which share their replies, are one large group each
NOT_DIALOGUE = {"coding", "trivia"}  # programs and facts: nothing that a model of a million weights could know
ALTERNATIVES = {("english", "emotion"), ("english", "computers")}  # a prompt and several replies to it, no dialogue
MAX_WORDS = 36  # of a prompt or reply; of Chinese, characters
VOCABULARY = 2000
SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


Row = dict[str, str]


class Pair(NamedTuple):
    """Two turns that a person wrote one after the other."""

    language: str
    prompt: str
    reply: str


# ---- the corpus -----------------------------------------------------------------------------------------------------


def corpus_folder() -> Path:
    """Where chatterbot-corpus keeps its YAML; exits with what to install when it is absent."""
    spec = find_spec("chatterbot_corpus")
    if spec is None or spec.origin is None:
        sys.exit(
            "prepare.py: the package chatterbot-corpus is missing. Install it: "
            f"{sys.executable} -m pip install chatterbot-corpus"
        )
    return Path(spec.origin).parent / "data"


def key(text: str) -> str:
    """What two texts have in common when they differ only in case, width, white space and punctuation."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).casefold())


def conversations(folder: Path, language: str) -> Iterator[tuple[str, list[str]]]:
    """(category, turns) of every conversation; the corpus has a few that are a bare string, left out."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where PyYAML has libyaml
    for file in sorted((folder / language).glob("*.yml")):
        for turns in yaml.load(file.read_text(encoding="utf-8"), loader)["conversations"]:
            if isinstance(turns, list):
                yield file.stem, [" ".join(str(turn).split()) for turn in turns]


def read_pairs(folder: Path, language: str) -> list[Pair]:
    """Every prompt with its reply, once; pairs that echo the prompt, or are empty or long, are left out."""
    pairs: dict[tuple[str, str], Pair] = {}
    for category, turns in conversations(folder, language):
        if category in NOT_DIALOGUE:
            continue
        before = turns[:1] * len(turns) if (language, category) in ALTERNATIVES else turns
        for prompt, reply in zip(before, turns[1:], strict=False):
            names = key(prompt), key(reply)
            usable = all(names) and names[0] != names[1] and max(len(words(prompt)), len(words(reply))) <= MAX_WORDS
            if usable:
                pairs.setdefault(names, Pair(language, prompt, reply))
    return list(pairs.values())


def extra_prompts(folder: Path, language: str) -> list[str]:
    """Questions of the trivia category: real prompts for PPO, which needs no replies."""
    turns = (turns for category, turns in conversations(folder, language) if category == "trivia")
    return [prompt for prompt, *_ in turns if key(prompt) and len(words(prompt)) <= MAX_WORDS]


def split(pairs: Sequence[Pair], quota: dict[str, int], rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): pairs that share a prompt or a reply stay together. quota: held-out prompts per language."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for pair in pairs:
        parent[root(key(pair.prompt))] = root(key(pair.reply))
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[root(key(pair.prompt))].append(pair)

    train: list[Pair] = []
    held_out: list[Pair] = []
    prompts: dict[str, set[str]] = {language: set() for language in quota}
    for group in rng.sample(list(groups.values()), len(groups)):
        language = group[0].language
        if len(prompts[language]) < quota[language] and len(group) <= LARGEST_HELD_OUT_GROUP:
            held_out += group
            prompts[language] |= {key(pair.prompt) for pair in group}
        else:
            train += group
    return train, held_out


# ---- preferences: a reply as a person wrote it, and the same one damaged --------------------------------------------

_WORD = re.compile(r"\s*(?:[A-Za-z0-9À-ÿ'’_]+|[^\sA-Za-z0-9À-ÿ'’_])")
_ENDING = re.compile(r"[\s.!?。！？…\"”」]*$")


def words(text: str) -> list[str]:
    """Words with the space before them; Chinese characters and marks are words of their own."""
    return _WORD.findall(text)


def joined(parts: Iterable[str]) -> str:
    """Words without their spaces, put together again: a space before a Latin word that follows one or a mark."""
    text = ""
    for part in parts:
        if text and re.match(r"[A-Za-z0-9À-ÿ]", part) and re.match(r"[A-Za-z0-9À-ÿ,.!?;:'’)]", text[-1]):
            text += " "
        text += part
    return text


def body_and_ending(text: str) -> tuple[list[str], str]:
    """Words, and the closing marks, which stay in place: damage must not be told by a missing full stop."""
    end = _ENDING.search(text)
    assert end is not None  # it matches the empty string too
    return words(text[: end.start()]), text[end.start() :]


def shuffled(reply: str, rng: random.Random) -> str | None:
    """The same words in another order."""
    body, ending = body_and_ending(reply)
    stripped = [word.strip() for word in body]
    if len(stripped) < 3:
        return None
    for _ in range(20):
        order = rng.sample(stripped, len(stripped))
        if sum(a != b for a, b in zip(order, stripped, strict=True)) >= 0.6 * len(order):
            return joined(order) + ending
    return None


def cut_off(reply: str, rng: random.Random) -> str | None:
    """The first 20-75% of the words; one time in three as if that were all, with the closing marks."""
    parts = words(reply)
    starts = [i for i, part in enumerate(parts) if key(part)]
    if len(starts) < 3:
        return None
    kept = rng.randrange(max(1, len(starts) // 5), max(2, math.ceil(0.75 * len(starts))))
    start = "".join(parts[: starts[kept]]).rstrip(" ,;:、，-")
    return start + rng.choice(["", "", body_and_ending(reply)[1]])


def stuttering(reply: str, rng: random.Random) -> str | None:
    """One to four words said three or four times."""
    body, ending = body_and_ending(reply)
    if len(body) < 2:
        return None
    length = rng.randint(1, min(4, len(body)))
    start = rng.randrange(len(body) - length + 1)
    span = [part.strip() for part in body[start : start + length]]
    times = 1 + rng.randint(2, 3)
    before, after = ([part.strip() for part in side] for side in (body[:start], body[start + length :]))
    return joined([*before, *span * times, *after]) + ending


def mixed_up(reply: str, rng: random.Random, pool: Sequence[str]) -> str | None:
    """30-60% of the words replaced by words from other replies, of either language."""
    body, ending = body_and_ending(reply)
    places = [i for i, part in enumerate(body) if key(part)]
    if len(places) < 2:
        return None
    for i in rng.sample(places, max(1, round(len(places) * rng.uniform(0.3, 0.6)))):
        space = body[i][: len(body[i]) - len(body[i].lstrip())]
        body[i] = space + rng.choice(pool)
    return "".join(body) + ending


def preferences(pairs: Sequence[Pair], kinds: int, rng: random.Random) -> Iterator[Row]:
    """Chosen is what the person wrote; rejected is that damaged, in up to `kinds` of the five ways."""
    pool = [part.strip() for pair in pairs for part in words(pair.reply) if key(part)]
    replies = {language: [pair.reply for pair in pairs if pair.language == language] for language in HELD_OUT_PROMPTS}
    for pair in pairs:
        other = "chinese" if pair.language == "english" else "english"
        damaged: dict[str, str | None] = {
            "shuffled": shuffled(pair.reply, rng),
            "cut off": cut_off(pair.reply, rng),
            "stuttering": stuttering(pair.reply, rng),
            "mixed up": mixed_up(pair.reply, rng, pool),
            "other language": rng.choice(replies[other]),
        }
        possible = [(kind, text) for kind, text in damaged.items() if text is not None and key(text) != key(pair.reply)]
        for kind, rejected in rng.sample(possible, min(kinds, len(possible))):
            yield {"prompt": pair.prompt, "chosen": pair.reply, "rejected": rejected, "damage": kind}


# ---- tokenizer and model --------------------------------------------------------------------------------------------


def make_base(texts: Sequence[str], folder: Path, seed: int) -> int:
    """Train a byte-level BPE tokenizer on the texts, make a Llama with random weights; returns its size."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any text has an encoding
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,  # untied it learns faster by heart, and the reward model generalises worse
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


# ---- the files ------------------------------------------------------------------------------------------------------


def write_rows(file: Path, rows: Iterable[Row]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def prompt_rows(prompts: Iterable[tuple[str, str]]) -> list[Row]:
    """Each prompt once. The language is a column of its own: reward functions are given it."""
    rows: dict[str, Row] = {}
    for language, prompt in prompts:
        rows.setdefault(key(prompt), {"prompt": prompt, "language": language})
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Data, tokenizer and fresh model of the demo.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the split, the damage and the weights")
    args = parser.parse_args()

    folder, rng = corpus_folder(), random.Random(args.seed)
    pairs = [pair for language in HELD_OUT_PROMPTS for pair in read_pairs(folder, language)]
    train, held_out = split(pairs, HELD_OUT_PROMPTS, rng)
    extra = [(language, prompt) for language in HELD_OUT_PROMPTS for prompt in extra_prompts(folder, language)]
    rng.shuffle(train)
    rng.shuffle(held_out)
    kept_apart = {key(text) for pair in held_out for text in (pair.prompt, pair.reply)}
    extra = [(language, prompt) for language, prompt in extra if key(prompt) not in kept_apart]

    data: Path = args.output_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    for part, pairs, kinds, more in (("train", train, 5, extra), ("eval", held_out, 2, [])):
        rows = {
            "sft": [{"prompt": pair.prompt, "completion": pair.reply} for pair in pairs],
            "preference": list(preferences(pairs, kinds, rng)),
            "prompts": prompt_rows([(pair.language, pair.prompt) for pair in pairs] + more),
        }
        for name, content in rows.items():
            counts[f"{name}_{part}"] = write_rows(data / f"{name}_{part}.jsonl", content)
    size = make_base([text for pair in train for text in pair[1:]], args.output_dir / "base", args.seed)

    for name, pairs in (("training", train), ("held out", held_out)):
        languages = Counter(pair.language for pair in pairs)
        print(f"{name:9}", ", ".join(f"{count} {language} pairs" for language, count in languages.items()))
    print(f"{data}/:", ", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"{args.output_dir / 'base'}/: a Llama of {size:,} weights, {VOCABULARY} tokens")


if __name__ == "__main__":
    main()
