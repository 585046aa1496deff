"""A run: its folder, its steps, and what must survive a crash.

What the three trainers share and no method needs to know: where things are written, when to evaluate, when to save,
how to resume, how to stop. A trainer's loop is `for step in run.steps(): ... run.log(metrics)`.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tqdm import tqdm

from rlhf_fast.checkpoint import atomic_dir, rng_state, save_checkpoint, set_rng_state
from rlhf_fast.config import TrainerConfig
from rlhf_fast.distributed import World, any_rank
from rlhf_fast.engine import Engine
from rlhf_fast.errors import CheckpointError, NonFiniteError
from rlhf_fast.report import summary_table, write_report
from rlhf_fast.tracking import MetricsLogger, PhaseTimer, Progress, SampleLog, peak_memory_gb
from rlhf_fast.trainers.run_folder import mark_finished, release_run_folder
from rlhf_fast.watchdog import Watchdog

Metrics = dict[str, float]


class Stateful(Protocol):
    """Anything besides the engines that a resumed run must find as it was left; the state is JSON."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """One run in `config.output_dir`.

    engines: what DeepSpeed trains, by name. state: what else a checkpoint holds. evaluate(step) -> metrics named
    eval/...; exports: what fills each folder that a finished run has, by its name, final/ last. better(metrics) -> a
    number, higher is better, to keep the best checkpoint.
    """

    def __init__(
        self,
        config: TrainerConfig,
        world: World,
        *,
        total_steps: int,
        engines: Mapping[str, Engine],
        state: Mapping[str, Stateful],
        evaluate: Callable[[int], Metrics],
        exports: Mapping[str, Callable[[Path], None]],
        better: Callable[[Metrics], float],
        checkpoint: Path | None,
        headline: Mapping[str, str],
        warnings: Sequence[str] = (),
    ) -> None:
        self.config, self.world, self.total_steps = config, world, total_steps
        self.engines, self.state = engines, state
        self.evaluate, self.exports, self.better = evaluate, exports, better
        self.folder = Path(config.output_dir)
        self.headline = headline  # metric -> its short name in the progress bar
        self.warnings = warnings  # for the person and the report, such as skipped rows
        self.step = 0
        self.best: tuple[float, int] | None = None  # (value, step)
        self.nonfinite_in_a_row = 0
        self.nonfinite_steps = 0
        if checkpoint is not None:
            self._load(checkpoint)
        self.watchdog = Watchdog(world, patience=config.rank_timeout)
        self.timer = PhaseTimer(world.device, entered=lambda phase: self.watchdog.enter(phase, self.step))
        self._row: Metrics = {}
        self._metrics: MetricsLogger | None = None  # the main rank's alone
        self._samples: SampleLog | None = None

    # ---- the loop -------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, from 1 (or from the checkpoint's, plus one) to total_steps.

        Between two steps: evaluation, one row of metrics, a checkpoint when one is due. After the last: final/ and
        report.html. On SIGTERM or SIGINT the step under way is finished and saved, and the loop ends.
        """
        self._open_logs()
        progress = Progress(self.total_steps, self.step, self._title(), disable=not self.world.is_main)
        exported = False
        try:
            with stop_requests() as stop:
                before = self._evaluate_at(0) if self.step == 0 else {}
                while self.step < self.total_steps:
                    self.step += 1
                    self._row, started = {}, time.perf_counter()
                    yield self.step
                    self._row |= {f"eval_before/{name.removeprefix('eval/')}": x for name, x in before.items()}
                    before = {}
                    saved = self._end_step(started, stop)
                    progress.update(self.step, self._headline())
                    if saved and any_rank(stop.is_set(), self.world) and self.step < self.total_steps:
                        self.say(f"stopped after step {self.step}; go on with --resume")
                        return
                self._export()
                exported = True
        finally:
            self.watchdog.close()
            progress.close()
            self._close_logs()
            if self.world.is_main:
                if exported:  # last of all: a run killed before the report is there is gone on with, and writes it
                    mark_finished(self.folder, self.step)
                release_run_folder(self.folder)
        self._finish()

    @property
    def finished(self) -> bool:
        """False while steps are left, as after a signal."""
        return self.step >= self.total_steps

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add to the row of the step under way."""
        self._row |= metrics

    def log_samples(self, step: int, split: Literal["train", "eval"], rows: list[dict[str, Any]]) -> None:
        """Write the main rank's completions to samples.jsonl."""
        if self._samples is not None:
            self._samples.log(step, split, rows)

    def check_finite(self, skipped: bool) -> None:
        """Count an optimiser step that was dropped for its gradient, or that there was none."""
        if not skipped:
            self.nonfinite_in_a_row = 0
            return
        limit = self.config.skip_grad_norm
        spike = "" if limit is None else f" or its norm is above {limit:g} (skip_grad_norm)"
        self.drop(f"the gradient is not finite{spike}", "Lower learning_rate, use dtype=float32, or look at the data")

    def drop(self, reason: str, advice: str) -> None:
        """Count a batch that was dropped, on all ranks alike. Raises NonFiniteError for too many in a row."""
        self.nonfinite_in_a_row += 1
        self.nonfinite_steps += 1
        self.say(f"step {self.step}: {reason}; the batch was dropped and nothing was changed")
        if self.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            raise NonFiniteError(
                f"{self.nonfinite_in_a_row} optimiser steps in a row were dropped, the last in step {self.step}, where "
                f"{reason}. The weights are those before them. {advice}; raise max_nonfinite_steps to go on longer."
            )

    def _end_step(self, started: float, stop: threading.Event) -> bool:
        """Returns whether the step was saved: because it was due, or because the run is to stop."""
        last = self.step == self.total_steps
        every = self.config.eval_steps
        if last or (every and self.step % every == 0):
            self._row |= self._evaluate_at(self.step)
        seconds = time.perf_counter() - started
        self._row |= self.timer.pop() | {"time/step": seconds, "memory/peak_gb": peak_memory_gb(self.world.device)}
        self._row["nonfinite_steps"] = self.nonfinite_steps
        if "num_tokens" in self._row:
            self._row["perf/tokens_per_s"] = self._row["num_tokens"] / seconds
        if self._metrics is not None:
            self._metrics.log(self.step, self._row)
        due = self.config.save_steps is not None and self.step % self.config.save_steps == 0
        stopping = not last and any_rank(stop.is_set(), self.world)
        if not due and not stopping:
            return False
        try:
            with self.timer("save"):
                self._save()
        except CheckpointError as error:
            if self.config.on_save_error == "error" or stopping:
                raise
            self.say(f"step {self.step}: {error}; the run goes on unsaved")
            return False
        return True

    def _evaluate_at(self, step: int) -> Metrics:
        with self.timer("eval"):
            metrics = self.evaluate(step)
        if metrics and step:
            value = self.better(metrics)
            if not math.isnan(value) and (self.best is None or value > self.best[0]):
                self.best = (value, step)
        return metrics

    def _export(self) -> None:
        for name, write in self.exports.items():
            with atomic_dir(self.folder / name, self.world) as folder:
                write(folder)

    def _finish(self) -> None:
        if self.world.is_main:
            print(summary_table(self.folder))
            print(f"\nmodel: {self.folder / 'final'}\nreport: {self.folder / 'report.html'}\n", flush=True)

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            self._write,
            keep=self.config.save_total_limit,
            best=self.best[1] if self.best else None,
            world=self.world,
        )

    def _write(self, folder: Path) -> None:
        for name, engine in self.engines.items():
            engine.save(folder / name)
        torch.save(rng_state(), folder / f"rng-{self.world.rank}.pt")
        if self.world.is_main:
            state = {
                "step": self.step,
                "best": self.best,
                "nonfinite_steps": self.nonfinite_steps,
                "nonfinite_in_a_row": self.nonfinite_in_a_row,
                "state": {name: part.state_dict() for name, part in self.state.items()},
            }
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")

    def _load(self, folder: Path) -> None:
        for name, engine in self.engines.items():
            engine.load(folder / name)
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        self.step = state["step"]
        self.best = tuple(state["best"]) if state["best"] else None
        self.nonfinite_steps = state["nonfinite_steps"]
        self.nonfinite_in_a_row = state["nonfinite_in_a_row"]
        for name, part in self.state.items():
            part.load_state_dict(state["state"][name])
        set_rng_state(torch.load(folder / f"rng-{self.world.rank}.pt", weights_only=True))

    # ---- small things ---------------------------------------------------------------------------------------------

    def _open_logs(self) -> None:
        if self.world.is_main:
            self._metrics = MetricsLogger(
                self.folder,
                report_to=self.config.report_to,
                run_name=self.config.run_name,
                config=asdict(self.config),
                resume_step=self.step,
            )
            self._samples = SampleLog(self.folder, self.step)
            for warning in self.warnings:
                self._metrics.warn(self.step, warning)
                self.say(warning)

    def _close_logs(self) -> None:
        if self._metrics is not None and self._samples is not None:
            self._metrics.close()
            self._samples.close()
            try:
                write_report(self.folder)
            except OSError as error:  # a full disk: what ended the run is the better message
                self.say(f"{self.folder / 'report.html'} could not be written: {error.strerror}")

    def _headline(self) -> Metrics:
        return {short: self._row[name] for name, short in self.headline.items() if name in self._row}

    def _title(self) -> str:
        return type(self.config).__name__.removesuffix("Config").upper()

    def say(self, message: str) -> None:
        """To the person, once for all ranks."""
        if self.world.is_main:
            tqdm.write(f"{self._title()}: {message}", file=sys.stderr)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into a set event; a second one interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        for each, handler in old.items():
            signal.signal(each, handler)
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    for number in old:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
