"""What the model said to the same prompts before and after training, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_fast.report.markup import esc, number
from rlhf_fast.report.run import Pair, Run, finite

_OPEN = 8  # pairs shown at once
_MOST = 200  # pairs in the page
_ROLLOUTS = 8  # rows shown of a run without evaluation


def completions(run: Run) -> str:
    """The section's HTML; "" if the run wrote no samples."""
    pairs = run.pairs()
    if not pairs:
        return _rollouts(run)
    steps = run.eval_steps()
    shown = [_pair(pair, steps) for pair in pairs[:_MOST]]
    hidden = "".join(shown[_OPEN:])
    rest = f"<details><summary>{len(shown) - _OPEN} more</summary>{hidden}</details>" if hidden else ""
    return f'<p class="note">{esc(_intro(pairs, steps))}</p>{"".join(shown[:_OPEN])}{rest}'


def _intro(pairs: list[Pair], steps: list[int]) -> str:
    text = f"{len(pairs):,} held-out prompts in the order of the data, none picked"
    if len(pairs) > _MOST:
        text += f"; the first {_MOST} are here, all are in samples.jsonl"
    if len(steps) == 1:
        return f"{text}. So far answered at step {steps[0]:,} only."
    scores = [(_score(pair.before), _score(pair.after)) for pair in pairs]
    changes = [after - before for before, after in scores if before is not None and after is not None]
    higher, lower = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    same = f", {len(changes) - higher - lower:,} the same" if len(changes) > higher + lower else ""
    return f"{text}. After training {higher:,} score higher, {lower:,} lower{same}."


def _pair(pair: Pair, steps: list[int]) -> str:
    sides = [_side("before" if steps[0] == 0 else "first", steps[0], pair.before)]
    if len(steps) > 1:
        sides.append(_side("after", steps[-1], pair.after))
    return f'<article class="pair">{_prompt(pair.prompt)}<div class="sides">{"".join(sides)}</div></article>'


def _prompt(prompt: Any) -> str:
    """Text, or the turns of a conversation with who says them."""
    turns = prompt if isinstance(prompt, list) else [{"role": "prompt", "content": prompt}]
    turns = [turn if isinstance(turn, Mapping) else {"content": turn} for turn in turns]
    lines = "".join(
        f'<div><span class="role">{esc(turn.get("role", ""))}</span>'
        f'<div class="text" dir="auto">{esc(turn.get("content", ""))}</div></div>'
        for turn in turns
    )
    return f'<div class="prompt">{lines}</div>'


def _side(label: str, step: int, row: dict[str, Any] | None) -> str:
    head = f'<span class="when">{label} <span class="step">step {step:,}</span></span>'
    if row is None:
        return (
            f'<div class="side"><p class="meta">{head}</p><p class="missing">no completion in samples.jsonl</p></div>'
        )
    text = row.get("completion")
    said = f'<div class="text" dir="auto">{esc(text)}</div>' if text else '<p class="missing">(empty)</p>'
    return f'<div class="side"><p class="meta">{head}{_meta(row)}</p>{said}</div>'


def _meta(row: dict[str, Any]) -> str:
    parts = row.get("rewards")
    numbers = {"score": row.get("score"), "KL": row.get("kl")} | (dict(parts) if isinstance(parts, Mapping) else {})
    known = {name: value for name, value in numbers.items() if finite(value) is not None}
    if len(known) > 1 and isinstance(parts, Mapping) and len(parts) == 1 and finite(row.get("score")) is not None:
        known.pop(next(iter(parts)))  # the only part is the score
    shown = "".join(f"<span>{esc(name)} <b>{number(finite(value))}</b></span>" for name, value in known.items())
    return shown + ("<span>cut off</span>" if row.get("finish_reason") == "length" else "")


def _rollouts(run: Run) -> str:
    """Without an evaluation: the latest training rollouts."""
    rows = [row for row in run.samples if row.get("split") == "train"][-_ROLLOUTS:]
    shown = "".join(
        f'<article class="pair">{_prompt(row.get("prompt"))}<div class="sides">'
        f"{_side('rollout', row['step'], row)}</div></article>"
        for row in rows
    )
    return f'<p class="note">No held-out prompts; these are the latest rollouts.</p>{shown}' if shown else ""


def _score(row: dict[str, Any] | None) -> float | None:
    return finite(row.get("score")) if row else None
