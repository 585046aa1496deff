"""The summary for a terminal: what a run changed, and three replies."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

from rlhf_fast.report.markup import plain
from rlhf_fast.report.run import Run, finite, read_run
from rlhf_fast.report.summary import change_headlines, cost_headlines
from rlhf_fast.tracking.numbers import short

_WIDTH = 100
_PAIRS = 3


def summary_table(output_dir: Path) -> str:
    """A plain-text table of the numbers before and after training, and three held-out prompts with both replies.

    Args:
        output_dir: the run's folder, finished or not.

    Raises:
        DataError: the folder does not exist.
    """
    run = read_run(output_dir)
    rows = [
        (headline.label, headline.before or "", headline.value, headline.note) for headline in change_headlines(run)
    ]
    table = [("", "before", "after", ""), *rows] if rows else []
    widths = [max((_width(row[column]) for row in table), default=0) for column in range(3)]
    lines = [
        "  ".join(
            [_pad(name, widths[0]), _pad(before, widths[1], right=True), _pad(after, widths[2], right=True), note]
        )
        for name, before, after, note in table
    ]
    lines.append(", ".join(f"{cost.label.lower()} {cost.value}" for cost in cost_headlines(run)))
    return "\n".join(line.rstrip() for line in [*lines, *_samples(run)])


def _samples(run: Run) -> list[str]:
    lines: list[str] = []
    for pair in run.pairs()[:_PAIRS]:
        lines += ["", _line("prompt", _prompt_text(pair.prompt), "")]
        for label, row in (("before", pair.before), ("after", pair.after)):
            if row is not None:
                lines.append(_line(label, row.get("completion") or "(empty)", short(finite(row.get("score")))))
    return lines


def _line(label: str, text: str, number: str) -> str:
    room = _WIDTH - 10 - 8
    return f"  {label:<6}  {_pad(_cut(' '.join(plain(text).split()), room), room)}{number:>8}"


def _prompt_text(prompt: Any) -> str:
    """The last turn, of a conversation."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        return str(prompt[-1].get("content", ""))
    return str(prompt)


def _width(text: str) -> int:
    """Columns on a terminal: Chinese characters take two, combining marks none."""
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def _cut(text: str, room: int) -> str:
    if _width(text) <= room:
        return text
    while text and _width(text) > room - 1:
        text = text[: len(text) - max(1, (_width(text) - room) // 2)]
    return text.rstrip() + "…"


def _pad(text: str, width: int, right: bool = False) -> str:
    space = " " * max(0, width - _width(text))
    return space + text if right else text + space
