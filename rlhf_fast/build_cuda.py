"""Compiles the decoder's CUDA library with nvcc, one for each GPU architecture, and loads it.

The library has no Python and no torch in it, and CUDA's runtime is linked into it: it builds and loads on a machine
without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
from pathlib import Path

import torch

from rlhf_fast.build import CSRC, Library, Toolchain, Unit, build
from rlhf_fast.errors import BuildError, ConfigError


def cuda_library(architecture: str) -> Library:
    """The GPU decoder for one architecture: "90" is compute capability 9.0."""
    kernels, host = CSRC / "cuda", CSRC / "generation" / "cuda"
    sources = [*sorted(kernels.glob("*.cu")), *sorted(host.glob("*.cpp"))]
    headers = [header for folder in ("cuda", "cpu", "generation") for header in sorted((CSRC / folder).rglob("*.h"))]
    return Library(
        "_generation_cuda",
        tuple(Unit(source) for source in sources),
        tuple(headers),
        lambda: nvcc_toolchain(architecture),
    )


def architectures(chosen: str | None = None) -> list[str]:
    """What to build for: `chosen`, such as "80,90", else TORCH_CUDA_ARCH_LIST, else the GPUs that are there."""
    if chosen is not None:
        if not re.fullmatch(r"\d{2,3}(,\d{2,3})*", chosen):
            raise ConfigError(f"--cuda-arch: expected architectures such as 80,90; got {chosen!r}")
        return list(dict.fromkeys(chosen.split(",")))
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        return present()
    found = [re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name) for name in listed]
    if None in found:
        raise ConfigError(f"TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0'; got {' '.join(listed)!r}")
    return sorted({f"{match[1]}{match[2]}" for match in found if match})


def present() -> list[str]:
    """Of the GPUs that are there."""
    return sorted({architecture_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())})


def architecture_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


@functools.cache
def load_cuda(architecture: str) -> int:
    """The address of rlhf_fast_cuda_backend, for the C++ decoder. The library is built if it is not in the cache.

    Raises BuildError: there is no nvcc, or it failed; or CUDA does not run, as with a driver that is too old.
    """
    path = build(cuda_library(architecture))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}. Delete {path.parent} to build it again.") from error
    library.rlhf_fast_cuda_problem.restype = ctypes.c_char_p
    problem = library.rlhf_fast_cuda_problem()
    if problem:
        raise BuildError(f"CUDA does not run: {problem.decode()}")
    address = ctypes.cast(library.rlhf_fast_cuda_backend, ctypes.c_void_p).value
    assert address is not None
    return address


def nvcc_toolchain(architecture: str) -> Toolchain:
    """nvcc for one architecture. Raises BuildError where there is none."""
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    common = ("--cudart=static", f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    return Toolchain(
        (nvcc(),),
        ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", abi, *common),
        ("-shared", *common),
    )


def nvcc() -> str:
    """CUDA's compiler: $CUDACXX, or on PATH, in $CUDA_HOME, where CUDA's installer and where pip put it."""
    chosen = os.environ.get("CUDACXX")
    folders = [os.environ.get("PATH", "")]
    if os.environ.get("CUDA_HOME"):
        folders.append(str(Path(os.environ["CUDA_HOME"]) / "bin"))
    folders.append("/usr/local/cuda/bin")
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages else ():
        folders += map(str, sorted(Path(folder).glob("*/bin")))
    program = shutil.which(chosen or "nvcc", path=os.pathsep.join(folders))
    if program is None:
        what = f"CUDACXX={chosen!r}: no such compiler" if chosen else "no CUDA compiler"
        raise BuildError(
            f"{what}: install the CUDA toolkit, or pip install nvidia-cuda-nvcc, in the version of torch's CUDA "
            f"({torch.version.cuda or 'this torch has none'}), or set CUDA_HOME"
        )
    return program
