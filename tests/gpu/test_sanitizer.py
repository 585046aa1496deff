"""The decoder's small shapes once more under NVIDIA's compute-sanitizer, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = shutil.which("compute-sanitizer")

# A prompt of each kind, two rows, all filters: every kernel runs.
DECODE = """
import torch
from rlhf_fast.generation import Generator, SamplingParams, cuda_graphs
from tests.families import tiny_model
cuda_graphs.TIMES_BEFORE = 10**9
params = SamplingParams(n=2, max_tokens=4, top_p=0.9, top_k=20, repetition_penalty=1.1, seed=0)
for family in ("llama", "gpt2"):
    generator = Generator(tiny_model(family).cuda(), backend="cuda")
    generator.rollout([[5, 6, 7], list(range(2, 42))], params)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"] if PROGRAM else [])
def test_decoder_under(tool: str) -> None:
    # PyTorch's own kernels are not our business: racecheck looks at ours alone.
    ours = ["--kernel-regex", "kns=rlhf_fast"] if tool == "racecheck" else []
    command = [str(PROGRAM), "--tool", tool, "--error-exitcode", "9", *ours, sys.executable, "-c", DECODE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
