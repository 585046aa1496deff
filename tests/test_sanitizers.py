"""The C++ kernels' tests once more, with every memory access and every arithmetic operation watched.

The libraries are compiled with AddressSanitizer and UndefinedBehaviorSanitizer into a cache of their own; tensors come
from malloc, so one element past the end of one is seen.
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
TESTS = [
    "tests/ops",
    "tests/generation/test_linear.py",
    "tests/generation/test_cpp_sampler.py",
    "tests/generation/test_cpp_backend.py",
    # What torch.compile, opcheck and Triton do is slow here and no business of these kernels.
    "-k",
    "(cpp or test_linear) and not compiled and not opcheck and not triton and not other_instruction and not aot",
]

pytestmark = pytest.mark.sanitizers


def environment(cache: Path) -> dict[str, str]:
    assert COMPILER is not None
    # With the C++ library at its side from the start: exceptions are thrown through both.
    preload = [_found_by_compiler(COMPILER, name) for name in ("libasan.so", "libstdc++.so.6")]
    sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
    prefix = "ccache " if "ccache" in os.environ.get("CXX", "") else ""
    return os.environ | {
        "CXX": f"{prefix}{COMPILER} {sanitizers}",
        "RLHF_FAST_CACHE": str(cache),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "OMP_NUM_THREADS": "2",
    }


def _found_by_compiler(compiler: str, library: str) -> str:
    command = [compiler, f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


def test_they_would_see_a_wild_read(tmp_path: Path) -> None:
    """Else the test above could pass without watching anything."""
    source, library = tmp_path / "wild.cpp", tmp_path / "wild.so"
    source.write_text('extern "C" float last(const float* x, long n) { return x[n]; }\n')
    env = environment(tmp_path)
    compile_it = f"{env['CXX']} -shared -fPIC -o {library} {source}"
    subprocess.run(compile_it, shell=True, check=True, env=os.environ, timeout=60)
    read = (
        "import ctypes, torch; x = torch.zeros(1000); "
        f"f = ctypes.CDLL('{library}').last; f.restype = ctypes.c_float; "
        "f(ctypes.c_void_p(x.data_ptr()), ctypes.c_long({n}))"
    )
    for n, code in ((999, 0), (1000, 1)):
        done = subprocess.run(
            [sys.executable, "-c", read.format(n=n)], env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, done.stderr[-2000:]
        assert ("heap-buffer-overflow" in done.stderr) == (code == 1)
