"""What a run runs on: the half of a result that the configuration does not say."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("rlhf_fast", "torch", "triton", "transformers", "tokenizers", "deepspeed", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Name to version: Python, the packages that decide a result, the operating system, CPU and GPU."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the build, such as +cu130
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    found["cpu"] = f"{_cpu_name()}, {_usable_cores()} cores"
    found["threads"] = str(torch.get_num_threads())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpu"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        found["cuda"] = str(torch.version.cuda)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Of this process, which a container or taskset may hold below the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
