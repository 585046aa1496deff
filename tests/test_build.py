"""The build: one builder whatever happens, the right library for every change, messages that say what to do.

A library of one tiny function stands for the ops where only the machinery around the compiler is meant.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import build
from rlhf_fast.build import Library, Unit
from rlhf_fast.errors import BuildError

ROOT = Path(__file__).parent.parent

# A compiler that notes each compilation and, when HOLD is set, says that it has started and waits to be let go on.
COMPILER = """#!/bin/sh
case " $* " in *" -c "*)
    echo "$*" >> "{log}"
    if [ -n "$HOLD" ]; then exec 3<> "$HOLD.go"; echo started > "$HOLD.started"; read line <&3; fi ;;
esac
exec g++ "$@"
"""

# What each process of a test runs: build the library of the folder in argv and print its path.
BUILD = """
import sys
from pathlib import Path
from rlhf_fast.build import Library, Unit, build
folder = Path(sys.argv[1])
print(build(Library("tiny", (Unit(folder / "tiny.cpp"),), (folder / "tiny.h",))))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RLHF_FAST_CACHE", str(folder))
    return folder


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for each compilation from now on."""
    log = tmp_path / "compilations"
    log.touch()
    compiler = tmp_path / "counting-g++"
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return log


def count(compilations: Path) -> int:
    return len(compilations.read_text().splitlines())


def tiny(folder: Path, answer: int = 42, flags: tuple[str, ...] = ()) -> Library:
    folder.mkdir(exist_ok=True)
    (folder / "tiny.h").write_text(f"#define ANSWER {answer}\n")
    (folder / "tiny.cpp").write_text(
        '#include "tiny.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'
    )
    return Library("tiny", (Unit(folder / "tiny.cpp", flags),), (folder / "tiny.h",))


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_built_once_then_found(tmp_path: Path, cache: Path, compilations: Path) -> None:
    library = tiny(tmp_path / "source")
    assert build.find(library) is None
    path = build.build(library)
    assert answer(path) == 42
    assert path.is_relative_to(cache)
    assert build.find(library) == build.build(library) == path
    assert count(compilations) == 1
    assert sorted(file.name for file in path.parent.iterdir()) == ["facts.json", "tiny.so"]
    # no build folder is left, only the library, its lock and the compiler's output
    assert sorted(file.suffix for file in cache.iterdir()) == ["", ".lock", ".log"]


def test_header_decides_too(tmp_path: Path, compilations: Path) -> None:
    source = tmp_path / "source"
    first = build.build(tiny(source, 42))
    second = build.build(tiny(source, 43))
    assert (answer(first), answer(second)) == (42, 43)
    assert build.build(tiny(source, 42)) == first
    assert count(compilations) == 2


def test_flags_compiler_and_cpu_decide_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return build._key(build._facts(tiny(tmp_path / "source")))

    plain = key()
    assert key() == plain
    assert build._key(build._facts(tiny(tmp_path / "source", flags=("-O1",)))) != plain
    monkeypatch.setattr(build, "_cpu_flags", lambda: "x86_64 sse2")
    assert key() != plain
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "g++ -g")
    assert key() != plain


@pytest.mark.parametrize(
    ("cpu", "only"),
    [
        ("sse2 fma", "baseline"),
        ("sse2 avx2 fma", "baseline"),  # no f16c
        ("sse2 avx2 fma f16c avx512f", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
    ],
)
def test_native_is_the_best_set_of_this_cpu_alone(cpu: str, only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(build.INSTRUCTION_SETS) == 1:
        only = "baseline"
    monkeypatch.setattr(build, "_cpu_flags", lambda: f"x86_64 {cpu}")
    assert {unit.flags for unit in build.ops_library().units[1:]} == set(build.INSTRUCTION_SETS.values())
    monkeypatch.setenv("RLHF_FAST_NATIVE", "1")
    for library in (build.ops_library(), build.generation_library()):
        flags = [unit.flags for unit in library.units if unit.source.stem in ("gather_logprobs", "linear")]
        assert flags == [build.INSTRUCTION_SETS[only]]
    assert f"-DRLHF_FAST_ONLY={only}" in build._compile_flags()


def test_an_optimisation_level_in_cxx_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for command, levels in (("g++", ["-O3"]), ("g++ -O1", [])):
        monkeypatch.setenv("CXX", command)
        assert [flag for flag in build._compile_flags() if flag.startswith("-O")] == levels


def test_library_deleted_from_the_cache_comes_back(tmp_path: Path, compilations: Path) -> None:
    library = tiny(tmp_path / "source")
    path = build.build(library)
    path.unlink()
    assert build.build(library) == path
    assert path.exists()
    assert count(compilations) == 2


def test_folders_with_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "my $HOME: cache"))
    assert answer(build.build(tiny(tmp_path / "a b's $ource: 1"))) == 42


def start(source: Path, hold: Path | None = None) -> subprocess.Popen[str]:
    """A process that builds; given `hold`, its compiler stops half way, until let_go."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if hold is not None:
        os.mkfifo(f"{hold}.started")
        os.mkfifo(f"{hold}.go")
        environment["HOLD"] = str(hold)
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(source)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_it_compiles(hold: Path) -> None:
    reader = os.open(f"{hold}.started", os.O_RDONLY | os.O_NONBLOCK)
    ready, _, _ = select.select([reader], [], [], 60)
    os.close(reader)
    assert ready, "the compiler was not started"


def let_go(hold: Path) -> None:
    """Let a compiler that waits, if it still does, go on to its end."""
    with contextlib.suppress(OSError):  # nobody waits
        writer = os.open(f"{hold}.go", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"go\n")
        os.close(writer)


def test_two_processes_one_build(tmp_path: Path, compilations: Path) -> None:
    tiny(tmp_path / "source")
    first = start(tmp_path / "source", hold=tmp_path / "hold")
    try:
        wait_until_it_compiles(tmp_path / "hold")
        second = start(tmp_path / "source")
        assert second.stderr is not None
        assert "another process is building tiny" in second.stderr.readline()
    finally:
        let_go(tmp_path / "hold")
    paths = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert paths[0] == paths[1]
    assert answer(Path(paths[0].strip())) == 42
    assert count(compilations) == 1


def test_builder_killed_half_way(tmp_path: Path, cache: Path, compilations: Path) -> None:
    tiny(tmp_path / "source")
    first = start(tmp_path / "source", hold=tmp_path / "hold")
    try:
        wait_until_it_compiles(tmp_path / "hold")
        first.kill()
        assert first.wait(timeout=60) == -signal.SIGKILL
        left = [folder.name for folder in cache.iterdir() if folder.name.startswith(".tiny-")]
        assert len(left) == 1
        second = start(tmp_path / "source")
        path = second.communicate(timeout=60)[0].strip()
    finally:
        let_go(tmp_path / "hold")  # the killed builder's compiler outlives it
    assert second.returncode == 0
    assert answer(Path(path)) == 42
    assert count(compilations) == 2
    assert not any(folder.name.startswith(".tiny-") for folder in cache.iterdir())


def test_compiler_fails(tmp_path: Path, cache: Path) -> None:
    library = tiny(tmp_path / "source")
    library.units[0].source.write_text("int f() { return undeclared_name; }\n")
    with pytest.raises(BuildError) as caught:
        build.build(library)
    message = str(caught.value)
    assert "error: ‘undeclared_name’" in message or "error: 'undeclared_name'" in message
    assert 'backend="reference"' in message
    (log,) = cache.glob("*.log")
    assert str(log) in message
    assert "undeclared_name" in log.read_text()
    assert build.find(library) is None
    tiny(tmp_path / "source")
    assert answer(build.build(library)) == 42  # mended


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError) as caught:
        build.build(build.ops_library())
    message = str(caught.value)
    assert message.startswith("no C++ compiler: install one (Debian, Ubuntu: apt-get install g++")
    assert 'backend="reference"' in message
    assert "\n" not in message

    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(BuildError, match="CXX='no-such-compiler -O9': no such C"):
        build.build(build.ops_library())


def test_no_compiler_as_a_user_sees_it(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PATH", "CXX")}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_fast.cli", "build"],
        cwd=ROOT,
        env={**environment, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("rlhf-fast build: no C++ compiler: install one")
    assert "Traceback" not in done.stderr


def test_path_without_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "as", "ld"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    assert shutil.which("ninja") is None
    assert answer(build.build(tiny(tmp_path / "source"))) == 42


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="Set RLHF_FAST_CACHE to a folder that can be written"):
        build.build(tiny(tmp_path / "source"))


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "somewhere"
    monkeypatch.delenv("RLHF_FAST_CACHE")
    assert build.cache_folder() == tmp_path / ".cache" / "rlhf_fast"


# What the loaded ops say of themselves, and which OpenMP runtimes are in the process.
REPORT = """
import json, torch
from rlhf_fast.build import load_ops
load_ops()
load_ops()
torch.set_num_threads(3)
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(json.dumps({
    "threads": torch.ops.rlhf_fast.num_threads(),
    "set": torch.ops.rlhf_fast.instruction_set(),
    "openmp": sorted(file for file in files if any(name in file for name in ("libgomp", "libiomp", "libomp."))),
}))
"""


@pytest.mark.parametrize(("capability", "expected"), [("default", ["baseline"]), ("", list(build.INSTRUCTION_SETS))])
def test_threads_and_instruction_set(capability: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLHF_FAST_CACHE")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", REPORT], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["threads"] == 3  # 1 would mean that parallel_for was compiled without OpenMP
    assert report["set"] in expected
    assert len(report["openmp"]) <= 1


def test_slow_headers_are_not_included() -> None:
    for source in [*build.CSRC.rglob("*.cpp"), *build.CSRC.rglob("*.h")]:
        includes = [line for line in source.read_text().splitlines() if line.startswith("#include")]
        assert not any(
            slow in line for slow in ("torch/extension.h", "torch/all.h", "torch/torch.h") for line in includes
        )
        if source.parent.name == "cpu":  # plain pointers only
            assert not any(header in line for header in ("torch/", "ATen/", "c10/") for line in includes), source
