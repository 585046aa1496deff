"""Configs in and out: files, overrides, checks, messages. The fields are in rlhf_fast/config.py.

load.py        load_config, parse_overrides
yaml_file.py   reading with line numbers; save_config
values.py      types
rules.py       ranges and contradictions; files that must be there
resume.py      what a resumed run may change
"""

from .load import load_config, parse_overrides
from .resume import check_resume, config_differences
from .rules import check_config, check_paths
from .yaml_file import save_config

__all__ = [
    "check_config",
    "check_paths",
    "check_resume",
    "config_differences",
    "load_config",
    "parse_overrides",
    "save_config",
]
