"""Installed otherwise than in place, and run from the root: sources travel, and `kernels` is not ours to name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast import build

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package installed from a wheel of a copy of this checkout, in a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "rlhf_fast"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "rlhf_fast", "kernels", "csrc"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    run("-m", "pip", "install", *options, str(source), cwd=source)
    return target


def test_wheel_has_all_sources(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for folder in ("csrc", "kernels")
            for path in (root / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }

    assert files(installed / "rlhf_fast") == files(ROOT)
    assert (installed / "rlhf_fast" / "py.typed").is_file()
    # links of a checkout, plain folders of a wheel
    assert (ROOT / "rlhf_fast" / "csrc").is_symlink()
    assert not (installed / "rlhf_fast" / "csrc").is_symlink()
    # nothing at the top level but the package
    assert [path.name for path in installed.iterdir() if not path.name.endswith((".dist-info", "bin"))] == ["rlhf_fast"]


INSTALLED = """
import torch, rlhf_fast
from rlhf_fast import build, ops
import rlhf_fast.kernels.gather_logprobs
print(rlhf_fast.__file__)
print(build.build(build.ops_library()))
print(ops.gather_logprobs(torch.zeros(1, 4), torch.tensor([2]), backend="cpp").exp().item())
"""


def test_installed_wheel_runs(installed: Path, tmp_path: Path) -> None:
    """It finds its sources, and they are the checkout's: the same library under the same key, not built again."""
    expected = build.build(build.ops_library())
    module, library, probability = run("-c", INSTALLED, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(module).is_relative_to(installed)
    assert Path(library) == expected
    assert float(probability) == pytest.approx(0.25)


def test_setup_does_not_import_torch() -> None:
    script = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']; "
    assert run("-c", script + "runpy.run_path('setup.py')", cwd=ROOT).split()[-1] == "0.1.0"


FROM_ROOT = """
import importlib.util
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec  # at most a bare folder, which any real package of that name beats
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
assert not is_kernels_available()
import torch
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
print(LlamaForCausalLM(config)(torch.tensor([[1, 2]])).logits.shape)
"""


def test_transformers_runs_from_the_root() -> None:
    assert run("-c", FROM_ROOT, cwd=ROOT) == "torch.Size([1, 2, 8])\n"


def test_installed_kernels_package_wins_from_the_root(tmp_path: Path) -> None:
    """Hugging Face's `kernels`, were it installed: it stands after the root on sys.path, and is found all the same."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("WHO = 'Hugging Face'\n")
    information = tmp_path / "kernels-99.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    script = """
import sys, kernels, rlhf_fast.kernels.gather_logprobs as ours
from transformers.utils.import_utils import _is_package_available
print(kernels.WHO, kernels.__file__, sys.path.index(""), ours.__file__, _is_package_available("kernels")[0])
"""
    who = run("-c", script, cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert who.startswith(f"Hugging Face {package / '__init__.py'} 0 ")
    assert str(ROOT) in who
    assert who.endswith("True\n")
