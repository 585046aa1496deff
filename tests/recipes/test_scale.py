"""The configs for larger machines: every field is one that there is, with a value that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_fast.config import PPOConfig
from rlhf_fast.config_loading import load_config

FILES = sorted((Path(__file__).parents[2] / "recipes/scale").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_a_valid_config(file: Path) -> None:
    config = load_config(PPOConfig, file, {})
    assert file.stem in config.output_dir
    assert file.stem in file.read_text().partition("model_name_or_path")[0]  # the command beside it names this file
