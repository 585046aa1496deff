"""Which curves a run gets, under which names and units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_fast.report.run import Run


@dataclass
class Curve:
    """One series of a figure. `error` names the series of its standard errors."""

    label: str
    key: str
    look: Literal["line", "points"] = "line"  # points: measured now and then
    error: str | None = None


@dataclass
class Figure:
    """One plot: what it is called, what its y axis counts, and one sentence on how to read it."""

    title: str
    unit: str
    note: str
    curves: list[Curve]
    log: bool = False  # logarithmic y axis
    stacked: bool = False  # bars that add up
    if_varies: bool = False  # not worth a place when it never changes


@dataclass
class Section:
    title: str
    figures: list[Figure]


def _pair(key: str, label: str = "training", eval_key: str | None = None, error: str | None = None) -> list[Curve]:
    return [Curve(label, key), Curve("held out", eval_key or f"eval/{key.split('/')[-1]}", "points", error)]


def _ppo(run: Run) -> list[Section]:
    reward = [
        Figure(
            "Score",
            "score",
            "What the reward gives to a completion, mean over the batch; bars are standard errors.",
            [
                Curve("rollouts", "objective/scores"),
                Curve("held out", "eval/scores", "points", error="eval/scores_stderr"),
            ],
        ),
        Figure(
            "KL to the reference",
            "nats per completion",
            "How far the policy has moved: log-prob under it minus under the reference, summed over a completion.",
            _pair("objective/kl", "rollouts"),
        ),
    ]
    for part in run.parts():
        weight = run.part_weight(part)
        watched = weight == 0
        note = "Measured beside the reward, never trained on." if watched else "One part of the reward by itself."
        reward.append(
            Figure(part, "score", note, _pair(f"rewards/{part}", "rollouts", eval_key=f"eval/rewards/{part}"))
        )
    reward += [
        Figure(
            "Reward after the KL penalty",
            "reward",
            "What PPO maximises: the score plus the (negative) KL penalty.",
            [Curve("total", "objective/rlhf_reward"), Curve("penalty", "objective/non_score_reward")],
        ),
        Figure("KL coefficient", "weight", "", [Curve("kl_coef", "objective/kl_coef")], if_varies=True),
    ]
    replies = [
        Figure("Length", "tokens", "Mean over completions.", _pair("completions/mean_length", "rollouts")),
        Figure(
            "Ended by themselves",
            "fraction",
            "Completions that reached an end token before the length limit.",
            _pair("completions/eos_rate", "rollouts"),
        ),
        Figure(
            "Distinct-2",
            "fraction",
            "Different word pairs per word over a batch; a fall means replies become alike.",
            _pair("completions/distinct_2", "rollouts"),
        ),
        Figure(
            "Entropy",
            "nats per token",
            "How undecided the policy is about the next token.",
            [Curve("policy", "policy/entropy_avg")],
        ),
    ]
    optimisation = [
        Figure("Policy loss", "loss", "Clipped surrogate, mean over tokens.", [Curve("policy", "loss/policy_avg")]),
        Figure("Value loss", "loss", "Half the squared error of the value.", [Curve("value", "loss/value_avg")]),
        Figure(
            "Clipped",
            "fraction of tokens",
            "Where the clip held the update back.",
            [Curve("policy", "policy/clipfrac_avg"), Curve("value", "val/clipfrac_avg")],
        ),
        Figure(
            "Size of one update",
            "nats",
            "Approximate KL between the policy before and after a step: mean of half the squared log-ratio.",
            [Curve("approximate KL", "policy/approxkl_avg")],
            log=True,
        ),
        Figure(
            "Largest ratio", "ratio", "New over old probability, worst token.", [Curve("ratio", "policy/ratio_max")]
        ),
        Figure(
            "Explained variance",
            "fraction",
            "Of the returns, by the value model: 1 is perfect, 0 no better than the mean.",
            [Curve("value", "val/explained_var")],
        ),
        Figure(
            "Values and returns",
            "reward",
            "Batch means; the value should follow the return.",
            [Curve("value", "val/mean"), Curve("return", "returns/mean")],
        ),
        Figure(
            "Gradient norm",
            "norm",
            "Before clipping.",
            [Curve("policy", "grad_norm"), Curve("value", "value/grad_norm")],
            log=True,
        ),
        Figure("Learning rate", "rate", "", [Curve("rate", "lr")], if_varies=True),
        Figure(
            "Rollout against training",
            "nats",
            "Difference between the sampler's log-probs and the trainer's on the same tokens.",
            [Curve("largest", "rollout/logprob_drift_max"), Curve("mean", "rollout/logprob_drift_mean")],
            log=True,
        ),
    ]
    return [Section("Reward", reward), Section("Replies", replies), Section("Optimisation", optimisation)]


def _sft(run: Run) -> list[Section]:
    learning = [
        Figure("Loss", "nats per token", "Cross-entropy of the next token.", _pair("loss")),
        Figure("Token accuracy", "fraction", "Tokens whose likeliest guess was right.", _pair("mean_token_accuracy")),
        Figure("Gradient norm", "norm", "Before clipping.", [Curve("model", "grad_norm")], log=True),
        Figure("Learning rate", "rate", "", [Curve("rate", "lr")], if_varies=True),
        Figure("Trained tokens", "tokens a step", "", [Curve("tokens", "num_tokens")]),
    ]
    return [Section("Learning", learning)]


def _reward(run: Run) -> list[Section]:
    learning = [
        Figure("Loss", "nats per pair", "−log σ of the margin: log 2 = 0.693 is a coin toss.", _pair("loss")),
        Figure(
            "Accuracy",
            "fraction of pairs",
            "The chosen reply scores above the rejected one.",
            _pair("accuracy", error="eval/accuracy_stderr"),
        ),
        Figure("Margin", "score", "Chosen minus rejected, batch mean.", _pair("margin")),
        Figure(
            "Rewards",
            "score",
            "Over both replies of every pair in the batch.",
            [Curve("mean", "mean_reward"), Curve("largest", "max_reward"), Curve("smallest", "min_reward")],
        ),
        Figure("Gradient norm", "norm", "Before clipping.", [Curve("model", "grad_norm")], log=True),
        Figure("Learning rate", "rate", "", [Curve("rate", "lr")], if_varies=True),
    ]
    return [Section("Learning", learning)]


# Shown elsewhere, or no news by themselves.
_NOT_DRAWN = {"epoch", "time/wall", "time/step", "nonfinite_steps", "eval/scores_stderr", "eval/accuracy_stderr"}


def sections(run: Run) -> list[Section]:
    """The figures that have data, by section; what has no figure of its own comes last, under its own name."""
    by_kind = {"ppo": _ppo, "sft": _sft, "reward": _reward}
    found = by_kind[run.kind](run)
    phases = [name for name in run.names if name.startswith("time/") and name not in _NOT_DRAWN]
    cost = [
        Figure(
            "Time of a step",
            "seconds",
            "Where it goes.",
            [Curve(name.removeprefix("time/"), name) for name in phases],
            stacked=True,
        ),
        Figure("Speed", "tokens per second", "", [Curve("speed", "perf/tokens_per_s")]),
        Figure("Peak memory", "GB", "The most so far.", [Curve("memory", "memory/peak_gb")], if_varies=True),
    ]
    found.append(Section("Time and memory", cost))
    for section in found:
        section.figures = [figure for figure in section.figures if _has_news(figure, run)]
    drawn = {curve.key for section in found for figure in section.figures for curve in figure.curves}
    rest = [name for name in run.names if name not in drawn | _NOT_DRAWN]
    twins = {f"eval/{name}" for name in rest}
    found.append(Section("Everything else", [_plain(name) for name in rest if name not in twins]))
    for section in found:
        for figure in section.figures:
            figure.curves = [curve for curve in figure.curves if curve.key in run.names]
    return [section for section in found if section.figures]


def _has_news(figure: Figure, run: Run) -> bool:
    values = [value for curve in figure.curves for value in run.values(curve.key)]
    return bool(values) and not (figure.if_varies and len(values) > 1 and min(values) == max(values))


def _plain(name: str) -> Figure:
    """A metric that no figure was made for, with its held-out twin."""
    look: Literal["line", "points"] = "points" if name.startswith("eval/") else "line"
    return Figure(name, "", "", [Curve(name, name, look), Curve("held out", f"eval/{name}", "points")])
