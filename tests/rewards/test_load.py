"""load_reward: finding what the config names, and what a person reads when it is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.errors import ConfigError, RewardError
from rlhf_fast.rewards import load_reward, reward_sources


@pytest.fixture(autouse=True)
def _clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def total(spec: Any, folder: Path | None = None, **columns: list[Any]) -> list[float]:
    return load_reward(spec, base_dir=folder).score(["p", "q"], ["a", "bbb"], **columns).total.tolist()


GOOD = "def length(completions, **_):\n    return [len(c) for c in completions]\n"


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "rewards/good.py", GOOD)
    assert total("rewards/good.py:length", tmp_path) == [1, 3]
    assert total(f"{file}:length") == [1, 3]
    monkeypatch.chdir(tmp_path)
    assert total("rewards/good.py:length") == [1, 3]
    reward = load_reward("rewards/good.py:length")
    assert (reward.name, reward.label) == ("length", "reward rewards/good.py:length")


def test_a_package(tmp_path: Path) -> None:
    write(tmp_path, "rewards_of_test_load/__init__.py", "")
    write(tmp_path, "rewards_of_test_load/good.py", GOOD)
    assert total("rewards_of_test_load.good:length", tmp_path) == [1, 3]


def test_an_installed_package() -> None:
    with pytest.raises(RewardError, match=r"reward statistics:mean needs 'data', which is no column"):
        total("statistics:mean")


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    write(tmp_path, "a/score.py", "def f(completions):\n    return [1] * len(completions)\n")
    write(tmp_path, "b/score.py", "def f(completions):\n    return [2] * len(completions)\n")
    one, two = load_reward("a/score.py:f", base_dir=tmp_path), load_reward("b/score.py:f", base_dir=tmp_path)
    assert one.score(["p"], ["a"]).total.tolist() == [1]
    assert two.score(["p"], ["a"]).total.tolist() == [2]


def test_functions_of_one_file_share_it_and_an_edited_file_is_read_again(tmp_path: Path) -> None:
    text = "calls = []\ndef f(completions):\n    calls.append(1)\n    return [len(calls)] * len(completions)\ng = f\n"
    write(tmp_path, "count.py", text)
    spec = [{"source": "count.py:f"}, {"source": "count.py:g", "name": "g"}]
    assert total(spec, tmp_path) == [3, 3]
    write(tmp_path, "count.py", text.replace("len(calls)", "10"))
    assert total(spec, tmp_path) == [20, 20]


def test_a_file_may_import_its_neighbour_and_define_dataclasses(tmp_path: Path) -> None:
    write(tmp_path, "neighbour_of_test_load.py", "ONE = 1\n")
    write(
        tmp_path,
        "judge.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n    bonus: int\n"
        "    def __call__(self, completions):\n        from neighbour_of_test_load import ONE\n"
        "        return [ONE + self.bonus for c in completions]\n"
        "judge = Judge(4)\n",
    )
    assert total("judge.py:judge", tmp_path) == [5, 5]


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("god.py:length", GOOD, r"reward god\.py:length: no file god\.py in /.*\. Did you mean good\.py\?"),
        ("no/good.py:length", GOOD, r"no file good\.py in /.*/no\."),
        ("good.py:lenght", GOOD, r"good\.py has no function 'lenght'; did you mean 'length'\?"),
        ("good.py:zzz", GOOD, r"good\.py has no function 'zzz'; it has length\."),
        ("good.py:zzz", "", r"it has no functions\."),
        ("good.py:", GOOD, r"'' is not a function's name\. Write file\.py:name"),
        ("good.py", GOOD, r"reward good\.py: which function\? Write good\.py:NAME; it has length"),
        ("good.py:WEIGHT", "WEIGHT = 3\n", r"WEIGHT is a int, which cannot be called"),
        ("good.py:Judge", "class Judge: ...\n", r"Judge is a class; make an instance in good\.py and name that"),
        ("good.py:f", "x = 1\ndef f(:\n", r"reward good\.py:f: /.*/good\.py:2: invalid syntax"),
        (
            "good.py:f",
            "x = 1\nimport no_such_package\n",
            r"/good\.py:2: ModuleNotFoundError: No module named 'no_",
        ),
        ("good.py:f", "x = 1\n\ny = {}['k']\n", r"/good\.py:3: KeyError: 'k'"),
        ("good.py:f", "import sys\nsys.exit('no key')\n", r"/good\.py:2: SystemExit: no key"),
        ("no_such_package.x:f", "", r"no module 'no_such_package' in /.* or among the installed packages"),
        ("json.nothing:f", "", r"no module 'json\.nothing'"),
        ("json:lods", "", r"json has no function 'lods'; did you mean 'loads'\?"),
        ("two words:f", "", r"'two words' is neither a \.py file nor a module"),
        ("runs/reward/final", "", r"no such folder in /.*; write \"file\.py:function\""),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, spec: str, text: str, message: str) -> None:
    write(tmp_path, "good.py", text)
    with pytest.raises(RewardError, match=message):
        load_reward(spec, base_dir=tmp_path)


def test_an_import_error_inside_a_package_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    write(tmp_path, "broken_of_test_load.py", "x = 1\nimport no_such_package\n")
    with pytest.raises(RewardError, match=r"broken_of_test_load\.py:2: ModuleNotFoundError"):
        load_reward("broken_of_test_load:f", base_dir=tmp_path)


def test_weighted_sum(tmp_path: Path) -> None:
    write(tmp_path, "good.py", GOOD + "def tens(prompts):\n    return [10, 20]\n")
    reward = load_reward(
        [
            {"source": "good.py:length", "weight": "1e-1"},
            {"source": "good.py:tens", "weight": -1, "name": "penalty"},
            {"source": lambda completions: [7, 7], "weight": 0, "name": "only watched"},
        ],
        base_dir=tmp_path,
    )
    scores = reward.score(["p", "q"], ["a", "bbb"])
    assert scores.total.tolist() == pytest.approx([0.1 - 10, 0.3 - 20])
    parts = {name: part.tolist() for name, part in scores.parts.items()}
    assert parts == {"length": [1, 3], "penalty": [10, 20], "only watched": [7, 7]}
    assert list(reward.score([], []).parts) == list(parts)


def test_one_failing_part_fails_all(tmp_path: Path) -> None:
    spec = [{"source": lambda completions: [1.0, 2.0]}, {"source": lambda completions: [1.0], "name": "short"}]
    with pytest.raises(RewardError, match=r"short returned 1 scores for 2 completions: none at row 1"):
        total(spec)
    with pytest.raises(RewardError, match=r"too large for float32 at row 1 .*: big 3e\+38\. Use smaller weights"):
        total([{"source": lambda completions: [0, 3e38], "weight": 10, "name": "big"}])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", r"reward: got ''; write \"file\.py:function\""),
        ([], r"reward: got \[\]"),
        (None, r"reward: got None"),
        (["judge.py:f"], r"reward\[0\]: got 'judge\.py:f'; a mapping with source, weight, name"),
        ([{"sourse": "a.py:f"}], r"reward\[0\]: unknown key 'sourse'; did you mean 'source'\?"),
        ([{"path": "a.py:f"}], r"reward\[0\]: unknown key 'path'; the keys are source, weight, name"),
        ([{"source": "a.py:f"}, {"weight": 2}], r"reward\[1\]: no `source`; write"),
        ([{"source": "a.py:f", "weight": "high"}], r"reward\[0\]\.weight: got 'high'; a finite number"),
        ([{"source": "a.py:f", "weight": True}], r"reward\[0\]\.weight: got True"),
        ([{"source": "a.py:f", "weight": float("inf")}], r"reward\[0\]\.weight: got inf"),
        ([{"source": "a.py:f", "name": 3}], r"reward\[0\]\.name: got 3; text was expected"),
        ([{"source": "a.py:f"}, {"source": "b.py:f"}], r"two sources are called 'f'; give each a `name`"),
        ("ftp://host/x", r"reward URL 'ftp://host/x': an http\(s\) address with a host was expected"),
        ("http:///x", r"an http\(s\) address with a host was expected"),
        ("http://me:secret@host:99999/x?key=secret", r"reward URL 'host:99999/x': Port out of range"),
        ("http://[::1/x", r"Invalid IPv6"),
    ],
)
def test_sources_of_a_wrong_form(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        reward_sources(spec)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("rewards/judge.py:score", "score"),
        ("package.module:score", "score"),
        ("models/my-reward", "my-reward"),
        ("runs/demo/reward/final", "reward"),
        ("http://user:pw@localhost:8000/v1/score?key=1", "localhost/v1/score"),
    ],
)
def test_default_names(source: str, name: str) -> None:
    assert reward_sources(source)[0].name == name
