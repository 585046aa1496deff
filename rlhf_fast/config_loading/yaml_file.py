"""The YAML file of a config, read with the line of every key, and written."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.config import TrainerConfig
from rlhf_fast.errors import ConfigError


@dataclass(frozen=True)
class Given:
    """A value and where it stood: 'ppo.yaml:12' or 'max_steps=3'."""

    value: Any
    where: str


def read_yaml(file: str | Path) -> dict[str, Given]:
    """The top level of a YAML file with the line of each key. Raises ConfigError: no file, no YAML, a key twice."""
    file = Path(file)
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(_no_file(file)) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}.") from None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{file}:{_line(root)}: lines such as `key: value` were expected.")
        _check_keys(root, file)
        return {
            str(loader.construct_object(key, deep=True)): Given(_value(loader, value), f"{file}:{_line(key)}")
            for key, value in root.value
        }
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{file}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}.") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        position = getattr(error, "position", 0)
        line = text.count("\n", 0, position) + 1
        raise ConfigError(f"{file}:{line}: not YAML: {getattr(error, 'reason', error)}.") from None


def _check_keys(node: yaml.Node, file: Path) -> None:
    """No mapping has a key twice, at any depth: YAML forbids it, and PyYAML takes the last in silence."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{file}:{_line(key)}: a key must be a word.")
            if key.value in lines:
                raise ConfigError(f"{file}:{_line(key)}: {key.value!r} is set twice, first in line {lines[key.value]}.")
            lines[key.value] = _line(key)
            _check_keys(value, file)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, file)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _value(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("none", "None", "NONE"):
        return None
    return loader.construct_object(node, deep=True)


def _no_file(file: Path) -> str:
    if not file.parent.is_dir():
        return f"{file}: no such file; there is no folder {file.parent} in {Path.cwd()}."
    near = get_close_matches(file.name, [entry.name for entry in file.parent.iterdir() if entry.is_file()], n=1)
    others = sorted(entry.name for entry in file.parent.glob("*.y*ml"))
    hint = f" Did you mean {file.with_name(near[0])}?" if near else f" It holds {', '.join(others)}." if others else ""
    return f"{file}: no such file in {file.parent.resolve()}.{hint}"


def save_config(config: TrainerConfig, path: str | Path) -> None:
    """Writes all fields as YAML, which load_config reads back equal. The file is there whole or not at all."""
    path = Path(path)
    text = yaml.dump(
        dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class _Dumper(yaml.SafeDumper):
    """Quotes the word none, which read_yaml takes for null, and repeats lists instead of linking them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = text in ("none", "None", "NONE")
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_str)
