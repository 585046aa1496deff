"""The doctor says what is there, finds what is broken, and its exit status tells scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_fast import doctor


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.doctor()}


def test_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    output = capsys.readouterr().out
    assert output.endswith("\nReady.\n")
    packages = ("torch", "transformers", "deepspeed", "triton")
    for name in ("python", *packages, "gpu", "CUDA compiler", "compiler", "ninja", "cache"):
        assert f"\n{name} " in f"\n{output}"
    assert torch.__version__ in output
    assert f"{torch.ops.rlhf_fast.num_threads()} shared the work" in output
    assert torch.ops.rlhf_fast.instruction_set() in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the main job runs without the C++ ops")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert "-> no C++ compiler: install one" in output
    assert output.endswith("\nNot ready: compiler, C++ ops\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the main job runs without the C++ ops")
def test_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_FAST_CACHE", str(tmp_path / "file" / "cache"))
    found = by_name()["C++ ops"]
    assert found.status == "problem"
    assert "Set RLHF_FAST_CACHE" in found.advice


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, too old, and present but broken, each with what to type."""
    information = tmp_path / "brokenpackage-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenpackage\nVersion: 1.5\n")
    (tmp_path / "brokenpackage.py").write_text("raise OSError('libfoo.so: no such file')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])

    absent = doctor._package("no_such_package", "1")
    assert (absent.status, absent.advice) == ("missing", "pip install 'no_such_package>=1'")
    broken = doctor._package("brokenpackage", "1")
    assert broken.status == "problem"
    assert "OSError: libfoo.so: no such file" in broken.found
    old = doctor._package("transformers", "99")
    assert (old.status, old.advice) == ("problem", "pip install 'transformers>=99'")


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [
        ("2.13.0+cpu", "2.11", True),
        ("2.9.1", "2.11", False),
        ("5.24.0", "5", True),
        ("4.57", "5", False),
        ("3.10", "3.6", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, minimum: str, enough: bool) -> None:
    assert doctor._at_least(version, minimum) is enough


def test_what_compiles_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "nvrtc")
    assert doctor._cuda_compiler().found.startswith("NVRTC, /")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    found = doctor._cuda_compiler()
    assert (found.status, found.found) == ("optional", "none; with a GPU transformers decodes")


def test_fewer_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    doctor.build.load_ops()
    found = doctor._threads()
    assert (found.status, found.advice) == ("optional", "OMP_NUM_THREADS is 1")
