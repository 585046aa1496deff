"""Compiles .cu files for the CPU, in three builds, and keeps the libraries in a cache by their content.

`plain` runs the kernels; `checker` tells of every access to memory, so that races and uninitialised reads are found;
`asan` watches the ends of arrays, with AddressSanitizer. docs/cuda_on_cpu.md says which build finds what.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rlhf_fast.build import cache_folder, compiler, compiler_version

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"

COMMON = (
    *("-std=c++17", "-g", "-fno-var-tracking", "-fPIC", "-fno-strict-aliasing"),
    # Two libraries of different builds have functions, and static variables in them, of the same names.
    "-fno-gnu-unique",
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function"),
)


@dataclass(frozen=True)
class Build:
    name: str
    kernel_flags: tuple[str, ...] = ()
    runtime_flags: tuple[str, ...] = ()
    runtime_link: tuple[str, ...] = ()


PLAIN = Build("plain")
CHECKER = Build(
    "checker",
    # ThreadSanitizer's instrumentation without its library: the machine has functions of the same names.
    kernel_flags=("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"),
    runtime_flags=("-DCUDA_ON_CPU_CHECKER",),
)
ASAN = Build(
    "asan",
    kernel_flags=(
        "-fsanitize=address,alignment,bounds,shift,float-cast-overflow",
        "-fsanitize-recover=address",  # the machine ends the kernel, not the process
        "-fsanitize-undefined-trap-on-error",  # no second library, and a report each time
    ),
    runtime_flags=("-DCUDA_ON_CPU_ASAN",),
    # The C++ library first, or memory would come from one and go back to the other.
    runtime_link=("-Wl,--no-as-needed", "-lstdc++", "-lasan"),
)
BUILDS = {build.name: build for build in (PLAIN, CHECKER, ASAN)}


def runtime(build: Build) -> Path:
    """The machine that runs kernels: a library, compiled at first use."""
    sources = sorted((HERE / "runtime").glob("*.cpp"))
    flags = (*COMMON, "-O2", *build.runtime_flags)
    return _library(f"cuda_on_cpu-{build.name}", sources, flags, (*build.runtime_link, "-ldl"), _headers(HERE))


def kernels(
    build: Build, sources: Sequence[Path], include: Sequence[Path] = (KERNELS,), flags: Sequence[str] = ()
) -> Path:
    """A library of the .cu (or .cpp) files. `include` are the folders of headers that they may include.

    Raises CompileError with what the compiler said.
    """
    machine = runtime(build)
    folders = (HERE, *include)
    told = (*COMMON, "-O1", *build.kernel_flags, *(f"-I{folder}" for folder in folders), *flags)
    link = (str(machine), f"-Wl,-rpath,{machine.parent}")
    name = f"{'-'.join(source.stem for source in sources)[:60]}-{build.name}"
    headers = [header for folder in folders for header in _headers(folder)]
    for source in sources:  # what it takes from elsewhere
        headers += [source.parent / name for name in re.findall(r'#include "(\.\./.+)"', source.read_text())]
    return _library(name, sources, told, link, headers)


class CompileError(Exception):
    """The compiler's own words."""


def _headers(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))


def _library(
    name: str, sources: Sequence[Path], flags: Sequence[str], link: Sequence[str], headers: Sequence[Path]
) -> Path:
    command = compiler()
    facts: list[object] = [command, compiler_version(tuple(command)), flags, link]
    facts += [(str(path), path.read_bytes()) for path in (*sources, *headers)]  # with its place: reports name it
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    folder = cache_folder() / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"lib{name}-{key}.so"
    if path.exists():
        return path
    with _lock(folder / f"{name}.lock"):
        if not path.exists():  # else another process has made it meanwhile
            work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
            try:
                _compile(command, sources, flags, link, work, path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return path


def _compile(
    command: Sequence[str], sources: Sequence[Path], flags: Sequence[str], link: Sequence[str], work: Path, path: Path
) -> None:
    objects = [work / f"{number}-{source.stem}.o" for number, source in enumerate(sources)]
    with ThreadPoolExecutor(2) as pool:
        pairs = zip(sources, objects, strict=True)
        jobs = [[*command, *flags, "-x", "c++", "-c", str(source), "-o", str(made)] for source, made in pairs]
        list(pool.map(_run, jobs))
    finished = work / path.name
    # Its name is what libraries linked with it ask for.
    _run([*command, "-shared", *map(str, objects), *link, f"-Wl,-soname,{path.name}", "-o", str(finished)])
    os.replace(finished, path)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr[:6000]}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Freed by the operating system when the process ends, however it ends."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
