"""Without nvcc: what NVRTC makes of the kernels, and the library that launches them, on the emulated device.

That device's driver (driver_on_cpu.cpp) runs a kernel's own source where a GPU would run its cubin.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.generation.decode_on_paper import Decoder, kernels
from rlhf_fast import build, build_cuda, nvrtc
from rlhf_fast.generation import Generator, SamplingParams, cuda_backend
from tests.cuda import decoder
from tests.cuda.ptxas import check_registers, readable, resources
from tests.cuda.test_nvcc import ARCHITECTURES, SOURCES, by_nvcc
from tests.cuda_on_cpu import build as emulated
from tests.families import tiny_model

HERE = Path(__file__).parent
PROMPTS = [[5, 6, 7], [9], list(range(2, 42))]


@cache
def decoder_by(found: build_cuda.Nvrtc) -> ctypes.CDLL:
    """The decoder's library, with the emulated device's driver."""
    chain = build_cuda.nvrtc_toolchain(found, "90")
    driver = f'-DRLHF_FAST_LIBCUDA="{decoder.library()._name}"'
    chain = dataclasses.replace(chain, link_flags=(*chain.link_flags, driver))
    library = dataclasses.replace(build_cuda.cuda_library("90"), toolchain=lambda: chain)
    return ctypes.CDLL(str(build.build(library)))


@cache
def without_device_code() -> ctypes.CDLL:
    """The same by an NVRTC that compiles nothing: the host half, in seconds."""
    return decoder_by(build_cuda.Nvrtc(emulated.kernels(emulated.PLAIN, [HERE / "nvrtc_on_cpu.cpp"]), HERE))


def check(
    library: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
    model: torch.nn.Module,
    prompts: list[list[int]] = PROMPTS,
    **params: Any,
) -> int:
    """A rollout has the emulated library's bits. Returns how many kernels it launched through the driver."""
    monkeypatch.setattr(cuda_backend, "DEVICE", "cpu")
    library.rlhf_fast_cuda_problem.restype = ctypes.c_char_p
    assert library.rlhf_fast_cuda_problem() is None
    launches = ctypes.c_int.in_dll(decoder.library(), "launches")
    rollouts = []
    for one in (decoder.library(), library):
        launches.value = 0
        address = ctypes.cast(one.rlhf_fast_cuda_backend, ctypes.c_void_p).value
        monkeypatch.setattr(cuda_backend, "library_for", lambda device, address=address: address)
        rollouts.append(Generator(model, backend="cuda").rollout(prompts, SamplingParams(**params)))
    assert launches.value >= 12
    for name in ("tokens", "logprobs", "sampled_logprobs"):
        assert torch.equal(getattr(rollouts[0], name), getattr(rollouts[1], name))
    return launches.value


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"n": 2, "max_tokens": 4, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2}
    check(without_device_code(), monkeypatch, tiny_model(family, dtype), **params)


def test_much_shared_memory_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a norm's row of 50,176 bytes."""
    model = tiny_model("llama", hidden_size=12544, head_dim=8, num_hidden_layers=1, intermediate_size=16)
    check(without_device_code(), monkeypatch, model, [[9]], max_tokens=1, seed=1)


def test_a_step_launches_what_the_model_on_paper_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/performance.md: one step more has as many launches. Behind position 128 attention has two passes."""
    model = tiny_model("llama", num_hidden_layers=3, max_position_embeddings=256)
    three, four = (
        check(without_device_code(), monkeypatch, model, [[3] * 150], max_tokens=tokens, seed=1) for tokens in (3, 4)
    )
    paper = Decoder("tiny", 32, layers=3, query_heads=4, key_value_heads=2, head_size=8, inner=64, vocabulary=96)
    assert four - three == sum(kernel.launches for kernel in kernels(paper, 1, 151))


def test_it_shows_two_functions() -> None:
    assert exported(Path(without_device_code()._name)) == {"rlhf_fast_cuda_backend", "rlhf_fast_cuda_problem"}


def exported(library: Path) -> set[str]:
    """Functions and variables, without the C++ library's templates, which are weak."""
    listed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    return {name for _, kind, name in map(str.split, listed.stdout.splitlines()) if kind in "TDB"}


FUNCTIONS = [
    *("cuInit", "cuDeviceGetCount", "cuCtxGetDevice", "cuMemcpyAsync", "cuStreamSynchronize", "cuLibraryLoadData"),
    *("cuLibraryGetKernel", "cuKernelSetAttribute", "cuLaunchKernel"),
]
WORDS = 'int cuGetErrorString(int error, const char** text) { *text = "no GPU is detected"; return error != 100; }'


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (None, "no NVIDIA driver: there is no "),
        ("int cuInit() { return 0; }", "the NVIDIA driver is older than CUDA 12"),
        ("".join(f"int {name}() {{ return 100; }}" for name in FUNCTIONS) + WORDS, "no GPU is detected"),
    ],
    ids=["absent", "old", "no GPU"],
)
def test_why_cuda_does_not_run(driver: str | None, problem: str, tmp_path: Path) -> None:
    libcuda, source, library = (tmp_path / name for name in ("libcuda.so", "driver.cpp", "problem.so"))
    compile_library = [*build.compiler(), "-std=c++20", "-shared", "-fPIC"]
    if driver is not None:
        source.write_text(f'extern "C" {{ {driver} }}')
        subprocess.run([*compile_library, source, "-o", libcuda], check=True)
    sources = [nvrtc.RUNTIME / "driver.cpp", decoder.HOST / "memory.cpp"]
    options = [f'-DRLHF_FAST_LIBCUDA="{libcuda}"', f"-I{nvrtc.RUNTIME}", "-ldl"]
    subprocess.run([*compile_library, *sources, *options, "-o", library], check=True)
    function = ctypes.CDLL(str(library))._ZN9rlhf_fast4cuda7problemEv
    function.restype = ctypes.c_char_p
    assert function().decode().startswith(problem)


def by_nvrtc(source: str, architecture: str, folder: Path) -> dict[str, dict[str, int]]:
    """The resources of all kernels that the file launches."""
    found = build_cuda.nvrtc()
    path, host_half = emulated.KERNELS / source, folder / "host.o"
    options = ["-std=c++20", "-O2", "-w", "-DRLHF_FAST_NVRTC_HOST", f"-I{emulated.KERNELS}", "-x", "c++"]
    subprocess.run([*build.compiler(), *options, "-c", path, "-o", host_half], check=True)
    names = list(nvrtc.kernels_of(host_half.read_bytes()).values())
    compiler = nvrtc.Compiler(found.library)
    cubin, symbols, said = compiler.compile(
        path, architecture, [emulated.KERNELS, found.headers], names, "--ptxas-options=-v"
    )
    table = resources(said)
    assert set(symbols) == set(table)
    assert all(symbol.encode() in cubin for symbol in symbols)
    return table


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles(architecture: str, tmp_path: Path) -> None:
    """A small file. The others are in test_nvrtc_compiles_what_nvcc_does, which is slow."""
    table = by_nvrtc("embedding.cu", architecture, tmp_path)
    types, flags = ("float", "__nv_bfloat16", "__half"), ("false", "true")
    assert sorted(readable(list(table))) == sorted(f"embed_kernel<{t}, {flag}>" for t in types for flag in flags)
    check_registers(table, f"embedding.cu {architecture}")


def test_nvrtc_compiles_what_make_test_gpu_runs(tmp_path: Path) -> None:
    table = by_nvrtc(str(HERE.parent / "gpu" / "matrix_layout.cu"), "sm_90", tmp_path)
    names = [f"multiply_kernel<{t}>" for t in ("__half", "__nv_bfloat16")]
    assert sorted(readable(list(table))) == ["load_kernel<false>", "load_kernel<true>", *names]


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", [source for source in SOURCES if source != "last_error.cu"])
def test_nvrtc_compiles_what_nvcc_does(source: str, architecture: str, tmp_path: Path) -> None:
    table = by_nvrtc(source, architecture, tmp_path)
    assert sorted(readable(list(table))) == sorted(readable(list(by_nvcc(source, architecture, tmp_path))))
    check_registers(table, f"{source} {architecture}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_launches_of_what_nvrtc_compiled(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole library. The driver knows kernels by their names in the cubins."""
    library = decoder_by(build_cuda.nvrtc())
    check(library, monkeypatch, tiny_model(family), n=2, max_tokens=4, seed=1, top_p=0.9, repetition_penalty=1.2)


@pytest.mark.slow
@pytest.mark.nvcc
def test_it_shows_what_nvccs_shows() -> None:
    chain = build_cuda.nvcc_toolchain(build_cuda.nvcc(), "90")
    theirs = build.build(dataclasses.replace(build_cuda.cuda_library("90"), toolchain=lambda: chain))
    assert exported(Path(decoder_by(build_cuda.nvrtc())._name)) == exported(theirs)


def test_names_of_kernels() -> None:
    said = {
        b"const char* kernel_name() [with auto kKernel = a::{anonymous}::f<float, 8, true>]": "a::f<float, 8, true>",
        b"const char* kernel_name() [with auto kKernel = plain]": "plain",
    }
    found = nvrtc.kernels_of(b"\0\1" + b"\0".join(said) + b"\0")
    assert found == {name.decode(): kernel for name, kernel in said.items()}
    assert nvrtc.kernels_of(b"no kernel") == {}
    with pytest.raises(nvrtc.CompileError, match=r"it takes g\+\+"):
        nvrtc.kernels_of(b"const char *kernel_name() [kKernel = &a::(anonymous namespace)::f]\0")
