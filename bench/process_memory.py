"""How much memory this process has, and had at most, as Linux counts it. Nothing is imported but the standard library,
so that programs of other environments can use it."""

from __future__ import annotations

from pathlib import Path


def start_watching() -> int:
    """Bytes of RAM now; from here on peak() counts anew."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to VmRSS
    return _status("VmRSS")


def peak() -> int:
    """The most bytes of RAM since start_watching(): the process's own pages and those of files that it has mapped."""
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: this needs Linux")
