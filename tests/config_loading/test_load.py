"""Files and overrides: what is read, and the message for each way to get it wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig, TrainerConfig
from rlhf_fast.config_loading import load_config, parse_overrides, save_config
from rlhf_fast.errors import ConfigError

NEEDED = ["model_name_or_path=m", "train_data=d.jsonl"]
PPO_NEEDED = [*NEEDED, "reward=judge.py:score"]

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        file = tmp_path / "sft.yaml"
        file.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return file

    return write


def sft(*overrides: str) -> SFTConfig:
    return load_config(SFTConfig, None, [*NEEDED, *overrides])


def ppo(*overrides: str) -> PPOConfig:
    return load_config(PPOConfig, None, [*PPO_NEEDED, *overrides])


def test_file_then_overrides_then_output_dir(write: Write) -> None:
    file = write(
        """
        # a comment
        model_name_or_path: models/小
        train_data: [a.jsonl, b.parquet]
        learning_rate: 1e-5  # PyYAML reads this as text
        max_steps: 3
        output_dir: from-file
        eval_steps:
        packing: yes
        """
    )
    config = load_config(SFTConfig, file, ["max_steps=4", "max_steps=5", "seed=7", "output_dir=o"], output_dir="last")
    assert config == SFTConfig(
        model_name_or_path="models/小",
        train_data=["a.jsonl", "b.parquet"],
        learning_rate=1e-5,
        max_steps=5,
        seed=7,
        packing=True,
        output_dir="last",
    )


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=1e-5", 1e-5),
        ("learning_rate=1", 1.0),
        ("learning_rate='0.1'", 0.1),
        ("max_steps=12", 12),
        ("max_steps=null", None),
        ("max_steps=none", None),
        ("max_steps=None", None),
        ("packing=true", True),
        ("packing=False", False),
        ("packing=on", True),
        ("zero_stage=2", 2),
        ("dtype=bfloat16", "bfloat16"),
        ("dtype=float16", "float16"),
        ("report_to=[]", []),
        ("report_to=[tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("train_data=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("train_data=a b.jsonl", "a b.jsonl"),
        ("run_name=7", "7"),
        ("run_name=true", "true"),
        ("run_name=2024-01-01", "2024-01-01"),
        ("run_name='null'", "null"),
        ("run_name=null", None),
        ("run_name=", ""),
        ("run_name=a=b", "a=b"),
        ("system_prompt=You are: brief # really", "You are: brief # really"),
        ("system_prompt=你好 😀", "你好 😀"),
        ("chat_template={% for m in messages %}{{ m }}{% endfor %}", "{% for m in messages %}{{ m }}{% endfor %}"),
        ("model_name_or_path=123", "123"),
    ],
)
def test_values_of_overrides(override: str, value: Any) -> None:
    read = getattr(sft(override), override.partition("=")[0])
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("reward=http://localhost:8000/score?a=1", "http://localhost:8000/score?a=1"),
        ("reward=[{source: 'a.py:f', weight: 2}]", [{"source": "a.py:f", "weight": 2}]),
        ("stop_token_ids=[1, 2]", [1, 2]),
        ("cliprange_value=null", None),
        ("kl_estimator=k3", "k3"),
    ],
)
def test_values_of_ppo_overrides(override: str, value: Any) -> None:
    with pytest.warns(UserWarning, match="k3 in the reward") if "k3" in override else contextlib.nullcontext():
        assert getattr(ppo(override), override.partition("=")[0]) == value


OVERRIDE_MISTAKES = [
    ("learning_rat=1", r"learning_rat=1: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
    ("Batch-Size=1", r"unknown key 'Batch-Size'; did you mean 'batch_size'\?"),
    ("per_device_train_batch_size=1", r"here it is batch_size \(of one step, over all ranks\)"),
    ("bf16=true", r"unknown key 'bf16'; here it is dtype: bfloat16"),
    ("max_seq_length=1", r"here it is max_length"),
    ("gamma=1", r"unknown key 'gamma'; it belongs to PPOConfig, this is a SFTConfig"),
    ("xyzzy=1", r"unknown key 'xyzzy'; SFTConfig has none like it"),
    ("max_steps", r"max_steps: key=value was expected"),
    ("=3", r"=3: key=value was expected"),
    ("--max_steps=3", r"overrides have no dashes; write max_steps=3"),
    ("max_steps=3.5", r"max_steps=3\.5: max_steps: got 3\.5; a whole number or null was expected"),
    ("max_steps=1e3", r"max_steps: got '1e3'; a whole number or null was expected"),
    ("max_steps=true", r"max_steps: got true; a whole number or null was expected"),
    ("max_steps=[3", r"max_steps=\[3: not YAML: "),
    ("batch_size=null", r"batch_size: got null; a whole number was expected"),
    ("batch_size=", r"batch_size: got null; a whole number was expected"),
    ("learning_rate=fast", r"learning_rate: got 'fast'; a number was expected"),
    ("learning_rate=true", r"learning_rate: got true; a number was expected"),
    ("learning_rate=nan", r"learning_rate: got 'nan'; a finite number was expected"),
    ("learning_rate=.inf", r"learning_rate: got inf; a finite number was expected"),
    ("learning_rate=[1]", r"learning_rate: got \[1\]; a number was expected"),
    ("packing=1", r"packing: got 1; true or false was expected"),
    ("packing=maybe", r"packing: got 'maybe'; true or false was expected"),
    ("dtype=bf16", r"dtype: got 'bf16'; one of float32, bfloat16, float16"),
    ("zero_stage=4", r"zero_stage: got 4; one of 0, 1, 2, 3 was expected"),
    ("zero_stage=true", r"zero_stage: got true; one of 0, 1, 2, 3 was expected"),
    ("on_bad_row=ignore", r"on_bad_row: got 'ignore'; one of error, skip was expected"),
    ("report_to=none", r"report_to: got null; a list of one of tensorboard, wandb was expected\. Write \[a, b\]"),
    ("report_to=wandb", r"report_to: got 'wandb'; a list of"),
    ("report_to=[mlflow]", r"report_to: got 'mlflow'; one of tensorboard, wandb was expected"),
    ("train_data=[1]", r"train_data: got \[1\]; text or a list of text was expected"),
    ("train_data=null", r"train_data: got null; text or a list of text was expected"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDE_MISTAKES)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sft(override)


FILE_MISTAKES = [
    ("a: 1\nlearning_rat: 1\n", r"sft\.yaml:2: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
    ("sft:\n  max_steps: 1\n", r"sft\.yaml:1: unknown key 'sft'; keys are flat: write what is inside it without ind"),
    ("max_steps: 1\n\nmax_steps: 2\n", r"sft\.yaml:3: 'max_steps' is set twice, first in line 1"),
    ("seed: 1\nmax_steps: 3.5\n", r"sft\.yaml:2: max_steps: got 3\.5; a whole number or null was expected"),
    ("run_name: 2024-01-01\n", r"sft\.yaml:1: run_name: got .*2024.*; text or null was expected"),
    ("output_dir: 12:30\n", r"output_dir: got 750; text was expected\. Put it in quotes"),
    ("output_dir: none\n", r"output_dir: got null; text was expected"),
    ("max_steps: 'none'\n", r"max_steps: got 'none'"),
    ("1: 2\n", r"sft\.yaml:1: unknown key '1'"),
    ("? [a, b]\n: 2\n", r"sft\.yaml:1: a key must be a word"),
    ("seed: 1\nmax_steps: [1,\n", r"sft\.yaml:3: not YAML: expected the node content"),
    ("seed: 1\n\tmax_steps: 1\n", r"sft\.yaml:2: not YAML: found character '\\t'"),
    ("seed: 1\nmax_steps 1\nlam: 1\n", r"sft\.yaml:3: not YAML: could not find expected ':'"),
    ("seed: 1\n---\nseed: 2\n", r"sft\.yaml:2: not YAML: but found another document"),
    ("seed: 1\nrun_name: !!python/object:os.system x\n", r"sft\.yaml:2: not YAML: could not determine a constructor"),
    ("seed: 1\nrun_name: *base\n", r"sft\.yaml:2: not YAML: found undefined alias"),
    ("seed: 1\nrun_name: \x01\n", r"sft\.yaml:2: not YAML: special characters are not allowed"),
    ("- seed\n- 1\n", r"sft\.yaml:1: lines such as `key: value` were expected"),
    ("seed\n", r"sft\.yaml:1: lines such as `key: value` were expected"),
    ("", r"missing: model_name_or_path, train_data\. Set them in .*sft\.yaml or as model_name_or_path=\.\.\."),
    ("# nothing\n", r"missing: model_name_or_path, train_data"),
    ("train_data: d\n", r"missing: model_name_or_path\."),
]


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES)
def test_mistakes_in_files(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(SFTConfig, write(text))


def test_a_key_twice_inside_a_reward(tmp_path: Path) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text("reward:\n  - source: a.py:f\n    weight: 1\n    weight: 2\n")
    with pytest.raises(ConfigError, match=r"ppo\.yaml:4: 'weight' is set twice, first in line 3"):
        load_config(PPOConfig, file)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "ppo.yaml").write_text("")
    for name, message in (
        ("recipes/pp.yaml", r"recipes/pp\.yaml: no such file in /.*/recipes\. Did you mean recipes/ppo\.yaml\?"),
        ("recipes/x.json", r"no such file in /.*/recipes\. It holds ppo\.yaml\."),
        ("recipe/ppo.yaml", r"recipe/ppo\.yaml: no such file; there is no folder recipe in /"),
        ("recipes", r"recipes: cannot be read: Is a directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(PPOConfig, Path(name))
    (tmp_path / "latin.yaml").write_bytes("run_name: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8 text \(byte 10\)"):
        load_config(PPOConfig, Path("latin.yaml"))


def test_all_mistakes_are_told_at_once_with_their_places(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, write("learning_rat: 1\nseed: x\n"), ["packing=3"])
    assert str(caught.value).splitlines() == [
        "4 problems:",
        f"  - {write('')}:1: unknown key 'learning_rat'; did you mean 'learning_rate'?",
        f"  - {write('')}:2: seed: got 'x'; a whole number was expected.",
        "  - packing=3: packing: got 3; true or false was expected.",
        f"  - missing: model_name_or_path, train_data. Set them in {write('')} or as model_name_or_path=...",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(SFTConfig, write("batch_size: 0\n"), [*NEEDED, "adam_beta1=1"])
    assert str(caught.value).splitlines()[1:] == [
        "  - adam_beta1=1: adam_beta1: must be at least 0 and less than 1, got 1.0.",
        f"  - {write('')}:1: batch_size: must be at least 1, got 0.",
    ]


@pytest.mark.parametrize(
    "config",
    [
        SFTConfig(model_name_or_path="m", train_data="d"),
        RewardConfig(model_name_or_path="m", train_data=["d", "e"], eval_data="null", report_to=[]),
        PPOConfig(
            model_name_or_path="none",
            train_data="1e-5",
            output_dir="2024-01-01",
            system_prompt="你好 😀\n  مرحبا\tनमस्ते: # no comment\n\n",
            chat_template="{% for m in messages %}\n{{ m['content'] }}{% endfor %}",
            run_name="",
            learning_rate=1e-7,
            adam_epsilon=1e-30,
            kl_coef=0.1 + 0.2,
            stop_token_ids=[1, 2],
            reward=[{"source": "a.py:f", "weight": -0.5}, {"source": "http://h/x", "name": "true"}],
        ),
        PPOConfig(
            model_name_or_path="m",
            train_data="d",
            reward="a.py:f",
            system_prompt="None",
            run_name="\x00\x7f\ufeff\ud800",
        ),
    ],
)
def test_what_is_saved_is_read_back_equal(config: TrainerConfig, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_config(config, file)
    assert load_config(type(config), file) == config
    text = file.read_text(encoding="utf-8")
    assert [line.partition(":")[0] for line in text.splitlines() if re.match(r"\w+:", line)] == [
        field.name for field in dataclasses.fields(config)
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_overrides_of_any_dataclass() -> None:
    @dataclasses.dataclass
    class Sampling:
        temperature: float = 1.0
        stop: str | list[str] | None = None
        n: int = 1

    assert parse_overrides(["temperature=1", "stop=[a, b]"], Sampling) == {"temperature": 1.0, "stop": ["a", "b"]}
    assert parse_overrides([], Sampling) == {}
    with pytest.raises(ConfigError, match=r"temprature=1: unknown key 'temprature'; did you mean 'temperature'\?"):
        parse_overrides(["temprature=1"], Sampling)
