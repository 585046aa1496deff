"""What is there, what is missing, and what to do about it: `rlhf-fast doctor`.

Nothing is guessed: packages are imported, the C++ ops are built and loaded, threads are counted by the ops themselves.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rlhf_fast import build, build_cuda
from rlhf_fast.errors import BuildError

Status = Literal["ok", "missing", "problem", "optional"]

REQUIRED = {"transformers": "5", "deepspeed": "0.18", "peft": "0.19", "triton": "3.6"}
OPTIONAL = {
    "wandb": "curves on a server: report_to: [wandb]",
    "chatterbot_corpus": "the data of `make demo`",
    "vaderSentiment": "a sentiment reward, in the SmolLM2 recipe",
    "gguf": "the SmolLM2 recipe",
}


@dataclass(frozen=True)
class Check:
    """One line of the report. A status of "missing" or "problem" keeps the main job from running."""

    name: str
    status: Status
    found: str
    advice: str = ""


def doctor() -> list[Check]:
    """Look at this machine and this installation. Builds the C++ ops if they are not in the cache yet."""
    return [
        _python(),
        _torch(),
        *(_package(name, minimum) for name, minimum in REQUIRED.items()),
        *_gpu(),
        *_build_tools_and_ops(),
        _cache(),
        *(_optional(name, use) for name, use in OPTIONAL.items()),
    ]


def main() -> int:
    """Print the report. Returns 0 when SFT, reward model and PPO can run on this machine, else 1."""
    checks = doctor()
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.name:<{width}}  {check.status:<8}  {check.found}")
        if check.advice:
            print(f"{'':<{width}}  {'':<8}  -> {check.advice}")
    bad = [check.name for check in checks if check.status in ("missing", "problem")]
    print(f"\nNot ready: {', '.join(bad)}" if bad else "\nReady.")
    return 1 if bad else 0


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} at {sys.executable}")


def _torch() -> Check:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    found = f"{torch.__version__} ({cuda}, {torch.get_num_threads()} threads)"
    if not _at_least(torch.__version__, "2.11"):
        return Check("torch", "problem", found, "pip install 'torch>=2.11'")
    return Check("torch", "ok", found)


def _package(name: str, minimum: str) -> Check:
    """A package that the main job imports; Triton only on a GPU."""
    if name == "triton" and not torch.cuda.is_available():
        return _optional(name, "the kernels on a GPU")
    install = f"pip install '{name}>={minimum}'"
    try:
        version = importlib.metadata.version(name)
        _import_quietly(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", install)
    except Exception as error:  # whatever a broken package raises
        return Check(
            name, "problem", f"{version}, but: {type(error).__name__}: {error}", f"{install} --force-reinstall"
        )
    if not _at_least(version, minimum):
        return Check(name, "problem", version, install)
    return Check(name, "ok", version)


def _import_quietly(name: str) -> None:
    """Import without what the package logs at import."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module(name)
    finally:
        logging.disable(before)


def _optional(name: str, use: str) -> Check:
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, "optional", "not installed", f"pip install {name.replace('_', '-')}, for {use}")


def _gpu() -> list[Check]:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        gpu = Check("gpu", "ok", f"{len(names)} x {names[0]}, {memory:.0f} GiB each")
    elif shutil.which("nvidia-smi"):
        advice = "PyTorch cannot use it: install a CUDA build (pytorch.org, Get Started), or a newer driver"
        gpu = Check("gpu", "optional", "an NVIDIA driver is installed", advice)
    else:
        gpu = Check("gpu", "optional", "none; training runs on the CPU")
    return [gpu, _cuda_compiler(), *(_cuda_decoder() if torch.cuda.is_available() else [])]


def _cuda_compiler() -> Check:
    try:
        found = build_cuda.cuda_compiler()
    except BuildError as error:
        return Check("CUDA compiler", "optional", "none; with a GPU transformers decodes", str(error))
    if isinstance(found, build_cuda.Nvrtc):
        return Check("CUDA compiler", "ok", f"NVRTC, {found.library}, with the headers in {found.headers}")
    return Check("CUDA compiler", "ok", f"nvcc, {found} ({_last_line([found, '--version'])})")


def _cuda_decoder() -> list[Check]:
    """One line for each kind of GPU that is there. The libraries are built at need."""
    checks = []
    for architecture in build_cuda.present():
        try:
            build_cuda.load_cuda(architecture)
            path = build.find(build_cuda.cuda_library(architecture))
            checks.append(Check(f"CUDA decoder, sm_{architecture}", "ok", str(path)))
        except BuildError as error:
            checks.append(Check(f"CUDA decoder, sm_{architecture}", "optional", "transformers decodes", str(error)))
    return checks


def _build_tools_and_ops() -> list[Check]:
    tools = []
    for name, look in (("compiler", _compiler_found), ("ninja", build.ninja_program)):
        try:
            tools.append(Check(name, "ok", look()))
        except BuildError as error:
            tools.append(Check(name, _unless_gpu("missing"), "not found", str(error)))
    if all(tool.status == "ok" for tool in tools):
        return [*tools, *_ops()]
    return [*tools, Check("C++ ops", _unless_gpu("problem"), "cannot be built without these")]


def _compiler_found() -> str:
    command = build.compiler()
    return f"{' '.join(command)} ({build.compiler_version(tuple(command)).splitlines()[0]})"


def _ops() -> list[Check]:
    """Build and load both libraries, then ask for the instruction set and for the threads that share the work."""
    checks: list[Check] = []
    for name, library, load in (
        ("C++ ops", build.ops_library(), build.load_ops),
        ("C++ decoder", build.generation_library(), build.load_generation),
    ):
        start = time.monotonic()
        try:
            there = build.find(library)
            path = there or build.build(library)
            load()
        except BuildError as error:
            return [*checks, Check(name, _unless_gpu("problem"), "not built", str(error))]
        built = "in the cache" if there else f"built in {time.monotonic() - start:.0f} s"
        checks.append(Check(name, "ok", f"{torch.ops.rlhf_fast.instruction_set()}, {built}: {path}"))
    return [*checks, _threads()]


def _threads() -> Check:
    used, cores = torch.ops.rlhf_fast.num_threads(), _cores()
    found = f"{used} shared the work, of {cores} cores"
    runtimes = _openmp_runtimes()
    if len(runtimes) > 1:
        return Check("threads", "problem", found, f"two OpenMP runtimes fight for the cores: {', '.join(runtimes)}")
    if used >= cores:
        return Check("threads", "ok", found)
    limit = os.environ.get("OMP_NUM_THREADS")
    advice = f"OMP_NUM_THREADS is {limit}" if limit else "raise it with OMP_NUM_THREADS"
    return Check("threads", "optional", found, advice)


def _openmp_runtimes() -> list[str]:
    """The OpenMP libraries in this process."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {Path(line.split()[-1]) for line in maps.read_text().splitlines() if line.split()[-1].startswith("/")}
    return sorted(str(path) for path in paths if path.name.startswith(("libgomp", "libiomp5", "libomp.")))


def _cache() -> Check:
    folder = build.cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        advice = "set RLHF_FAST_CACHE to a folder that can be written"
        return Check("cache", _unless_gpu("problem"), f"{folder} cannot be written", advice)
    return Check("cache", "ok", f"{folder} ({free:.1f} GiB free)")


def _unless_gpu(status: Status) -> Status:
    """The C++ ops are the CPU's: with a GPU the main job runs without them."""
    return "optional" if torch.cuda.is_available() else status


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least(version: str, minimum: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int("".join(filter(str.isdigit, part)) or 0) for part in text.split("+")[0].split(".")[:2]]

    return numbers(version) >= numbers(minimum)


def _last_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[-1] if lines else f"{command[0]} does not run"
