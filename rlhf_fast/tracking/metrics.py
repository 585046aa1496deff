"""metrics.jsonl, the truth about a run, and its copies in TensorBoard and Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_fast.errors import ConfigError
from rlhf_fast.tracking.jsonl import JsonLines, json_value, read_rows
from rlhf_fast.tracking.versions import versions


class MetricsLogger:
    """Writes one JSON object a step to `metrics.jsonl` and passes it on to TensorBoard and wandb.

    It also keeps `events.jsonl`: one row each time the run starts or resumes (with the versions it runs on) and one
    for each warning; the report reads both.

    Args:
        output_dir: the run's folder; TensorBoard's files go to `tensorboard/` in it, wandb's to `wandb/`.
        report_to: any of "tensorboard", "wandb".
        run_name: name in wandb; None: the folder's name.
        config: the whole configuration, for wandb.
        resume_step: the step that the run continues after; rows of later steps and a line cut off by a crash are
            dropped, and TensorBoard hides its own. 0: a new run, old files are emptied.

    Raises:
        ConfigError: a name in `report_to` is unknown, its package is not installed, or wandb refuses to start.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        report_to: Sequence[str],
        run_name: str | None,
        config: Mapping[str, Any],
        resume_step: int = 0,
    ) -> None:
        output_dir = Path(output_dir)
        unknown = set(report_to) - {"tensorboard", "wandb"}
        if unknown:
            raise ConfigError(f"report_to: {sorted(unknown)[0]!r} is not known; use tensorboard, wandb, or neither: []")
        # Before any file is opened: what cannot start must not have emptied an old run's metrics.
        name = run_name or output_dir.resolve().name
        self._wandb = _wandb(output_dir, name, config, resume_step) if "wandb" in report_to else None
        self._tensorboard = _tensorboard(output_dir, resume_step) if "tensorboard" in report_to else None
        self._lines = JsonLines(output_dir / "metrics.jsonl", resume_step)
        self._events = JsonLines(output_dir / "events.jsonl", resume_step)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._events.write({"step": resume_step, "event": "start", "time": now, "versions": versions()})
        rows, _ = read_rows(output_dir / "metrics.jsonl")
        before = rows[-1].get("time/wall") if rows else None
        self._started = time.monotonic() - (before or 0.0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write `metrics` as step `step`'s row: step first, then in the given order; a value that is NaN or infinite
        is written as null and left out of the other two. `time/wall` is added: seconds of training until now, resumed
        sessions included.
        """
        row = {**metrics, "time/wall": metrics.get("time/wall", round(time.monotonic() - self._started, 3))}
        row.pop("step", None)
        row = json_value(row)
        self._lines.write({"step": step, **row})
        finite = {name: value for name, value in row.items() if value is not None}
        if self._tensorboard is not None:
            for name, value in finite.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def warn(self, step: int, message: str) -> None:
        """Keep a warning for the report, such as skipped rows of the data. Nothing is printed."""
        self._events.write({"step": step, "event": "warning", "message": message})

    def close(self) -> None:
        self._lines.close()
        self._events.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _tensorboard(output_dir: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "report_to asks for tensorboard, which is not installed: pip install tensorboard, or set report_to=[]"
        ) from error
    # TensorBoard hides what older files in the folder say from purge_step on.
    return SummaryWriter(str(output_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else 0)


def _wandb(output_dir: Path, name: str, config: Mapping[str, Any], resume_step: int) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "report_to asks for wandb, which is not installed: pip install wandb, or set report_to=[]"
        ) from error
    # wandb ignores steps that it has seen, so a resumed run of the same id goes on where the first one was cut.
    id_file = output_dir / "wandb" / "run_id"
    id_file.parent.mkdir(parents=True, exist_ok=True)
    run_id = id_file.read_text().strip() if resume_step and id_file.exists() else None
    try:
        run = wandb.init(
            project="rlhf_fast", name=name, config=dict(config), dir=str(output_dir), id=run_id, resume="allow"
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"wandb could not start ({error}); run `wandb login`, set WANDB_MODE=offline, or set report_to=[]"
        ) from error
    id_file.write_text(run.id)
    return run
