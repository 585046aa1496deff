"""A run read from its folder: whatever is there, in whatever state a crash left it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_fast.errors import DataError
from rlhf_fast.tracking.jsonl import read_rows

Kind = Literal["ppo", "reward", "sft"]
Point = tuple[int, float | None]


@dataclass
class Pair:
    """One held-out prompt with its completion before and after training; None where there is none (yet)."""

    prompt: Any
    before: dict[str, Any] | None
    after: dict[str, Any] | None


@dataclass
class Run:
    """Everything that the report shows."""

    name: str
    kind: Kind
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # one a step, in order
    samples: list[dict[str, Any]]
    starts: list[dict[str, Any]]  # one each time the run was started or resumed: step, time, versions
    warnings: list[str]
    finished: bool
    bad_lines: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def series(self, key: str) -> list[Point]:
        """(step, value) wherever a row has `key`; None where the value was not finite."""
        return [(row["step"], finite(row[key])) for row in self.rows if key in row]

    @cached_property
    def names(self) -> list[str]:
        """Names of all numbers in the metrics, in the order in which they first appear."""
        names = dict.fromkeys(key for row in self.rows for key in row if key != "step")
        return [name for name in names if self.values(name)]

    def values(self, key: str) -> list[float]:
        """The finite values of `key` in the order of the steps."""
        return [value for _, value in self.series(key) if value is not None]

    def first_last(self, key: str) -> tuple[float | None, float | None]:
        """The first and the last finite value of `key`; the last is None when they are the same point."""
        values = self.values(key)
        return (values[0] if values else None, values[-1] if len(values) > 1 else None)

    def parts(self) -> list[str]:
        """Names of the reward's parts, measured on rollouts or on held-out prompts."""
        found = [key.removeprefix("eval/") for key in self.names]
        return list(dict.fromkeys(key.removeprefix("rewards/") for key in found if key.startswith("rewards/")))

    def part_weight(self, part: str) -> float | None:
        """The weight that the config gives this part of the reward; 0 means it is only watched. None: not said."""
        sources = self.config.get("reward")
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, Mapping) and source.get("name") == part:
                return finite(source.get("weight", 1.0))
        return None

    def eval_steps(self) -> list[int]:
        return sorted({row["step"] for row in self.samples if row.get("split") == "eval"})

    def pairs(self) -> list[Pair]:
        """The held-out completions of the first and the last evaluation, matched by prompt, in the file's order."""
        steps = self.eval_steps()
        if not steps:
            return []
        first = dict(_by_prompt(self.samples, steps[0]))
        last = dict(_by_prompt(self.samples, steps[-1])) if len(steps) > 1 else {}
        keys = [*first, *(key for key in last if key not in first)]
        return [Pair((first.get(key) or last[key]).get("prompt"), first.get(key), last.get(key)) for key in keys]


def finite(value: Any) -> float | None:
    """`value` as a float, or None if it is no finite number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and abs(value) < 1e30 else None


def standard_errors(before: float, after: float, before_error: float, after_error: float) -> float | None:
    """The gain in standard errors of the difference, the two means taken as independent."""
    error = math.hypot(before_error, after_error)
    return (after - before) / error if error > 0 else None


def read_run(output_dir: Path) -> Run:
    """Read a run's folder, finished or not.

    Raises:
        DataError: the folder does not exist.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise DataError(f"no run to report on: {output_dir} is not a folder")
    bad: dict[str, int] = {}
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        found[name], bad[name] = read_rows(output_dir / name)
    rows = _merged(found["metrics.jsonl"])
    config, problem = _read_config(output_dir / "config.yaml")
    events = found["events.jsonl"]
    messages = [str(event.get("message")) for event in events if event.get("event") == "warning"]
    return Run(
        name=str(config.get("run_name") or output_dir.resolve().name),
        kind=_kind(config, rows),
        config=config,
        rows=rows,
        samples=found["samples.jsonl"],
        starts=[event for event in events if event.get("event") == "start"],
        warnings=list(dict.fromkeys([*problem, *messages])),  # a resumed run repeats what it said at its start
        finished=(output_dir / "final").is_dir(),
        bad_lines={name: count for name, count in bad.items() if count},
    )


def _merged(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a step, in order. The evaluation before training is written in the first step's line; it is step 0's."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        for key, value in line.items():
            before = key.startswith("eval_before/")
            step, name = (0, "eval/" + key.removeprefix("eval_before/")) if before else (line["step"], key)
            merged.setdefault(step, {"step": step})[name] = value
    return [merged[step] for step in sorted(merged)]


def _read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.exists():
        return {}, ["config.yaml is missing."]
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        return {}, [f"config.yaml cannot be read: {error}"]
    if not isinstance(config, dict):
        return {}, ["config.yaml holds no configuration."]
    return {str(key): value for key, value in config.items()}, []


def _kind(config: Mapping[str, Any], rows: list[dict[str, Any]]) -> Kind:
    names = set(config) | {key for row in rows[:3] for key in row}
    if names & {"kl_coef", "objective/scores", "objective/kl"}:
        return "ppo"
    return "reward" if names & {"center_rewards_coefficient", "accuracy", "margin"} else "sft"


def _by_prompt(samples: list[dict[str, Any]], step: int) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Rows of one evaluation by (prompt, its how-manieth occurrence)."""
    seen: Counter[str] = Counter()
    for row in samples:
        if row["step"] == step and row.get("split") == "eval":
            prompt = json.dumps(row.get("prompt"), sort_keys=True)
            yield (prompt, seen[prompt]), row
            seen[prompt] += 1
