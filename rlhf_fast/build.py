"""Compiles the C++ libraries at first use and keeps them in a cache.

A library's folder in the cache carries a key: the hash of everything that the binary depends on, sources and headers,
torch, CUDA, Python, compiler, flags and CPU. What is found under its key is right; there is nothing to invalidate.
Several processes may ask at once: a file lock lets one build, and a whole folder moves into place in one step, so that
a build that is killed leaves nothing behind that could be mistaken for a library.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch

from rlhf_fast.errors import BuildError

CSRC = Path(__file__).resolve().parent / "csrc"
WITHOUT = 'Without it, backend="reference" (in a config: ops_backend: reference) works on any machine.'

# Kernels are compiled once for each, and one is chosen when they run. See csrc/cpu/isa.h.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    INSTRUCTION_SETS["avx512"] = (
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    )


@dataclass(frozen=True)
class Unit:
    """One source file, compiled to one object. The same file may be several units with different flags."""

    source: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Toolchain:
    """A compiler with what it is told in all cases."""

    command: tuple[str, ...]
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A shared library to build: NAME.so from its units. A change in a header changes the key like one in a source.

    `toolchain` raises BuildError where there is none.
    """

    name: str
    units: tuple[Unit, ...]
    headers: tuple[Path, ...] = ()
    toolchain: Callable[[], Toolchain] = lambda: cpp_toolchain()


def ops_library() -> Library:
    """The operators torch.ops.rlhf_fast.*: registered with PyTorch's dispatcher, so no Python binding is needed."""
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    headers = sorted([*(CSRC / "cpu").glob("*.h"), *(CSRC / "ops").glob("*.h")])
    # Nothing in ops.cpp is hot; -O1 compiles it in less time.
    return Library("_ops", (Unit(CSRC / "ops.cpp", ("-O1",)), *_kernels(sources)), tuple(headers))


def generation_library() -> Library:
    """The decoder, a Python module. Of its sources those in namespace RLHF_FAST_ISA are kernels."""
    folder = CSRC / "generation"
    sources = sorted(folder.glob("*.cpp"))
    kernels = [source for source in sources if "namespace rlhf_fast::RLHF_FAST_ISA" in source.read_text("utf-8")]
    python = ("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"])
    others = [
        Unit(source, ("-O1", *python) if source.stem.endswith("bindings") else ())
        for source in sources
        if source not in kernels
    ]
    cuda = [folder / "cuda" / name for name in ("backend.h", "torch.h")]
    headers = sorted([*(CSRC / "cpu").glob("*.h"), *folder.glob("*.h"), *cuda])
    return Library("_generation", (*others, *_kernels(kernels)), tuple(headers))


def _kernels(sources: list[Path]) -> list[Unit]:
    only = _only_set()
    sets = INSTRUCTION_SETS.values() if only is None else [INSTRUCTION_SETS[only]]
    return [Unit(source, flags) for source in sources for flags in sets]


def _only_set() -> str | None:
    """The one set to compile the kernels for, where RLHF_FAST_NATIVE=1 asks for no other than this CPU's, for builds
    that must be quick and are thrown away; else None."""
    return best_instruction_set() if os.environ.get("RLHF_FAST_NATIVE") == "1" else None


def best_instruction_set() -> str:
    """The last of INSTRUCTION_SETS that this CPU has whole."""
    cpu = _cpu_flags().split()
    runs = [name for name, flags in INSTRUCTION_SETS.items() if all(flag.removeprefix("-m") in cpu for flag in flags)]
    return runs[-1]


@functools.cache
def load_ops() -> None:
    """Make torch.ops.rlhf_fast.* callable, building it first if it is not in the cache. Later calls do nothing.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    path = build(ops_library())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}. Delete {path.parent} to build it again.") from error


@functools.cache
def load_generation() -> ModuleType:
    """The C++ decoder as a module, built first if it is not in the cache.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    library = generation_library()
    path = build(library)
    spec = importlib.util.spec_from_file_location(library.name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"cannot load {path}: {error}. Delete {path.parent} to build it again.") from error
    return module


def announce(library: Library, kind: str = "") -> None:
    """Build the library, of that kind, unless it is there, and print where it is."""
    there = find(library)
    start = time.monotonic()
    path = there or build(library)
    name = f"{library.name} {kind}".rstrip()
    print(f"{name}: {'already built' if there else f'built in {time.monotonic() - start:.0f} s'}, {path}")


def cache_folder() -> Path:
    """Where libraries are kept: $RLHF_FAST_CACHE, else ~/.cache/rlhf_fast."""
    folder = os.environ.get("RLHF_FAST_CACHE")
    return Path(folder).expanduser().absolute() if folder else Path.home() / ".cache" / "rlhf_fast"


def find(library: Library) -> Path | None:
    """The library in the cache, or None if it is not built. Raises BuildError without a compiler, as its key is made
    with the compiler's version."""
    path = _path(library, _key(_facts(library)))
    return path if path.exists() else None


def build(library: Library) -> Path:
    """Build the library unless the cache has it; return the path of NAME.so."""
    facts = _facts(library)
    path = _path(library, _key(facts))
    if path.exists():
        return path
    cache, folder = cache_folder(), path.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{folder.name}.lock", library.name):
            if path.exists():  # another process was faster
                return path
            # The lock is ours, so whoever made these was killed.
            for left in cache.glob(f".{folder.name}-*"):
                shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache))
            try:
                _compile(library, work, cache / f"{folder.name}.log")
                _publish(work / path.name, facts, folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise BuildError(
            f"cannot build {library.name} in {cache}: {error}. Set RLHF_FAST_CACHE to a folder that can be written."
        ) from error
    return path


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of g++, c++, clang++ on PATH. Raises BuildError."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        program = shutil.which(command[0]) if command else None
        if program is None:
            raise BuildError(f"CXX={chosen!r}: no such C++ compiler. Correct or unset CXX. {WITHOUT}")
        return [program, *command[1:]]
    for name in ("g++", "c++", "clang++"):
        program = shutil.which(name)
        if program is not None:
            return [program]
    raise BuildError(
        "no C++ compiler: install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
        f"conda: conda install gxx), or set CXX to yours. {WITHOUT}"
    )


def cpp_toolchain() -> Toolchain:
    """The C++ compiler with torch's headers and libraries. Raises BuildError."""
    return Toolchain(tuple(compiler()), tuple(_compile_flags()), tuple(_link_flags()))


@functools.cache
def compiler_version(command: tuple[str, ...]) -> str:
    """What the compiler says of itself: all lines of --version."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"the compiler does not run: {shlex.join(command)} --version: {done.stderr.strip()}")
    return done.stdout.strip()


def ninja_program() -> str:
    """The ninja binary. It is found through its Python package though PATH lacks the environment's bin folder."""
    with contextlib.suppress(ImportError):
        import ninja

        program = Path(ninja.BIN_DIR) / "ninja"
        if ninja.BIN_DIR and program.exists():
            return str(program)
    program_on_path = shutil.which("ninja")
    if program_on_path is None:
        raise BuildError(f"ninja is missing: pip install ninja. {WITHOUT}")
    return program_on_path


def _facts(library: Library) -> dict[str, Any]:
    """All that the binary depends on."""
    files = {*(unit.source for unit in library.units), *library.headers}
    toolchain = library.toolchain()
    return {
        "files": sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files),
        "units": [(unit.source.name, unit.flags) for unit in library.units],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version,
        "compiler": [toolchain.command, compiler_version(toolchain.command)],
        "flags": [toolchain.compile_flags, toolchain.link_flags],
        "cpu": _cpu_flags(),
    }


def _key(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _path(library: Library, key: str) -> Path:
    return cache_folder() / f"{library.name}-{key}" / f"{library.name}.so"


@functools.cache
def _cpu_flags() -> str:
    """The CPU's kind and its instruction sets, as the operating system names them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join([platform.machine(), *sorted(line.partition(":")[2].split())])
    return f"{platform.machine()} {platform.processor()}"


def _torch_folder() -> Path:
    return Path(torch.__file__).parent


def _compile_flags() -> list[str]:
    only = _only_set()
    return [
        *("-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall"),
        *(() if any(word.startswith("-O") for word in compiler()) else ("-O3",)),  # $CXX may say another
        *(() if only is None else (f"-DRLHF_FAST_ONLY={only}",)),
        # gcc 12's own AVX-512 header sets them off
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *("-isystem", str(_torch_folder() / "include")),
    ]


def _link_flags() -> list[str]:
    """torch's libraries, and its OpenMP runtime before the compiler's: two in one process would fight for the cores.

    They are loaded already when the library is, so no path to them is recorded.
    """
    libraries = _torch_folder() / "lib"
    openmp = sorted(str(path) for pattern in ("libgomp*.so*", "libiomp5.so") for path in libraries.glob(pattern))
    torch_libraries = [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    return ["-shared", *torch_libraries, "-Wl,--as-needed", *openmp[:1], "-fopenmp"]


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on the file. The operating system frees it when the process ends, however it ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"rlhf_fast: another process is building {name}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Library, work: Path, log: Path) -> None:
    """Run ninja in the folder `work`. Raises BuildError with the first error lines; all of the output is in `log`."""
    (work / "build.ninja").write_text(_ninja_file(library))
    print(f"rlhf_fast: compiling {library.name}, once; this takes some seconds", file=sys.stderr)
    with log.open("w") as output:
        command = [ninja_program(), "-v", "-C", str(work)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\berror\b|undefined reference|cannot find", line)]
        first = "\n  ".join((errors or lines[-5:])[:5])
        raise BuildError(f"compiling {library.name} failed:\n  {first}\nAll of the compiler's output: {log}. {WITHOUT}")


def _ninja_file(library: Library) -> str:
    def path(text: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    def words(flags: tuple[str, ...]) -> str:
        return shlex.join(flags).replace("$", "$$")

    toolchain = library.toolchain()
    lines = [
        "rule compile",
        f"  command = {words(toolchain.command)} {words(toolchain.compile_flags)} $flags -c $in -o $out",
        "rule link",
        f"  command = {words(toolchain.command)} $in -o $out {words(toolchain.link_flags)}",
    ]
    objects = []
    for number, unit in enumerate(library.units):
        objects.append(f"{number}-{unit.source.stem}.o")
        lines.append(f"build {path(objects[-1])}: compile {path(unit.source.absolute())}")
        lines.append(f"  flags = {words(unit.flags)}")
    lines.append(f"build {library.name}.so: link {' '.join(map(path, objects))}")
    return "\n".join(lines) + "\n"


def _publish(built: Path, facts: dict[str, Any], folder: Path) -> None:
    """Move the library into its place in one step, with a note of what it was built from."""
    finished = built.parent / "finished"
    finished.mkdir()
    (finished / "facts.json").write_text(json.dumps(facts, indent=1))
    with built.open("rb") as file:
        os.fsync(file.fileno())
    built.rename(finished / built.name)
    shutil.rmtree(folder, ignore_errors=True)  # a folder from which someone deleted the library
    os.replace(finished, folder)
