"""samples.jsonl."""

from __future__ import annotations

from pathlib import Path

from rlhf_fast.tracking import SampleLog
from rlhf_fast.tracking.jsonl import read_rows


def test_rows_have_step_and_split_first_and_resume_drops_the_rest(tmp_path: Path) -> None:
    first = SampleLog(tmp_path)
    first.log(
        0, "eval", [{"prompt": [{"role": "user", "content": "你好"}], "completion": "مرحبا", "score": float("nan")}]
    )
    first.log(1, "train", [{"prompt": "a", "completion": "b", "score": 1.0, "step": 7}])
    first.log(2, "train", [{"prompt": "c", "completion": "d", "score": 2.0}])
    first.close()
    second = SampleLog(tmp_path, resume_step=1)
    second.log(2, "eval", [])
    second.close()
    rows, bad = read_rows(tmp_path / "samples.jsonl")
    assert bad == 0
    assert [list(row)[:2] for row in rows] == [["step", "split"]] * 2
    assert rows[0] == {
        "step": 0,
        "split": "eval",
        "prompt": [{"role": "user", "content": "你好"}],
        "completion": "مرحبا",
        "score": None,
    }
    assert rows[1] == {"step": 1, "split": "train", "prompt": "a", "completion": "b", "score": 1.0}
