"""The recipe's config is valid, its rewards load from it as PPO loads them, and they tell cheating from good cheer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import check_config, load_config
from rlhf_fast.rewards import RewardScores, load_reward

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> PPOConfig:
    monkeypatch.chdir(ROOT)
    return load_config(PPOConfig, ROOT / "recipes/smollm2/ppo.yaml", {})


def score(config: PPOConfig, *pairs: tuple[str, str]) -> RewardScores:
    prompts, completions = zip(*pairs, strict=True)
    return load_reward(config.reward).score(prompts, completions, category=["ai"] * len(pairs))


def test_config_is_valid(config: PPOConfig) -> None:
    check_config(config)
    assert isinstance(config.reward, list)
    assert [part["weight"] for part in config.reward] == [1.0, 0.0, 0.5]
    assert config.train_data != config.eval_data


def test_sentiment_and_the_topic_are_optimised(config: PPOConfig) -> None:
    scores = score(config, ("hi", "What a lovely, happy day!"), ("hi", "I hate this terrible place."), ("hi", ""))
    assert torch.equal(scores.total, scores.parts["sentiment"] + 0.5 * scores.parts["on_topic"])
    assert scores.total[0] > 0.7
    assert scores.total[1] < -0.7
    assert scores.total[2] == 0


def test_piled_up_words_are_seen(config: PPOConfig) -> None:
    plain = "The ribs protect your heart and lungs, and it is great that you ask about them."
    cheating = "Great wonderful amazing happy love love joy!"
    parts = score(config, ("How many ribs?", plain), ("How many ribs?", cheating)).parts
    assert parts["sentiment"][1] > parts["sentiment"][0]  # what PPO is paid for does not tell
    assert parts["sentiment_words"][0] < 0.2
    assert parts["sentiment_words"][1] == 1
    assert parts["on_topic"].tolist() == [1, 0]


def test_on_topic_is_the_share_of_content_words(config: PPOConfig) -> None:
    parts = score(
        config,
        ("Who wrote Frankenstein and Dracula?", "FRANKENSTEIN's author was Mary Shelley."),
        ("How are you?", "Anything goes."),
        ("你好吗", ""),
    ).parts
    torch.testing.assert_close(parts["on_topic"], torch.tensor([1 / 3, 1.0, 1.0]))
