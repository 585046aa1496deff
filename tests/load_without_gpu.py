"""`make build-cuda-torch`: with a CUDA build of torch all libraries load, and the GPU's says what it misses."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from rlhf_fast import build, build_cuda
from rlhf_fast.errors import BuildError


def said(architecture: str) -> str:
    try:
        return f"loaded, {build_cuda.load_cuda(architecture):#x}"
    except BuildError as error:
        return str(error)


if __name__ == "__main__":
    build.load_ops()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}; decoder: {build.load_generation().instruction_set()}")
    for architecture in ("80", "90", "100"):
        print(f"sm_{architecture}: {said(architecture)}")
        if not said(architecture).startswith(("loaded", "CUDA does not run")):
            sys.exit(1)
