"""What limits the CPU kernels: instructions a number and, with --times, rates from memory and from the cache.

    python -m bench.profile.kernels            # instructions, counted by valgrind: any machine, busy or not
    python -m bench.profile.kernels --times    # an idle machine

Counted is the AVX2 build, as valgrind knows no AVX-512; timed is the best set of this CPU, on one thread. "From memory"
goes over 64 MB and more, "from the cache" over a few rows again and again. A kernel whose rate from the cache is below
that of a plain read from memory is limited by its arithmetic, however fast the memory is.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from rlhf_fast import build

FOLDER = Path(__file__).parent
# rows and columns: from memory, from the cache
LOGITS = ((512, 32_000), (2, 32_000))
TOKENS = ((4096, 1024), (16, 1024))
KERNELS = {
    "read": LOGITS,
    "write_back": LOGITS,
    "gather_logprobs": LOGITS,
    "gather_logprobs_with_entropy": LOGITS,
    "gather_logprobs_backward": LOGITS,
    "logits_ppo_loss": LOGITS,
    "logits_cross_entropy": LOGITS,
    "ppo_loss": TOKENS,
    "value_loss": TOKENS,
    "gae": TOKENS,
    "shaped_gae": TOKENS,
    "masked_whiten": TOKENS,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", action="store_true", help="also rates; for an idle machine")
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as folder:
        driver = compile_driver(Path(folder) / "counted", "avx2")
        rates = f"{'GB/s: memory':>16}{'cache':>10}" if times else ""
        print(f"{'kernel':<32}{'instructions a number':>24}{rates}")
        timed = compile_driver(Path(folder) / "timed", build.best_instruction_set()) if times else None
        for name, (large, small) in KERNELS.items():
            line = f"{name:<32}{instructions(driver, name, *small):24.2f}"
            if timed is not None:
                line += f"{rate(timed, name, *large, calls=9):16.1f}{rate(timed, name, *small, calls=2000):10.1f}"
            print(line, flush=True)


def compile_driver(program: Path, instruction_set: str) -> Path:
    """kernels.cpp and the kernels, compiled for that set alone."""
    sources = [FOLDER / "kernels.cpp", *sorted((build.CSRC / "cpu").glob("*.cpp"))]
    flags = ["-std=c++20", "-O3", f"-DRLHF_FAST_ONLY={instruction_set}", *build.INSTRUCTION_SETS[instruction_set]]
    subprocess.run([*build.compiler(), *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def instructions(program: Path, name: str, rows: int, columns: int) -> float:
    """Of one call more, a number."""
    (numbers, once), (_, twice) = (counted(program, name, rows, columns, calls) for calls in (1, 2))
    return (twice - once) / numbers


def counted(program: Path, name: str, rows: int, columns: int, calls: int) -> tuple[int, int]:
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, str(program), name, str(rows), str(columns), str(calls)], capture_output=True, text=True, check=True
    )
    found = re.search(r"I\s+refs:\s+([\d,]+)", done.stderr)
    assert found is not None, done.stderr
    return int(done.stdout.split()[0]), int(found[1].replace(",", ""))


def rate(program: Path, name: str, rows: int, columns: int, *, calls: int) -> float:
    """GB/s of the fastest call."""
    command = [str(program), name, str(rows), str(columns), str(calls)]
    _, moved, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(moved) / float(seconds) / 1e9


if __name__ == "__main__":
    main()
