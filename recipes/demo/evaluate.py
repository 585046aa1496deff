"""Before and after PPO on held-out prompts, with nothing but transformers: are the demo's claims true of its files?

    python recipes/demo/evaluate.py --output_dir runs/demo

samples from sft/final and ppo/final with `generate`, scores both with reward/final and with measures that were not
optimised, prints a table and writes evaluation.json. Exit status 1 if the learned reward rose by no more than two
standard errors, or if the reward model is right on less than 75% of the held-out pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, logging

from rlhf_fast.rewards import load_reward
from rlhf_fast.tracking import distinct_n

NEEDED_ACCURACY = 0.75
NEEDED_ERRORS = 2.0  # standard errors of the gain


def read(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=False)]


@torch.inference_mode()
def sample(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, seed: int) -> list[Tensor]:
    """One completion a prompt at temperature 1, up to and with its EOS: token ids, int64, [length]."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        [chat(prompt) for prompt in prompts],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    inputs.pop("token_type_ids", None)
    rows = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=max_new_tokens)
    completions = []
    for row in rows[:, inputs["input_ids"].shape[1] :]:
        ends = (row == tokenizer.eos_token_id).nonzero()
        completions.append(row[: int(ends[0]) + 1] if len(ends) else row)
    return completions


@torch.inference_mode()
def learned_reward(model: Any, tokenizer: Any, prompts: Sequence[str], replies: Sequence[str]) -> Tensor:
    """The reward model's scores, float32, [number of replies]."""
    tokenizer.padding_side = "right"
    scores = []
    for start in range(0, len(replies), 64):
        part = slice(start, start + 64)
        inputs = tokenizer.apply_chat_template(
            [chat(*turns) for turns in zip(prompts[part], replies[part], strict=True)],
            return_dict=True,
            return_tensors="pt",
            padding=True,
        )
        inputs.pop("token_type_ids", None)
        scores.append(model(**inputs).logits[:, 0])
    return torch.cat(scores)


@torch.inference_mode()
def sequence_logprobs(model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[Tensor]) -> Tensor:
    """Log-probability of each whole completion, [number of completions]."""
    heads = tokenizer.apply_chat_template([chat(prompt) for prompt in prompts], add_generation_prompt=True)["input_ids"]
    sums = []
    for start in range(0, len(heads), 64):
        rows = [(torch.tensor(head), row) for head, row in zip(heads, completions, strict=True)][start : start + 64]
        # Padding on the right: what comes after a token does not change it.
        inputs = pad_sequence([torch.cat(row) for row in rows], batch_first=True)
        logprobs = model(input_ids=inputs).logits[:, :-1].log_softmax(-1).gather(2, inputs[:, 1:, None])[:, :, 0]
        for (head, completion), row in zip(rows, logprobs, strict=True):
            sums.append(row[len(head) - 1 : len(head) - 1 + len(completion)].sum())
    return torch.stack(sums)


def pair_accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Share of held-out pairs with the chosen reply ahead: of all, and of each kind of damage."""
    prompts = [row["prompt"] for row in rows]
    chosen = learned_reward(model, tokenizer, prompts, [row["chosen"] for row in rows])
    rejected = learned_reward(model, tokenizer, prompts, [row["rejected"] for row in rows])
    right: dict[str, list[bool]] = defaultdict(list)
    for row, ahead in zip(rows, (chosen > rejected).tolist(), strict=True):
        right["all"].append(ahead)
        right[row["damage"]].append(ahead)
    return {name: sum(ahead) / len(ahead) for name, ahead in right.items()}


def standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description="Before and after PPO on held-out prompts.")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--samples", type=int, default=2, help="completions of each prompt")
    parser.add_argument("--max_new_tokens", type=int, default=24, help="as in ppo.yaml")
    args = parser.parse_args()
    run: Path = args.output_dir
    os.environ["RLHF_FAST_DEMO_DATA"] = str(run / "data")
    real_word_pairs = load_reward(f"{Path(__file__).with_name('rewards.py')}:real_word_pairs")
    torch.set_num_threads(1)  # so small a model gains nothing from more, and on a busy machine they wait for each other
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(run / "reward/final")
    judge = AutoModelForSequenceClassification.from_pretrained(run / "reward/final", num_labels=1).eval()
    rows = read(run / "data/prompts_eval.jsonl")
    prompts = [row["prompt"] for row in rows] * args.samples
    chinese = [row["language"] == "chinese" for row in rows] * args.samples
    known = {" ".join(row["completion"].split()) for row in read(run / "data/sft_train.jsonl")}

    accuracy = pair_accuracy(judge, tokenizer, read(run / "data/preference_eval.jsonl"))
    measures: dict[str, dict[str, float]] = {}
    reward: dict[str, Tensor] = {}
    real: dict[str, Tensor] = {}
    texts: dict[str, list[str]] = {}
    models = {
        name: AutoModelForCausalLM.from_pretrained(run / f"{name}/final", dtype=torch.float32).eval()
        for name in ("sft", "ppo")
    }
    for name, model in models.items():
        completions = sample(model, tokenizer, prompts, args.max_new_tokens, seed=0)
        replies = texts[name] = [tokenizer.decode(row, skip_special_tokens=True) for row in completions]
        # Rows are prompt by prompt within each round of samples: a prompt's mean is one observation.
        scores = learned_reward(judge, tokenizer, prompts, replies)
        reward[name] = scores.view(args.samples, -1).mean(0)
        real[name] = real_word_pairs.score(prompts, replies).total.view(args.samples, -1).mean(0)
        ended = [bool(row[-1] == tokenizer.eos_token_id) for row in completions]
        ratio = sequence_logprobs(model, tokenizer, prompts, completions)
        ratio = ratio - sequence_logprobs(models["sft"], tokenizer, prompts, completions)
        measures[name] = {
            "learned reward (optimised)": float(scores.mean()),
            "real word pairs": float(real[name].mean()),
            "in the prompt's language": _mean([_is_chinese(a) == b for a, b in zip(replies, chinese, strict=True)]),
            "came to an end": _mean(ended),
            "distinct-2": distinct_n(replies, 2),
            "different replies": len(set(replies)) / len(replies),
            "a training reply, word for word": _mean([" ".join(reply.split()) in known for reply in replies]),
            "tokens a reply": _mean([len(row) for row in completions]),
            "KL to SFT, nats a reply": float(ratio.mean()),
        }

    gain, error = reward["ppo"] - reward["sft"], standard_error(reward["ppo"] - reward["sft"])
    gain_real = real["ppo"] - real["sft"]
    print(f"\nHeld-out prompts: {len(rows)}, completions of each model: {len(prompts)} (transformers, temperature 1)\n")
    print(f"{'':34}{'SFT':>8}{'PPO':>8}")
    for measure in measures["sft"]:
        print(f"{measure:34}{measures['sft'][measure]:8.3f}{measures['ppo'][measure]:8.3f}")
    written = read(run / "data/sft_eval.jsonl")
    people = learned_reward(
        judge, tokenizer, [row["prompt"] for row in written], [row["completion"] for row in written]
    )
    variety = distinct_n([row["completion"] for row in written], 2)
    print(f"\nWhat people replied: learned reward {float(people.mean()):.3f}, distinct-2 {variety:.3f}")
    print(f"\nlearned reward  {float(gain.mean()):+.3f}, standard error {error:.3f}")
    print(f"real word pairs {float(gain_real.mean()):+.3f}, standard error {standard_error(gain_real):.3f}")
    print(
        "\nReward model right on held-out pairs:", ", ".join(f"{name} {share:.1%}" for name, share in accuracy.items())
    )
    print()
    for i in range(0, len(rows), len(rows) // 8):
        print(f"{prompts[i]}\n    SFT: {texts['sft'][i]}\n    PPO: {texts['ppo'][i]}")

    passed = float(gain.mean()) > NEEDED_ERRORS * error and accuracy["all"] >= NEEDED_ACCURACY
    result = {
        "prompts": len(rows),
        "completions": len(prompts),
        "sft": measures["sft"],
        "ppo": measures["ppo"],
        "gain": float(gain.mean()),
        "gain_standard_error": error,
        "gain_real_word_pairs": float(gain_real.mean()),
        "gain_real_word_pairs_standard_error": standard_error(gain_real),
        "people": {"learned reward": float(people.mean()), "distinct-2": variety},
        "reward_model_accuracy": accuracy,
        "passed": passed,
    }
    (run / "evaluation.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{run / 'evaluation.json'}; curves and completions side by side: {run / 'ppo/report.html'}")
    if not passed:
        print(
            f"evaluate.py: not shown: needs a gain above {NEEDED_ERRORS:g} standard errors and a reward model right on "
            f"{NEEDED_ACCURACY:.0%} of held-out pairs",
            file=sys.stderr,
        )
    return 0 if passed else 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


if __name__ == "__main__":
    sys.exit(main())
