"""MetricsLogger and its copies."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import ConfigError
from rlhf_fast.tracking import MetricsLogger
from rlhf_fast.tracking.jsonl import read_rows


def logger(folder: Path, resume_step: int = 0, report_to: list[str] | None = None) -> MetricsLogger:
    return MetricsLogger(folder, report_to=report_to or [], run_name=None, config={"seed": 1}, resume_step=resume_step)


def test_one_object_a_line_with_step_first_and_nan_as_null(tmp_path: Path) -> None:
    metrics = logger(tmp_path)
    metrics.log(1, {"loss": float("nan"), "lr": 1e-5, "step": 99})
    # Readable at once by someone who follows the file, before close.
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    metrics.close()
    assert line.startswith('{"step": 1, "loss": null, "lr": 1e-05, "time/wall": ')
    assert json.loads(line)["time/wall"] >= 0


def test_resume_drops_later_rows_and_the_clock_goes_on(tmp_path: Path) -> None:
    first = logger(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": step, "time/wall": 100.0 * step})
    first.warn(0, "3 rows skipped")
    first.close()
    second = logger(tmp_path, resume_step=3)
    second.log(4, {"loss": 40})
    second.close()
    rows, _ = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert 300 <= rows[-1]["time/wall"] < 310
    events, _ = read_rows(tmp_path / "events.jsonl")
    assert [(event["step"], event["event"]) for event in events] == [(0, "start"), (0, "warning"), (3, "start")]
    assert {"python", "torch", "transformers", "cpu"} <= set(events[0]["versions"])


def test_tensorboard_shows_the_resumed_values_only(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = logger(tmp_path, report_to=["tensorboard"])
    for step in range(1, 6):
        first.log(step, {"loss": float("inf") if step == 2 else step})
    first.close()
    second = logger(tmp_path, resume_step=3, report_to=["tensorboard"])
    second.log(4, {"loss": 40.0})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (3, 3.0), (4, 40.0)]


def test_missing_wandb_says_what_to_install_and_spares_the_old_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = logger(tmp_path)
    first.log(1, {"loss": 1.0})
    first.close()
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError, installed or not
    with pytest.raises(ConfigError, match="pip install wandb"):
        logger(tmp_path, report_to=["wandb"])
    assert len(read_rows(tmp_path / "metrics.jsonl")[0]) == 1


def test_wandb_gets_finite_values_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb is an extra that the tests do without; this stands in for its three calls."""
    calls: list[Any] = []

    class FakeRun:
        id = "abc123"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, sorted(values)))

        def finish(self) -> None:
            calls.append("finish")

    def init(**arguments: Any) -> FakeRun:
        calls.append((arguments["id"], arguments["name"], arguments["config"]))
        return FakeRun()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume_step in (0, 1):
        metrics = logger(tmp_path / "myrun", resume_step, report_to=["wandb"])
        metrics.log(resume_step + 1, {"loss": float("nan"), "lr": 0.1})
        metrics.close()
    assert calls[:3] == [(None, "myrun", {"seed": 1}), (1, ["lr", "time/wall"]), "finish"]
    assert calls[3:] == [("abc123", "myrun", {"seed": 1}), (2, ["lr", "time/wall"]), "finish"]


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mlflow' is not known"):
        logger(tmp_path, report_to=["mlflow"])
