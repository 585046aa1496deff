"""samples.jsonl: what the model really said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_fast.tracking.jsonl import JsonLines


class SampleLog:
    """Appends completions to `samples.jsonl`, text in any script byte for byte.

    Args:
        output_dir: the run's folder.
        resume_step: the step that the run continues after; rows of later steps are dropped. 0: a new run, an old file
            is emptied.
    """

    def __init__(self, output_dir: Path, resume_step: int = 0) -> None:
        self._lines = JsonLines(Path(output_dir) / "samples.jsonl", resume_step)

    def log(self, step: int, split: Literal["train", "eval"], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `rows`: prompt (text or messages), completion, score, finish_reason, kl, rewards {name: value}.

        The report puts the "eval" rows of the first and of the last such step side by side.
        """
        first = {"step": step, "split": split}
        self._lines.write(*(first | dict(row) | first for row in rows))

    def close(self) -> None:
        self._lines.close()
