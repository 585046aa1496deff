"""The CUDA library's build: what nvcc is asked for, on a machine without a GPU; and what is used without nvcc.

tests/cuda compiles and runs the sources themselves; a script stands for nvcc here.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_fast import build, build_cuda
from rlhf_fast.cli import main
from rlhf_fast.errors import BuildError, ConfigError
from rlhf_fast.generation import Generator, SamplingParams, cuda_backend
from tests.families import tiny_model

# Notes what it was told and writes an empty file where its output is to be.
NVCC = """#!/bin/sh
echo "$*" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler; the file returned gets a line for each of its runs."""
    log = tmp_path / "runs"
    program = tmp_path / "nvcc"
    program.write_text(NVCC.format(log=log))
    program.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(program))
    return log


def test_what_to_build_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build_cuda.architectures("80,90,80") == ["80", "90"]
    assert build_cuda.architectures() == build_cuda.present()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert build_cuda.architectures() == ["100", "80", "90"]
    assert build_cuda.architectures("120") == ["120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ConfigError, match=r"TORCH_CUDA_ARCH_LIST: expected numbers such as '8.0;9.0'; got 'Hopper'"):
        build_cuda.architectures()
    with pytest.raises(ConfigError, match="--cuda-arch: expected architectures such as 80,90; got 'sm_80'"):
        build_cuda.architectures("sm_80")


def test_a_library_for_each_architecture(nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "cache"))
    paths = [build.build(build_cuda.cuda_library(architecture)) for architecture in ("80", "90")]
    assert paths[0] != paths[1]
    sources = {path.name for path in (*build.CSRC.glob("cuda/*.cu"), *build.CSRC.glob("generation/cuda/*.cpp"))}
    for architecture in ("80", "90"):
        runs = [run for run in nvcc.read_text().splitlines() if f"code=sm_{architecture}" in run]
        compiled = {Path(run.split(" -c ")[1].split()[0]).name for run in runs if " -c " in run}
        assert compiled == sources
        assert sum("-shared" in run for run in runs) == 1
        assert all("--cudart=static" in run and "torch/include" not in run for run in runs)


def test_the_command(nvcc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--cuda-arch", "sm_80"]) == 2
    assert not nvcc.exists()
    assert main(["build", "--cuda-arch", "75"]) == 0
    output = capsys.readouterr().out
    assert "_ops: " in output
    assert "_generation: " in output
    assert "_generation_cuda sm_75: " in output
    shutil.rmtree(Path(output.split()[-1]).parent)  # it lies where real libraries do


def test_nvcc_else_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = tmp_path / "nvidia" / "cu13"
    for folder in ("bin", "lib", "include"):
        (cuda / folder).mkdir(parents=True)
    library, header, nvcc = cuda / "lib/libnvrtc.so.13", cuda / "include/cuda_bf16.h", cuda / "bin/nvcc"
    for file in (library, header, nvcc):
        file.touch()
    monkeypatch.syspath_prepend(str(tmp_path))  # where pip would put it
    monkeypatch.setattr(build_cuda, "_toolkits", list)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    expected = build_cuda.Nvrtc(library, cuda / "include")
    assert build_cuda.cuda_compiler() == expected
    nvcc.chmod(0o755)
    assert build_cuda.cuda_compiler() == str(nvcc)
    monkeypatch.setenv("CUDACXX", "nvrtc")
    assert build_cuda.cuda_compiler() == expected

    header.unlink()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    with pytest.raises(BuildError, match=r"not CUDA's header cuda_bf16.h: pip install nvidia-cuda-runtime"):
        build_cuda.cuda_compiler()
    nvcc.unlink()
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(BuildError, match=r"^no CUDA compiler: install .*\. NVRTC, .*: no libnvrtc.so.12: pip install"):
        build_cuda.cuda_compiler()


def test_without_nvcc_transformers_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    with pytest.raises(BuildError, match=r"CUDACXX='no-such-nvcc': no such compiler: install the CUDA toolkit"):
        build_cuda.load_cuda("80")

    monkeypatch.setattr(cuda_backend, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_backend, "architecture_of", lambda device: "80")
    generator, params = Generator(tiny_model("llama")), SamplingParams(max_tokens=2)
    with pytest.warns(UserWarning, match="transformers decodes instead of CUDA: CUDACXX='no-such-nvcc'"):
        generator.rollout([[3]], params)
    assert generator.stats.backend == "transformers"
    with pytest.raises(BuildError):
        Generator(generator.model, backend="cuda").rollout([[3]], params)


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a GPU says")
def test_it_builds_and_loads_where_no_gpu_is() -> None:
    """With the real nvcc."""
    with pytest.raises(BuildError, match="CUDA does not run: "):
        build_cuda.load_cuda("90")
