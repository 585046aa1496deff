"""The few numbers that say what a run did, before -> after, for the page and for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from rlhf_fast.report.run import Run, finite, standard_errors
from rlhf_fast.tracking.numbers import duration, short


@dataclass
class Headline:
    """One number. With `before` it is a change; `note` is what to know beside it."""

    label: str
    value: str
    before: str | None = None
    note: str = ""


def change_headlines(run: Run) -> list[Headline]:
    """What training changed, held out where it was measured so."""
    if run.kind == "ppo":
        return _ppo(run)
    names = {"loss": "loss", "mean_token_accuracy": "token accuracy", "accuracy": "accuracy", "margin": "margin"}
    found = []
    for key, label in names.items():
        held_out = f"eval/{key}" in run.names
        change = _change(run, f"eval/{key}" if held_out else key, ("Held-out " if held_out else "Training ") + label)
        found += change
        if run.kind == "sft" and key == "loss" and change:
            change[0].note = _perplexity(run, "eval/loss" if held_out else "loss")
    return found


def cost_headlines(run: Run) -> list[Headline]:
    """What it took."""
    found = [Headline("Steps", short(run.last_step))]
    if wall := run.values("time/wall"):
        found.append(Headline("Wall time", duration(wall[-1])))
    phases = {name: sum(run.values(f"time/{name}")) for name in ("rollout", "score", "train")}
    if 0 < phases["rollout"] < math.inf:
        share = phases["rollout"] / sum(phases.values())
        found.append(Headline("Rollout", f"{share:.0%}", note="of the time of all steps, evaluation apart"))
    if speed := run.values("perf/tokens_per_s"):
        found.append(Headline("Tokens per second", short(median(speed)), note="median step"))
    if memory := run.values("memory/peak_gb"):
        found.append(Headline("Peak memory", short(max(memory)) + " GB"))
    return found


def _ppo(run: Run) -> list[Headline]:
    keys = run.names
    held_out = "eval/scores" in keys
    found = _score(run) if held_out else _change(run, "objective/scores", "Training score")
    for part in run.parts():
        key = f"eval/rewards/{part}" if f"eval/rewards/{part}" in keys else f"rewards/{part}"
        change = _change(run, key, part)
        weight = run.part_weight(part)
        if change and weight == 0:
            change[0].note = "measured, not trained on"
        elif change and weight is not None:
            change[0].note = f"weight {short(weight)} in the reward"
        found += change
    if kl := run.values("eval/kl" if "eval/kl" in keys else "objective/kl"):
        found.append(Headline("KL to reference", short(kl[-1]), note="nats per completion, at the end"))
    distinct = "eval/distinct_2" if "eval/distinct_2" in keys else "completions/distinct_2"
    found += _change(run, distinct, "Distinct-2", note="different word pairs per word")
    length = "eval/mean_length" if "eval/mean_length" in keys else "completions/mean_length"
    found += _change(run, length, "Mean length", note="tokens")
    return found


def _score(run: Run) -> list[Headline]:
    """Held-out score with its standard error, and the gain in standard errors of the difference."""
    points = [
        (value, finite(row.get("eval/scores_stderr")))
        for row in run.rows
        if (value := finite(row.get("eval/scores"))) is not None
    ]
    (before, before_error), (after, after_error) = points[0], points[-1]
    shown = [short(value) + (f" ± {short(error)}" if error is not None else "") for value, error in points]
    if len(points) == 1:
        return [Headline("Held-out score", shown[0], note="before training" if not run.finished else "")]
    note = _signed(after - before)
    if before_error is not None and after_error is not None:
        errors = standard_errors(before, after, before_error, after_error)
        note += f", {errors:.1f} standard errors" if errors is not None else ""
    return [Headline("Held-out score", shown[-1], before=shown[0], note=note)]


def _change(run: Run, key: str, label: str, note: str = "") -> list[Headline]:
    before, after = run.first_last(key)
    if before is None:
        return []
    if after is None:
        return [Headline(label, short(before), note=note)]
    return [Headline(label, short(after), before=short(before), note=note)]


def _perplexity(run: Run, key: str) -> str:
    values = [math.exp(value) for value in run.first_last(key) if value is not None and value < 50]
    return "perplexity " + " → ".join(short(value) for value in values) if values else ""


def _signed(value: float) -> str:
    return f"+{short(value)}" if value >= 0 else f"−{short(-value)}"


def warnings(run: Run) -> list[str]:
    """What a reader should know before trusting the rest."""
    found = list(run.warnings)
    for name, count in run.bad_lines.items():
        found.append(f"{name}: {count} line{'s' * (count > 1)} could not be read (cut off by a crash?) and left out.")
    total = run.config.get("max_steps")
    if not run.finished:
        of = f" of {total:,}" if isinstance(total, int) else ""
        found.append(f"The run has not finished: the last step is {run.last_step:,}{of}.")
    dropped = max(run.values("nonfinite_steps"), default=0)
    if dropped:
        updates = f"{short(dropped)} step{'s' * (dropped > 1)}"
        found.append(f"{updates} changed nothing because a reward, loss or gradient was not finite.")
    holes: dict[tuple[int, ...], list[str]] = {}
    for key in dict.fromkeys(key for row in run.rows for key in row):
        steps = tuple(row["step"] for row in run.rows if key in row and row[key] is None)
        if steps:
            holes.setdefault(steps, []).append(key)
    for steps, keys in holes.items():
        at = ", ".join(f"{step:,}" for step in steps[:5]) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
        found.append(f"No finite number at step {at}: {', '.join(keys)}.")
    for label, key in (("held-out", "eval/distinct_2"), ("training", "completions/distinct_2")):
        before, after = run.first_last(key)
        if before and after is not None and after < before / 2:
            found.append(
                f"The {label} replies have become alike: distinct-2 fell from {short(before)} to {short(after)}."
            )
            break
    drift = max(run.values("rollout/logprob_drift_max"), default=0.0)
    if drift > 1e-4 and run.config.get("dtype") == "float32":
        found.append(
            f"Log-probs of rollout and training differ by up to {short(drift)} nats; float32 should stay below 1e-4."
        )
    if len({str(start.get("versions")) for start in run.starts}) > 1:
        found.append("The run was resumed with other versions than it began with; see Versions.")
    return found
