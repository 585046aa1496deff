"""A long run of the demo's PPO, watched from outside: memory, open files, threads and step time have to stay flat.

    python bench/soak.py --steps 500      (`make soak`, once `make demo` has been there)

Prints a table, one row for each fifth of the run, and how long a resume takes; exits with 1 if anything grew.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PERIODS = 5  # the first is warm-up: caches fill, allocators settle
GROWTH = 0.03  # of memory, from the second period to the last, that counts as flat


@dataclass
class Sample:
    """The process as it is after one step."""

    step: int
    rss_mb: float
    files: int
    threads: int
    seconds: float  # of the step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="recipes/demo/ppo.yaml")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"))
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    command = [sys.executable, "-m", "rlhf_fast.cli", "ppo", "--config", args.config, "--output_dir"]
    command += [str(args.output_dir), "save_steps=10", "eval_steps=20"]

    samples = watch([*command, f"max_steps={args.steps}"], args.output_dir / "metrics.jsonl")
    periods = [samples[i * len(samples) // PERIODS : (i + 1) * len(samples) // PERIODS] for i in range(PERIODS)]
    print("| steps | memory, MB | open files | threads | step, s |\n|---|---|---|---|---|")
    for period in periods:
        print(
            f"| {period[0].step}-{period[-1].step} | {statistics.median(s.rss_mb for s in period):.0f} "
            f"| {max(s.files for s in period)} | {max(s.threads for s in period)} "
            f"| {statistics.median(s.seconds for s in period):.2f} |"
        )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = watch([*command, f"max_steps={args.steps + 1}", "--resume"], args.output_dir / "metrics.jsonl")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"\nresume, one step, evaluation, export and report: {took:.1f} s of processor time "
        f"({again[-1].seconds:.2f} s on the clock for the step)"
    )
    return 0 if is_flat(periods) else 1


def watch(command: list[str], metrics: Path) -> list[Sample]:
    """Run a command to its end; a sample whenever metrics.jsonl has a new row."""
    with subprocess.Popen(command) as process:
        samples: list[Sample] = []
        seen = len(rows(metrics)) if "--resume" in command else 0
        while process.poll() is None:
            time.sleep(0.05)
            found = rows(metrics)
            if len(found) > seen:
                seen = len(found)
                sample = look(process.pid, json.loads(found[-1]))
                samples += [sample] if sample else []
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}")
    return samples


def rows(metrics: Path) -> list[bytes]:
    """The whole lines of the file."""
    if not metrics.exists():
        return []
    return [line for line in metrics.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def look(pid: int, row: dict[str, float]) -> Sample | None:
    """What /proc says of the process; None if it has just ended."""
    proc = Path("/proc") / str(pid)
    try:
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        files = len(list((proc / "fd").iterdir()))
        return Sample(
            int(row["step"]), int(status["VmRSS"].split()[0]) / 1000, files, int(status["Threads"]), row["time/step"]
        )
    except (OSError, KeyError):
        return None


def is_flat(periods: list[list[Sample]]) -> bool:
    """Step time is not judged: on a busy machine it says nothing."""
    second, last = periods[1], periods[-1]
    memory = [statistics.median(s.rss_mb for s in period) for period in (second, last)]
    return (
        memory[1] <= memory[0] * (1 + GROWTH)
        and max(s.files for s in last) <= max(s.files for s in second)
        and max(s.threads for s in last) <= max(s.threads for s in second)
    )


if __name__ == "__main__":
    sys.exit(main())
