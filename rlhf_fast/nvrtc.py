"""A stand-in for nvcc, made of g++ and NVRTC, the library that compiles CUDA and comes with PyTorch.

    python nvrtc.py --library libnvrtc.so.13 --include FOLDER g++ [--architecture sm_90] ... -c norm.cu -o norm.o

Everything but the options above is a command line of g++, which ends as shown. Of a .cu file that makes
the host half, the launchers, and reads the kernels that they launch, which it names in the object
(csrc/cuda/nvrtc/launch.h). NVRTC then makes a cubin with these kernels, which joins the object. Linking adds
csrc/cuda/nvrtc/driver.cpp, which launches them.

A program of its own, so that ninja runs several at a time: it imports nothing of the package.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_size_t, c_void_p
from pathlib import Path

HERE = Path(__file__).resolve()
RUNTIME = HERE.parent / "csrc" / "cuda" / "nvrtc"

# NVRTC has no C++ library: of its headers these may be included, and std.h has what kernels use of them.
STANDARD = ("algorithm", "cmath", "cstdint", "stdexcept", "string", "type_traits")

IMAGE = """
#include "launch.h"
asm(".section .rodata\\n.balign 64\\ncubin: .incbin \\"{cubin}\\"\\n.text");
extern "C" __attribute__((visibility("hidden"))) const char cubin[];
static const rlhf_fast::cuda::Image image(cubin, {{{kernels}}});
"""


class Compiler:
    """NVRTC. Raises OSError where it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # it asks for it by name alone
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = c_char_p

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(
        self, source: Path, architecture: str, includes: Sequence[Path], kernels: Sequence[str], *options: str
    ) -> tuple[bytes, list[str], str]:
        """A cubin with these kernels, such as "norm_kernel<float>", their names in it, and what the compiler said.

        `includes`: folders of headers, CUDA's among them. Raises CompileError with what it said.
        """
        folders = [f"-I{folder}" for folder in (RUNTIME, source.parent, *includes)]
        options = (f"-arch={architecture}", "-std=c++20", "-default-device", *folders, *options)
        headers = (c_char_p * len(STANDARD))(*[b'#include "std.h"'] * len(STANDARD))
        names = (c_char_p * len(STANDARD))(*map(str.encode, STANDARD))
        program = c_void_p()
        text, name = source.read_bytes(), str(source).encode()
        self._call("nvrtcCreateProgram", byref(program), text, name, len(STANDARD), headers, names)
        for kernel in kernels:
            self._call("nvrtcAddNameExpression", program, kernel.encode())
        told = (c_char_p * len(options))(*map(str.encode, options))
        status = self._library.nvrtcCompileProgram(program, len(options), told)
        said = self._text(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace")
        if status:
            raise CompileError(said or self._library.nvrtcGetErrorString(status).decode())
        symbols = []
        for kernel in kernels:
            symbol = c_char_p()
            self._call("nvrtcGetLoweredName", program, kernel.encode(), byref(symbol))
            symbols.append((symbol.value or b"").decode())
        cubin = self._text(program, "nvrtcGetCUBIN")
        self._call("nvrtcDestroyProgram", byref(program))
        return cubin, symbols, said

    def _text(self, program: c_void_p, function: str) -> bytes:
        size = c_size_t()
        self._call(f"{function}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = self._library[function](*arguments)
        if status:
            raise CompileError(f"{function}: {self._library.nvrtcGetErrorString(status).decode()}")


class CompileError(Exception):
    """NVRTC's own words."""


def kernels_of(host_half: bytes) -> dict[str, str]:
    """What kernel_name() says -> the kernel's name in C++, for all kernels that g++'s object launches.

    Raises CompileError: another compiler, such as clang, which leaves the arguments of templates out.
    """
    said = rb"(const char\* kernel_name\(\) \[with auto kKernel = ([^\0]*)\])\0"
    kernels = {text.decode(): name.decode().replace("{anonymous}::", "") for text, name in re.findall(said, host_half)}
    if len(kernels) != host_half.count(b"kernel_name() ["):
        raise CompileError("error: beside NVRTC it takes g++, or nvcc with any C++ compiler: set CXX to g++")
    return kernels


def compile_cuda(nvrtc: Compiler, architecture: str, include: Path, command: list[str]) -> None:
    """`command` ends with -c SOURCE -o OBJECT. Raises CompileError and CalledProcessError."""
    compiler, source, made = command[:-4], Path(command[-3]), Path(command[-1])
    subprocess.run([*compiler, "-x", "c++", *command[-4:]], check=True)
    kernels = kernels_of(made.read_bytes())
    if not kernels:
        return
    includes = [Path(word[2:]) for word in compiler if word.startswith("-I")]
    cubin, symbols, said = nvrtc.compile(source, architecture, [*includes, include], list(kernels.values()))
    print(said, end="")
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        work = Path(folder)
        (work / "kernels.cubin").write_bytes(cubin)
        names = ", ".join(f'{{"{name}", "{symbol}"}}' for name, symbol in zip(kernels, symbols, strict=True))
        (work / "image.cpp").write_text(IMAGE.format(cubin=work / "kernels.cubin", kernels=names))
        image, host = str(work / "image.o"), str(made.rename(work / "host.o"))
        subprocess.run([*compiler, "-c", str(work / "image.cpp"), "-o", image], check=True)
        subprocess.run([*compiler, "-r", "-nostdlib", host, image, "-o", str(made)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--include", type=Path, required=True)
    parser.add_argument("--architecture")
    options, command = parser.parse_known_args()
    nvrtc = Compiler(options.library)
    if "--version" in command:
        own = hashlib.sha256(b"".join(path.read_bytes() for path in (HERE, *sorted(RUNTIME.iterdir())))).hexdigest()
        print(f"NVRTC {nvrtc.version()}, {options.library.stat().st_size} bytes, {own}", flush=True)
        return subprocess.run(command, check=False).returncode
    try:
        if "-c" not in command:
            subprocess.run([*command, "-std=c++20", str(RUNTIME / "driver.cpp"), "-ldl"], check=True)
            return 0
        command[-4:-4] = ["-DRLHF_FAST_NVRTC_HOST", f"-I{RUNTIME}"]
        if command[-3].endswith(".cu"):
            compile_cuda(nvrtc, options.architecture, options.include, command)
        else:
            subprocess.run(command, check=True)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
