"""Compiles the decoder's CUDA library, one for each GPU architecture, and loads it.

nvcc compiles it where there is one, else NVRTC, which comes with CUDA builds of PyTorch, and the C++ compiler
(rlhf_fast/nvrtc.py). The library has no Python and no torch in it, and needs nothing of CUDA but the driver: it builds
and loads on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_fast.build import CSRC, Library, Toolchain, Unit, build, compiler
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
        lambda: cuda_toolchain(architecture),
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

    Raises BuildError: there is no compiler, or it failed; or CUDA does not run, as with a driver that is too old.
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


@dataclass(frozen=True)
class Nvrtc:
    library: Path
    headers: Path  # the folder of CUDA's headers


def cuda_compiler() -> str | Nvrtc:
    """nvcc's path where it is found, else NVRTC; CUDACXX=nvrtc asks for the latter. Raises BuildError."""
    chosen = os.environ.get("CUDACXX")
    if chosen == "nvrtc":
        return nvrtc()
    try:
        return nvcc()
    except BuildError as error:
        if chosen:
            raise
        try:
            return nvrtc()
        except BuildError as other:
            raise BuildError(f"{error}. NVRTC, which would do too, is not there: {other}") from other


def cuda_toolchain(architecture: str) -> Toolchain:
    """What compiles for one architecture. Raises BuildError where there is no compiler."""
    found = cuda_compiler()
    return nvrtc_toolchain(found, architecture) if isinstance(found, Nvrtc) else nvcc_toolchain(found, architecture)


def nvcc_toolchain(program: str, architecture: str) -> Toolchain:
    common = ("--cudart=static", f"-gencode=arch=compute_{architecture},code=sm_{architecture}")
    return Toolchain(
        (program,),
        ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", _abi(), *common),
        ("-shared", *common),
    )


def nvrtc_toolchain(found: Nvrtc, architecture: str) -> Toolchain:
    """Raises BuildError where there is no C++ compiler."""
    program = Path(__file__).with_name("nvrtc.py")
    options = ("--library", str(found.library), "--include", str(found.headers))
    common = ("-O2", "-fPIC", "-fvisibility=hidden")
    return Toolchain(
        (sys.executable, "-I", str(program), *options, *compiler()),
        ("-std=c++20", *common, _abi(), f"--architecture=sm_{architecture}", "-Wno-unknown-pragmas"),
        ("-shared", *common),
    )


def _abi() -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"


def nvcc() -> str:
    """CUDA's compiler: $CUDACXX, or on PATH, in $CUDA_HOME, where CUDA's installer and where pip put it."""
    chosen = os.environ.get("CUDACXX")
    folders = [os.environ.get("PATH", ""), *(str(folder / "bin") for folder in (*_toolkits(), *_packages()))]
    program = shutil.which(chosen or "nvcc", path=os.pathsep.join(folders))
    if program is None:
        what = f"CUDACXX={chosen!r}: no such compiler" if chosen else "no CUDA compiler"
        raise BuildError(
            f"{what}: install the CUDA toolkit, or pip install nvidia-cuda-nvcc, in the version of torch's CUDA "
            f"({torch.version.cuda or 'this torch has none'}), or set CUDA_HOME"
        )
    return program


def nvrtc() -> Nvrtc:
    """CUDA's compiler as a library: where pip put it, as it does with PyTorch, or CUDA's installer."""
    major = (torch.version.cuda or "*").partition(".")[0]  # what the driver runs, which PyTorch's own must be
    suffix = "-cu12" if major == "12" else ""  # of pip's packages
    folders = [*_packages(), *_toolkits()]
    libraries = [
        path for folder in folders for name in ("lib", "lib64") for path in folder.glob(f"{name}/libnvrtc.so.{major}")
    ]
    if not libraries:
        raise BuildError(f"no libnvrtc.so.{major}: pip install nvidia-cuda-nvrtc{suffix}")
    includes = [folder / "include" for folder in folders]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        includes.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    headers = next((folder for folder in includes if (folder / "cuda_bf16.h").exists()), None)
    if headers is None:
        raise BuildError(
            f"{libraries[0]} is there, but not CUDA's header cuda_bf16.h: pip install nvidia-cuda-runtime{suffix}"
        )
    return Nvrtc(libraries[0], headers)


def _toolkits() -> list[Path]:
    """Where CUDA's installer puts bin, lib64 and include."""
    return [Path(folder) for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]


def _packages() -> list[Path]:
    """Where pip puts parts of CUDA: since CUDA 13 in one folder, before that each in its own."""
    found = importlib.util.find_spec("nvidia")
    folders = (found.submodule_search_locations or ()) if found else ()
    return [path for folder in folders for path in sorted(Path(folder).iterdir()) if path.is_dir()]
