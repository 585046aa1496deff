"""The house rules that folders can show: one stem everywhere, layers that point down, links."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_fast import ops

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlhf_fast"
OPS = sorted(name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))

# A module imports from its own line and those below. A new one has to find its place here.
LAYERS = [
    {"cli", "chat"},
    {"trainers", "doctor", "scaling", "plan", "training_memory"},
    {"config_loading", "report"},
    {
        "algorithms",
        "checkpoint",
        "data",
        "distributed",
        "ema",
        "on_disk",
        "engine",
        "generation",
        "models",
        "rewards",
        "tracking",
        "watchdog",
    },
    {"ops"},
    {"build", "build_cuda", "csrc", "kernels"},
    {"nvrtc"},
    {"config", "errors"},
]


def test_ops_are_functions_of_the_design() -> None:
    assert OPS == [
        "gae",
        "gather_logprobs",
        "linear_cross_entropy",
        "linear_logprobs",
        "linear_ppo_loss",
        "logits_ppo_loss",
        "masked_whiten",
        "ppo_loss",
        "shaped_gae",
        "value_loss",
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_files(op: str) -> None:
    for file in (f"rlhf_fast/ops/{op}.py", f"rlhf_fast/ops/reference/{op}.py", f"tests/ops/test_{op}.py"):
        assert (ROOT / file).is_file(), f"{op} has no {file}"


def test_every_op_has_a_reference_with_its_arguments() -> None:
    assert sorted(ops.reference.__all__) == OPS
    for op in OPS:
        public = inspect.signature(getattr(ops, op)).parameters
        plain = inspect.signature(getattr(ops.reference, op)).parameters
        assert public["backend"].default == "auto"
        passed_on = any(p.kind is p.VAR_KEYWORD for p in plain.values())
        for name, parameter in plain.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                assert public[name].default == parameter.default, f"{op}: {name}"
        if not passed_on:
            assert list(plain) == [name for name in public if name != "backend"]


@pytest.mark.parametrize(
    ("files", "prefix"),
    [
        ("rlhf_fast/ops/[!_]*.py", ""),
        ("rlhf_fast/ops/reference/[!_]*.py", ""),
        ("kernels/[!_]*.py", ""),
        ("csrc/cpu/*.cpp", ""),
        ("bench/ops/bench_*.py", "bench_"),
    ],
)
def test_every_such_file_is_an_op(files: str, prefix: str) -> None:
    stems = {path.stem.removeprefix(prefix) for path in ROOT.glob(files)}
    assert stems <= set(OPS), f"{files}: {stems - set(OPS)} are no ops"


def test_every_kernel_has_a_bench() -> None:
    patterns = ("kernels/[!_]*.py", "csrc/cpu/*.cpp")
    kernels = {path.stem for pattern in patterns for path in ROOT.glob(pattern)}
    assert kernels, "no kernels found"
    for op in kernels:
        assert (ROOT / f"bench/ops/bench_{op}.py").is_file(), f"{op} has a kernel and no bench"


def test_every_cuda_kernel_has_a_test() -> None:
    """csrc/cuda holds the decoder's kernels, which are no public ops; tests/cuda runs them where no GPU is."""
    kernels = {path.stem for path in ROOT.glob("csrc/cuda/*.cu")}
    assert kernels, "no kernels found"
    for kernel in kernels:
        assert (ROOT / f"tests/cuda/test_{kernel}.py").is_file(), f"{kernel}.cu has no test"


def modules() -> Iterator[tuple[str, Path]]:
    """(module of rlhf_fast, file) for every Python file of the package, kernels among them."""
    for path in PACKAGE.rglob("*.py"):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path
    for path in (ROOT / "kernels").rglob("*.py"):
        yield "kernels", path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(module of rlhf_fast, line) for everything that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folders = ("rlhf_fast", *path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).parts[:-1])
            origin = ".".join(folders[: len(folders) - node.level + 1]) + "." if node.level else ""
            names = [f"{origin}{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "rlhf_fast" and rest:
                yield rest.split(".")[0], node.lineno


def test_layers_point_down() -> None:
    depth = {name: i for i, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, path in modules():
        if module == "__init__":
            continue
        assert module in depth, f"{path}: {module} is in no layer of tests/test_layout.py"
        wrong += [
            f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}"
            for imported, line in imports(path)
            if imported in depth and depth[imported] < depth[module]
        ]
    assert not wrong, "\n".join(wrong)


def test_errors_and_config_know_nobody() -> None:
    for module in ("config", "errors"):
        assert list(imports(PACKAGE / f"{module}.py")) == []


@pytest.mark.parametrize("name", ["kernels", "csrc"])
def test_links(name: str) -> None:
    """An __init__.py would make `import kernels` at the root ours and hide the package that transformers looks for."""
    link = PACKAGE / name
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{name}"
    assert link.resolve() == ROOT / name
    assert not list((ROOT / name).rglob("__init__.py"))
