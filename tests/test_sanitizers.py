"""The C++ kernels' tests once more, with every memory access and every arithmetic operation watched.

The libraries are compiled with AddressSanitizer and UndefinedBehaviorSanitizer into a cache of their own, for the
instruction set that this CPU runs and no other; tensors come from malloc, so one element past the end of one is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("g++")
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# files, and which tests of them
OPS = (["tests/ops"], "cpp")
DECODER = (
    [
        *(f"tests/generation/test_{name}.py" for name in ("linear", "generator", "lora")),
        *(f"tests/generation/test_cpp_{name}.py" for name in ("sampler", "backend", "interruptions", "long_runs")),
    ],
    "linear or sampler or cpp_backend or stop_string or stop_watcher or those_of_peft or bad_requests or cache_below "
    "or hundreds or long_rows",
)
# What says nothing of memory: torch.compile, opcheck, ranks, frequencies, Triton; rows so far apart that the
# sanitizers' own bookkeeping takes gigabytes; two of three families in half precision.
WITHOUT = ["compiled", "opcheck", "ranks", "frequencies", "triton", "aot", "other_instruction"]
WITHOUT += ["beyond_32_bits", "qwen3-torch", "mistral-torch"]

pytestmark = pytest.mark.sanitizers


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def environment(cache: Path) -> dict[str, str]:
    assert COMPILER is not None
    # With the C++ library at its side from the start: exceptions are thrown through both.
    preload = [_found_by_compiler(COMPILER, name) for name in ("libasan.so", "libstdc++.so.6")]
    prefix = "ccache " if "ccache" in os.environ.get("CXX", "") else ""
    return os.environ | {
        "CXX": f"{prefix}{COMPILER} -O1 -g1 {SANITIZERS}",
        "RLHF_FAST_NATIVE": "1",
        "RLHF_FAST_CACHE": str(cache),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # on a busy machine threads that spin would take the time from those that work
    }


def _found_by_compiler(compiler: str, library: str) -> str:
    command = [compiler, f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("files", "which"), [OPS, DECODER], ids=["ops", "decoder"])
def test_kernels_under_sanitizers(files: list[str], which: str, cache: Path) -> None:
    which = f"({which}) and not ({' or '.join(WITHOUT)})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, "-k", which]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(cache), capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


# name: what an argument within bounds gives, what one beyond does, what is said of it
FAULTS = {
    "wild read": ("float f(const float* x, long n) { return x[n]; }", "(p, 999)", "(p, 1000)", "heap-buffer-overflow"),
    "overflow": ("int f(int n) { return n + 1; }", "(1,)", "(2**31 - 1,)", "signed integer overflow"),
}
CALL = """
import ctypes, torch
x = torch.zeros(1000)
p = ctypes.c_void_p(x.data_ptr())
ctypes.CDLL({library!r}).f(*{arguments})
"""


@pytest.mark.parametrize(("source", "right", "wrong", "says"), FAULTS.values(), ids=FAULTS)
def test_they_would_see(source: str, right: str, wrong: str, says: str, cache: Path, tmp_path: Path) -> None:
    """Else the tests above could pass without watching anything."""
    file, library = tmp_path / "fault.cpp", tmp_path / "fault.so"
    file.write_text(f'extern "C" {source}\n')
    env = environment(cache)
    subprocess.run(f"{env['CXX']} -shared -fPIC -o {library} {file}", shell=True, check=True, timeout=60)
    for arguments, code in ((right, 0), (wrong, 1)):
        call = CALL.format(library=str(library), arguments=arguments)
        command = [sys.executable, "-c", call]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr[-2000:]
        assert (says in done.stderr) == (code == 1)
