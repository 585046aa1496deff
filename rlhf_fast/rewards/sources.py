"""The config's `reward` field: one source, or a list of {source, weight, name}. Checked here, loaded in load.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from rlhf_fast.errors import ConfigError

KEYS = ("source", "weight", "name")
FORMS = (
    'write "file.py:function", "package.module:function", the folder of a reward model, an http(s) URL, '
    "or a list of {source, weight, name}"
)


@dataclass(frozen=True)
class RewardSource:
    """Where one reward comes from, its weight in the sum, and its name in the metrics."""

    source: str | Callable[..., Any]
    weight: float
    name: str


def reward_sources(spec: str | list[dict[str, Any]] | Callable[..., Any]) -> list[RewardSource]:
    """The sources of a `reward` field, with their default weight 1 and names. Raises ConfigError."""
    if callable(spec) or isinstance(spec, str):
        return [_source(spec, 1.0, None, "reward")]
    if not isinstance(spec, list) or not spec:
        raise ConfigError(f"reward: got {spec!r}; {FORMS}.")
    sources = [_entry(entry, f"reward[{i}]") for i, entry in enumerate(spec)]
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"reward: two sources are called {twice!r}; give each a `name` of its own.")
    return sources


def _entry(entry: Any, where: str) -> RewardSource:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: got {entry!r}; a mapping with {', '.join(KEYS)} was expected.")
    for key in entry:
        if key not in KEYS:
            near = get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}."
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    if "source" not in entry:
        raise ConfigError(f"{where}: no `source`; {FORMS.partition(', or a list')[0]}.")
    weight = entry.get("weight", 1.0)
    try:
        number = math.nan if isinstance(weight, bool) else float(weight)  # YAML reads 1e-3 as a string
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}.weight: got {weight!r}; a finite number was expected.")
    name = entry.get("name")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise ConfigError(f"{where}.name: got {name!r}; text was expected.")
    return _source(entry["source"], number, name, where)


def _source(source: Any, weight: float, name: str | None, where: str) -> RewardSource:
    if not callable(source) and not (isinstance(source, str) and source.strip()):
        raise ConfigError(f"{where}: got {source!r}; {FORMS}.")
    if isinstance(source, str) and "://" in source:
        split_url(source)
    return RewardSource(source, weight, name or default_name(source))


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def split_url(url: str) -> SplitResult:
    """The parts of an http(s) URL with a host. Raises ConfigError."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
        problem = "an http(s) address with a host was expected"
    except ValueError as error:
        problem = str(error)
    raise ConfigError(f"reward URL {url.partition('?')[0].rpartition('@')[2]!r}: {problem}.")


def without_secrets(url: str) -> str:
    """The URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def default_name(source: str | Callable[..., Any]) -> str:
    """The function's name, the model folder's (its parent's for .../final), or the URL's host and path."""
    if not isinstance(source, str):
        return getattr(source, "__name__", type(source).__name__)
    if is_url(source):
        url = urlsplit(source)
        return f"{url.hostname}{url.path}".rstrip("/")
    if ":" in source:
        return source.rpartition(":")[2]
    path = PurePath(source)
    return path.parent.name if path.name == "final" and path.parent.name else path.name
