"""Checkpoints under attack: kills at every step of saving, full disks, damaged files. The older one always survives."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rlhf_fast.checkpoint import (
    atomic_dir,
    atomic_write_text,
    latest_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
    verify_checkpoint,
)
from rlhf_fast.engine import World
from rlhf_fast.errors import CheckpointError

ALONE = World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def save(root: Path, step: int, *, keep: int = 2, best: int | None = None, size: int = 1000) -> Path:
    def write(folder: Path) -> None:
        (folder / "policy" / "state").mkdir(parents=True)
        torch.save({"step": torch.full((size,), step)}, folder / "policy" / "state" / "weights.pt")
        (folder / "trainer_state.json").write_text(json.dumps({"step": step}))

    return save_checkpoint(root, step, write, keep=keep, best=best, world=ALONE)


def step_in(folder: Path | None) -> int:
    """What the checkpoint says it is, after checking that it is all there."""
    assert folder is not None
    verify_checkpoint(folder)
    step = json.loads((folder / "trainer_state.json").read_text())["step"]
    assert torch.load(folder / "policy" / "state" / "weights.pt")["step"].eq(step).all()
    return step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ---- saving and finding ----------------------------------------------------------------------------------------------


def test_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 3, 10):
        assert save(root, step, best=1) == root / f"step-{step}"
    assert names(root) == ["step-1", "step-10", "step-3"]
    assert step_in(latest_checkpoint(root)) == 10
    save(root, 11, keep=1, best=10)
    assert names(root) == ["step-10", "step-11"]
    save(root, 12, keep=0)  # the new one always stays
    assert names(root) == ["step-12"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nothing") is None
    for stray in ("step-x", "step-5.bak", ".step-6.tmp-77", "best-7"):
        (tmp_path / stray).mkdir()
    (tmp_path / "step-8").write_text("a file")
    assert latest_checkpoint(tmp_path) is None


def test_saving_a_step_again_replaces_it_and_drops_later_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    save(tmp_path, 2, keep=9, size=5)
    assert names(tmp_path) == ["step-1", "step-2"]
    assert len(torch.load(tmp_path / "step-2/policy/state/weights.pt")["step"]) == 5


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte flipped": (lambda f: flip(f / "policy/state/weights.pt"), "weights.pt does not have the bytes"),
    "cut short": (lambda f: os.truncate(f / "policy/state/weights.pt", 7), "weights.pt has 7 bytes instead of"),
    "missing": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "other manifest": (lambda f: (f / "manifest.json").write_text('{"files": {"a": 1}}'), "manifest.json cannot be"),
    "list manifest": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "manifest that leads outside": (
        lambda f: (f / "manifest.json").write_text('{"files": {"../../x": {"size": 1, "sha256": ""}}}'),
        "manifest.json cannot be read",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    spoil, reason = DAMAGE[damage]
    spoil(newest)
    with pytest.raises(CheckpointError, match=f"step-2 is damaged: .*{reason}"):
        verify_checkpoint(newest)
    assert step_in(latest_checkpoint(tmp_path)) == 1
    assert str(newest) in caplog.text
    assert reason in caplog.text
    spoil(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        latest_checkpoint(tmp_path)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def killed_at(point: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that is killed just before its `point`-th change to the disk.

    False: it ended before that.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def on_event(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            changes = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
            if event in changes or (event == "open" and int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
                count += 1
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        try:
            action()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def every_kill(action: Callable[[], object], reset: Callable[[], None]) -> Iterator[int]:
    """Kill `action` before each of its changes to the disk in turn, from a fresh start each time."""
    for point in range(1, 1000):
        reset()
        if not killed_at(point, action):
            assert point > 6
            return
        yield point
    raise AssertionError("never ended")


@pytest.mark.parametrize(
    ("existing", "step", "keep"),
    [([], 1, 2), ([1, 2], 3, 1), ([1], 1, 1), ([1, 2], 1, 2)],
    ids=["the first", "with rotation", "the same step again", "an older step again"],
)
def test_kill_before_every_change(tmp_path: Path, existing: list[int], step: int, keep: int) -> None:
    template, root = tmp_path / "template", tmp_path / "run"
    template.mkdir()
    for old in existing:
        save(template, old, keep=9)

    def reset() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)

    for _ in every_kill(lambda: save(root, step, keep=keep, size=20), reset):
        for visible in root.glob("step-*"):
            verify_checkpoint(visible)  # nothing half-written or half-deleted
        found = latest_checkpoint(root)
        if existing:
            assert step_in(found) in {max(existing), step}
        elif found is not None:
            assert step_in(found) == step
        save(root, step + 5, keep=2)  # the next run goes on and sweeps up
        assert step_in(latest_checkpoint(root)) == step + 5
        assert all(name.startswith("step-") for name in names(root))
        assert len(names(root)) == 2 or not existing
    assert step_in(latest_checkpoint(root)) == step  # the last round was not killed


def test_kill_at_any_moment(tmp_path: Path) -> None:
    chance = random.Random(0)
    last = 0
    for _ in range(12):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(last + 1, last + 10_000):
                save(tmp_path, step, size=20_000)
                os.write(tell, b".")
            os._exit(0)
        os.read(told, 1)  # one is finished; now hit the next one anywhere
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)
        found = step_in(latest_checkpoint(tmp_path))
        assert found > last
        last = found


def test_kill_while_a_folder_or_a_file_is_replaced(tmp_path: Path) -> None:
    final, note = tmp_path / "final", tmp_path / "note.txt"

    def fill(text: str) -> None:
        with atomic_dir(final) as folder:
            (folder / "a.txt").write_text(text)
            (folder / "b.txt").write_text(text)
        atomic_write_text(note, text)

    def reset() -> None:
        fill("old")

    for _ in every_kill(lambda: fill("new"), reset):
        assert note.read_text() in {"old", "new"}
        whole = final if final.exists() else tmp_path / ".final.old"
        texts = {(whole / name).read_text() for name in ("a.txt", "b.txt")}
        assert texts in ({"old"}, {"new"})
        fill("newest")
        assert {path.read_text() for path in final.iterdir()} | {note.read_text()} == {"newest"}
        assert names(tmp_path) == ["final", "note.txt"]


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        if path.name.startswith(".step-1.tmp"):
            inside = {str(file) for file in path.rglob("*")} | {str(path)}
            assert len(inside) == 6  # two folders in it, three files and itself
            assert inside <= set(flushed)
            flushed.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path, 1)
    assert flushed == [str(tmp_path)]


# ---- a disk that refuses ---------------------------------------------------------------------------------------------


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda folder: torch.save({"a": torch.zeros(1_000_000)}, folder / "a.pt"),
    "safetensors": lambda folder: save_file({"a": torch.zeros(1_000_000)}, folder / "a.safetensors"),
    "python": lambda folder: (folder / "a.txt").write_text("x" * 4_000_000),
}


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Inside, no file can grow beyond `limit` bytes: the system refuses as it does on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_is_refused_leaves_the_old_checkpoint(tmp_path: Path, writer: str) -> None:
    save(tmp_path, 1)
    with small_files(1_000_000), pytest.raises(CheckpointError, match=r"step-2 could not be written.*MB free"):
        save_checkpoint(tmp_path, 2, WRITERS[writer], keep=1, world=ALONE)
    assert names(tmp_path) == ["step-1"]
    assert step_in(latest_checkpoint(tmp_path)) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs root; the test above refuses writes without it")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_checkpoint(small_disk: Path, writer: str) -> None:
    save(small_disk, 1)
    with pytest.raises(CheckpointError, match=r"step-2 could not be written.*MB free"):
        save_checkpoint(small_disk, 2, WRITERS[writer], keep=1, world=ALONE)
    assert names(small_disk) == ["step-1"]
    assert step_in(latest_checkpoint(small_disk)) == 1


def test_too_little_space_is_seen_before_writing(small_disk: Path) -> None:
    save(small_disk, 1, size=200_000)  # 1.6 MB of 3
    with pytest.raises(CheckpointError, match=r"1\.\d MB free, a checkpoint takes 1\.6 MB.*save_total_limit"):
        save_checkpoint(small_disk, 2, lambda folder: pytest.fail("was called"), keep=1, world=ALONE)
    assert names(small_disk) == ["step-1"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/checkpoints/step-1 could not be written.*Not a directory"):
        save(tmp_path / "file" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match=r"x\.txt could not be written.*Not a directory"):
        atomic_write_text(tmp_path / "file" / "x.txt", "")


@pytest.mark.parametrize("error", [KeyError("a bug"), KeyboardInterrupt(), RuntimeError("not the disk")])
def test_other_errors_pass_through_and_leave_nothing(tmp_path: Path, error: BaseException) -> None:
    save(tmp_path, 1)

    def write(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, write, keep=1, world=ALONE)
    with pytest.raises(type(error)), atomic_dir(tmp_path / "final") as folder:
        write(folder)
    assert names(tmp_path) == ["step-1"]


# ---- random numbers --------------------------------------------------------------------------------------------------


def draw() -> list[float]:
    return [torch.randn(3).sum().item(), np.random.normal(), np.random.random(), random.gauss(0, 1), random.random()]


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    draw()  # an odd number of normal draws: numpy and random each hold a second one back
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw() + draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() + draw() == expected
