"""report.html: one file, no network, opens from disk."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_fast.config import PPOConfig, RewardConfig, SFTConfig
from rlhf_fast.report.charts import chart
from rlhf_fast.report.completions import completions
from rlhf_fast.report.figures import sections
from rlhf_fast.report.markup import esc, plain
from rlhf_fast.report.run import Run, read_run
from rlhf_fast.report.summary import Headline, change_headlines, cost_headlines, warnings
from rlhf_fast.tracking.jsonl import replacing

_HERE = Path(__file__).parent
_KINDS = {"ppo": "PPO", "reward": "Reward model", "sft": "Supervised fine-tuning"}
_CONFIGS = {"ppo": PPOConfig, "reward": RewardConfig, "sft": SFTConfig}


def write_report(output_dir: Path) -> Path:
    """Write report.html for a run, finished or not, from the files in its folder.

    Args:
        output_dir: the run's folder; any of its files may be missing or cut off.

    Returns:
        The path of the page: style, script and data inside, nothing loaded from elsewhere.

    Raises:
        DataError: the folder does not exist.
    """
    path = Path(output_dir) / "report.html"
    page = render(read_run(output_dir))
    with replacing(path) as file:
        file.write(page.encode("utf-8"))
    return path


def render(run: Run) -> str:
    """The page as text."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    script = (_HERE / "script.js").read_text(encoding="utf-8")
    # The policy lets this very script run and nothing else: not one that a completion might smuggle in.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    parts = {
        "Curves": _curves(run),
        "Completions": completions(run),
        "Configuration": _configuration(run),
        "Versions": _versions(run),
    }
    parts = {title: body for title, body in parts.items() if body}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in parts)
    body = "".join(f'<section id="{title.lower()}"><h2>{title}</h2>{part}</section>' for title, part in parts.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{esc(run.name)} · {_KINDS[run.kind]}</title><style>{style}</style></head>\n<body>"
        f"{_header(run)}<nav>{links}</nav><main>{_warnings(run)}{body}</main>"
        f"<footer>Made by rlhf_fast from the files beside this page.</footer><script>{script}</script></body></html>\n"
    )


def _header(run: Run) -> str:
    about = [_KINDS[run.kind]]
    model = run.config.get("model_name_or_path")
    if model:
        about.append(f"from {model}")
    if run.starts:
        about.append(str(run.starts[0].get("time", ""))[:10])
    changes = "".join(map(_stat, change_headlines(run)))
    costs = "".join(map(_stat, cost_headlines(run)))
    return (
        f'<header><h1 dir="auto">{esc(run.name)}</h1><p class="about">{esc(" · ".join(filter(None, about)))}</p>'
        + (f'<dl class="stats changes">{changes}</dl>' if changes else "")
        + f'<dl class="stats costs">{costs}</dl></header>'
    )


def _stat(headline: Headline) -> str:
    before = f'<span class="before">{_minus(headline.before)}</span> → ' if headline.before is not None else ""
    note = f'<dd class="note">{esc(headline.note)}</dd>' if headline.note else ""
    return f'<div><dt dir="auto">{esc(headline.label)}</dt><dd>{before}<b>{_minus(headline.value)}</b></dd>{note}</div>'


def _minus(text: str) -> str:
    return esc(text.replace("-", "−"))


def _warnings(run: Run) -> str:
    found = "".join(f'<li dir="auto">{esc(text)}</li>' for text in warnings(run))
    return f'<section class="warnings" aria-label="Warnings"><ul>{found}</ul></section>' if found else ""


def _curves(run: Run) -> str:
    out = []
    for section in sections(run):
        charts = "".join(chart(figure, run) for figure in section.figures)
        if not charts:
            continue
        grid = f'<div class="charts">{charts}</div>'
        if section.title == "Everything else":
            count = charts.count("<figure")
            out.append(f"<details><summary>{count} more curve{'s' * (count > 1)}</summary>{grid}</details>")
        else:
            out.append(f"<h3>{section.title}</h3>{grid}")
    return "".join(out)


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    known = fields(_CONFIGS[run.kind])
    plain_defaults = {field.name: field.default for field in known if field.default is not MISSING}
    made_defaults = {field.name: field.default_factory() for field in known if field.default_factory is not MISSING}
    defaults = plain_defaults | made_defaults
    rows = []
    for key, value in run.config.items():
        chosen = key not in defaults or defaults[key] != value
        rows.append(
            f'<div{" class=chosen" * chosen}><dt>{esc(key)}</dt><dd dir="auto">{esc(_config_text(value))}</dd></div>'
        )
    return f'<p class="note">Bold: not the default.</p><dl class="config">{"".join(rows)}</dl>'


def _config_text(value: Any) -> str:
    """As it stands in YAML, one line for each item of a list."""
    items = value if isinstance(value, list) and value else [value]
    text = "\n".join(item if isinstance(item, str) and item else _yaml(item) for item in items)
    # A report is made to be passed on; a password in a URL is not.
    return re.sub(r"(\w+://)[^/@\s]+@", r"\1…@", plain(text))


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _versions(run: Run) -> str:
    """The versions of each session; a resumed one is listed only where it differs from the one before."""
    out = []
    before: Any = None
    for start in run.starts:
        versions = start.get("versions")
        if versions == before or not isinstance(versions, dict):
            continue
        before = versions
        rows = "".join(f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd></div>" for name, value in versions.items())
        since = f"From step {start['step'] + 1:,} on" if start["step"] else "From the start"
        when = f"{since}, {str(start.get('time', ''))[:16].replace('T', ' ')} UTC"
        out.append(f'<p class="note">{esc(when)}</p><dl class="config">{rows}</dl>')
    return "".join(out)
