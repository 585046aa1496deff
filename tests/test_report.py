"""The report and the table, made from runs that were written by the real loggers and then damaged."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.errors import DataError
from rlhf_fast.report import summary_table, write_report
from rlhf_fast.report.curves import MOST, extremes, moving_average, sampled
from rlhf_fast.report.scales import linear_ticks, log_ticks, value_range
from rlhf_fast.tracking import MetricsLogger, SampleLog

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</div></script><!--"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Parses a page, checks that its elements nest, and keeps what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.charts: dict[str, dict[str, Any]] = {}
        self.scripts: list[str] = []
        self.text = ""
        self._title = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["h4"]:
            self._title = data
        if self.open[-1:] == ["script"] and self.tags[-1][1].get("type") == "application/json":
            self.charts[self._title] = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        elif self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data + "\n"

    def points(self, chart: str, series: str) -> list[list[float | None]]:
        (found,) = [s["points"] for s in self.charts[chart]["series"] if s["label"] == series]
        return found


def page(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def start(folder: Path, config: TrainerConfig) -> tuple[MetricsLogger, SampleLog]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), allow_unicode=True), encoding="utf-8")
    return MetricsLogger(folder, report_to=[], run_name=None, config=asdict(config)), SampleLog(folder)


def sample(prompt: Any, completion: str, score: float) -> dict[str, Any]:
    rewards = {"learned": score, "sentiment": 0.5}
    return {
        "prompt": prompt,
        "completion": completion,
        "score": score,
        "rewards": rewards,
        "finish_reason": "length",
        "kl": 1.5,
    }


def ppo_run(folder: Path, steps: int = 12, *, evaluate: bool = True) -> None:
    """A run as the trainer writes it: the evaluation before training is in the first step's row, as eval_before/."""
    config = PPOConfig(
        model_name_or_path="sft/final",
        train_data="train.jsonl",
        reward=[
            {"source": "http://me:hunter2@host/score", "name": "learned", "weight": 1.0},
            {"source": "vader.py:compound", "name": "sentiment", "weight": 0.0},
        ],
        learning_rate=3e-6,
        max_steps=steps,
    )
    metrics, samples = start(folder, config)
    for step in range(1, steps + 1):
        row = {
            "objective/scores": 0.1 * step,
            "objective/kl": 0.25 * step,
            "loss/policy_avg": float("nan") if step == 2 else -0.01 * step,
            "rollout/logprob_drift_max": 2e-5,
            "completions/distinct_2": 0.6,
            "rewards/sentiment": 0.2,
            "custom/number": step,
            "time/rollout": 1.0,
            "time/train": 2.0,
            "time/wall": 3.5 * step,
            "perf/tokens_per_s": 1000.0 + step,
            "memory/peak_gb": 1.25,
            "nonfinite_steps": 0 if step < 2 else 1,
        }
        if evaluate and step == 1:
            row |= {"eval_before/scores": -0.4567, "eval_before/scores_stderr": 0.03, "eval_before/distinct_2": 0.7}
            row |= {"eval_before/rewards/sentiment": 0.211, "eval_before/mean_length": 21.5}
            samples.log(0, "eval", [sample("Hi there", "old reply", -1.0), sample(EVIL, EVIL, 0.25)])
        if evaluate and step == steps:
            row |= {"eval/scores": 0.5433, "eval/scores_stderr": 0.04, "eval/distinct_2": 0.3, "eval/kl": 2.75}
            row |= {"eval/rewards/sentiment": 0.311, "eval/mean_length": 30.0}
            samples.log(step, "eval", [sample(EVIL, "你好 مرحبا", 0.75), sample("Hi there", "new reply", 1.0)])
        metrics.log(step, row)
        samples.log(step, "train", [sample("train prompt", "train reply", 0.0)])
    metrics.close()
    samples.close()
    (folder / "final").mkdir()


def test_the_numbers_are_those_in_the_files(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    shown = page(tmp_path)
    assert shown.points("Score", "rollouts") == [[step, pytest.approx(0.1 * step)] for step in range(1, 13)]
    assert shown.points("Score", "held out") == [[0, -0.4567, 0.03], [12, 0.5433, 0.04]]
    assert shown.points("Policy loss", "policy")[:3] == [[1, -0.01], [2, None], [3, -0.03]]
    assert shown.points("sentiment", "held out") == [[0, 0.211], [12, 0.311]]
    assert shown.points("custom/number", "custom/number")[-1] == [12, 12]  # nothing that was logged is left out
    assert {series["label"] for series in shown.charts["Time of a step"]["series"]} == {"rollout", "train"}
    for text in ("−0.457 ± 0.0300", "0.543 ± 0.0400", "+1, 20.0 standard errors", "2.75"):
        assert text in shown.text, text
    for text in ("42 s", "33%", "1.25 GB", "1,006"):
        assert text in shown.text, text
    assert "measured, not trained on" in shown.text
    assert "2 held-out prompts in the order of the data, none picked. After training 2 score higher" in shown.text


def test_before_and_after_stand_beside_each_other_by_prompt(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    text = page(tmp_path).text
    first, second = text.split("Hi there")[1].split(EVIL, 1)
    assert re.search(r"before.*old reply.*after.*new reply", first, re.DOTALL)
    assert "你好 مرحبا" in second
    assert "train reply" not in text


def test_nothing_from_the_data_becomes_markup(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config |= {"run_name": EVIL, EVIL: EVIL, "system_prompt": EVIL}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, f"rewards/{EVIL}": 1.0, EVIL: 2.0}) + "\n")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "event": "warning", "message": EVIL}) + "\n")
        file.write(json.dumps({"step": 13, "event": "start", "time": EVIL, "versions": {EVIL: EVIL}}) + "\n")
    shown = page(tmp_path)
    assert len(shown.scripts) == 1
    assert "img" not in {tag for tag, _ in shown.tags}
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)
    assert shown.text.count(EVIL) >= 8  # name, config, warning, version, prompt, completion: all shown as text
    assert "hunter2" not in shown.text


def test_only_the_reports_own_script_may_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    ppo_run(tmp_path)
    shown = page(tmp_path)
    (policy,) = [a["content"] for tag, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(shown.scripts[0].encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:")


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    shown = page(tmp_path)
    loads = [
        value
        for _, attributes in shown.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "xlink:href")
    ]
    assert loads
    assert all(value == "data:," or (value or "").startswith("#") for value in loads)
    style = (Path(write_report.__code__.co_filename).parent / "style.css").read_text()
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", shown.scripts[0])


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_sft_and_reward_runs(tmp_path: Path, kind: str) -> None:
    arguments = {"model_name_or_path": "m", "train_data": "t.jsonl"}
    config = SFTConfig(**arguments) if kind == "sft" else RewardConfig(**arguments)
    metrics, samples = start(tmp_path, config)
    for step in (1, 2, 3):
        row = {"loss": 3.0 / step, "lr": 1e-5}
        if step == 1:
            row |= {"eval_before/loss": 4.5, "eval_before/accuracy": 0.48}
        if step == 3:
            row |= {"eval/loss": 1.25, "eval/accuracy": 0.81}
        metrics.log(step, row)
    metrics.close()
    samples.close()
    shown = page(tmp_path)
    assert ("Supervised fine-tuning" if kind == "sft" else "Reward model") in shown.text
    assert shown.points("Loss", "held out") == [[0, 4.5], [3, 1.25]]
    assert "Completions" not in shown.text
    table = summary_table(tmp_path)
    assert re.search(r"Held-out loss +4\.50 +1\.25", table)
    assert re.search("perplexity 90.0 → 3.49" if kind == "sft" else r"Held-out accuracy +0\.480 +0\.810", table)


def test_one_step(tmp_path: Path) -> None:
    ppo_run(tmp_path, steps=1)
    shown = page(tmp_path)
    assert shown.points("Score", "rollouts") == [[1, 0.1]]
    assert "NaN" not in shown.text


def test_no_evaluation(tmp_path: Path) -> None:
    ppo_run(tmp_path, evaluate=False)
    shown = page(tmp_path)
    assert "No held-out prompts; these are the latest rollouts." in shown.text
    assert "train reply" in shown.text
    assert "Training score" in summary_table(tmp_path)


def test_a_run_cut_by_a_crash(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    (tmp_path / "final").rmdir()
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = tmp_path / name
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    shown = page(tmp_path)
    assert "metrics.jsonl: 1 line could not be read" in shown.text
    assert "The run has not finished: the last step is 5 of 12." in shown.text
    assert "So far answered at step 0 only." in shown.text
    assert "1 step changed nothing" in shown.text
    assert "No finite number at step 2: loss/policy_avg." in shown.text
    assert re.search(r"Held-out score +-0\.457 ± 0\.0300", summary_table(tmp_path))


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "samples.jsonl", "events.jsonl"])
def test_any_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    ppo_run(tmp_path)
    (tmp_path / missing).unlink()
    assert page(tmp_path).text
    assert summary_table(tmp_path)


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    assert "config.yaml is missing" in page(tmp_path).text
    assert summary_table(tmp_path) == "steps 0"
    with pytest.raises(DataError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "value", [1e308, -1e308, 5e-324, 1e29, 0, -0.0, True, None, "text", [1], {"a": 1}, float("nan"), float("inf")]
)
def test_odd_values_in_the_metrics_do_not_stop_the_report(tmp_path: Path, value: object) -> None:
    ppo_run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in (13, 14):
            odd = dict.fromkeys(("objective/scores", "eval/scores", "grad_norm", "time/rollout", "time/wall"), value)
            file.write(json.dumps({"step": step, **odd, "eval/scores_stderr": value, "nonfinite_steps": value}) + "\n")
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 14, "split": "eval", "prompt": value, "completion": value, "score": value}) + "\n"
        )
    shown = page(tmp_path)
    drawn = [
        value or "" for tag, attributes in shown.tags for value in attributes.values() if tag in ("path", "circle")
    ]
    assert not any(re.search("nan|inf|e[+-]", value) for value in drawn)
    assert shown.charts
    assert summary_table(tmp_path)


def test_characters_that_no_page_and_no_terminal_should_act_on(tmp_path: Path) -> None:
    metrics, samples = start(tmp_path, PPOConfig(model_name_or_path="m", train_data="t"))
    samples.log(0, "eval", [sample("\x1b[31mred\x00", "lone \ud83d\r\x9b2J", 1.0)])
    metrics.close()
    samples.close()
    text = page(tmp_path).text
    assert "␛[31mred␀" in text
    assert "lone \ufffd␍\ufffd2J" in text
    table = summary_table(tmp_path)
    table.encode("utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", table)


def test_the_table_keeps_its_columns_whatever_the_script(tmp_path: Path) -> None:
    ppo_run(tmp_path)
    lines = summary_table(tmp_path).splitlines()
    assert re.search(r"^Held-out score +-0\.457 ± 0\.0300 +0\.543 ± 0\.0400 +\+1, 20\.0 standard errors$", lines[1])
    assert re.search(r"^sentiment +0\.211 +0\.311 +measured, not trained on$", lines[2])
    assert "  before  old reply" in "\n".join(lines)
    assert re.search(r"  after   new reply +1$", "\n".join(lines), re.MULTILINE)


def test_long_curves_are_thinned_without_losing_the_spike_the_hole_or_the_end() -> None:
    points: list[tuple[int, float | None]] = [(step, 0.0) for step in range(1, 10_001)]
    points[5_000] = (5_001, 99.0)
    points[2_000:2_300] = [(step, None) for step in range(2_001, 2_301)]
    thin = extremes(points)
    assert len(thin) <= MOST
    assert (5_001, 99.0) in thin
    assert any(value is None for _, value in thin)
    assert any(value is None for _, value in moving_average(points))
    assert sampled(points)[-1] == points[-1]
    assert len(sampled(points)) <= MOST + 1


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 7.9), (1e-7, 3e-6), (12_000, 98_000), (5e6, 5.2e6), (-1e-9, 1e-9)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    bottom, top = value_range([low, high], log=False)
    ticks = linear_ticks(bottom, top)
    assert bottom <= low < high <= top
    assert 2 <= len(ticks.values) <= 6
    assert all(bottom - 1e-12 * abs(bottom) <= value <= top + 1e-12 * abs(top) for value in ticks.values)
    assert len(set(ticks.labels)) == len(ticks.labels)
    assert all(len(label) <= 7 for label in ticks.labels)


@pytest.mark.parametrize(("low", "high"), [(1e-5, 1e-5), (1e-7, 3e-5), (1e-12, 1e8), (2.0, 3.0)])
def test_log_ticks(low: float, high: float) -> None:
    bottom, top = value_range([low, high], log=True)
    ticks = log_ticks(bottom, top)
    assert 0 < bottom < low <= high < top
    assert 1 <= len(ticks.values) <= 9
    assert all(bottom <= value <= top for value in ticks.values)
