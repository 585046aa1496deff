"""Checkpoints that a crash cannot spoil: written aside, flushed to disk, hashed, then renamed into place.

A folder root/step-N is whole or not there. What is being written is `.step-N.tmp-<pid>`; a folder that gives way to
a new one of the same name is `.step-N.old` for a moment. Leftovers of a killed process go when the run is resumed, or
at the next save.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rlhf_fast.distributed import World, barrier, broadcast_object
from rlhf_fast.errors import CheckpointError

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)|\.step-(\d+)\.old")

logger = logging.getLogger(__name__)


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], None], *, keep: int, best: int | None = None, world: World
) -> Path:
    """Write root/step-N; every rank calls it with the same arguments.

    Args:
        write: called on every rank with the folder to put files in (the same folder on all ranks, so ranks must not
            write files of the same name); nothing else may be in it.
        keep: how many checkpoints stay, this one included (at least 1).
        best: the step of one more to keep.
    Returns:
        The finished folder. Checkpoints of later steps, left by a run that was given up, are gone.
    Raises:
        CheckpointError: the disk is full, read-only, broken... Older checkpoints are as they were. On several ranks
            only the rank that failed raises; the launcher then ends the others.
    """
    target = root / f"step-{step}"
    if world.is_main:
        with _on_failure(target):
            root.mkdir(parents=True, exist_ok=True)
            sweep_checkpoints(root)
            _check_space(root)
    with atomic_dir(target, world) as folder:
        write(folder)
        barrier(world)
        if world.is_main:
            _write_manifest(folder, step)
    if world.is_main:
        with _on_failure(target):
            _rotate(root, step, max(keep, 1), best)
    barrier(world)
    return target


def latest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; None if there is none. Reads every byte: on several ranks ask one.

    A damaged one is named in a warning (stderr, unless logging is configured) and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = _checkpoints(root)
    for step in sorted(found, reverse=True):
        try:
            verify_checkpoint(found[step])
        except CheckpointError as error:
            logger.warning("%s; looking for an older one", error)
        else:
            return found[step]
    if found:
        raise CheckpointError(f"{root}: every checkpoint in it is damaged; start again without --resume")
    return None


def sweep_checkpoints(root: Path) -> None:
    """Remove what killed processes left under `root`. Nobody else may be saving there. Raises CheckpointError."""
    with _on_failure(root):
        _sweep(root, "step-*")


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: names the folder, the file and what is wrong with it.
    """
    files = _read_manifest(path)
    for name, expected in files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing") from None
        if size != expected["size"]:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {size} bytes instead of {expected['size']}"
            )
    with _on_failure(path):
        hashes = _hash_all([path / name for name in files])
    for (name, expected), found in zip(files.items(), hashes, strict=True):
        if found != expected["sha256"]:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} does not have the bytes that were saved")


def rng_state() -> dict[str, Any]:
    """This process's random number generators: torch (CPU, and this rank's GPU), numpy, random. Tensors and numbers
    only, so that torch.load(weights_only=True) reads it."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, float(cached)],
        "random": [version, list(words), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue every generator where rng_state() found it."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words), gauss))


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file: after a crash the old text or the new one is there, never a mixture.

    Raises:
        CheckpointError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with _on_failure(path, remove=temporary):
        _sweep(path.parent, glob.escape(path.name))
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync(path.parent)


@contextlib.contextmanager
def atomic_dir(path: Path, world: World | None = None) -> Iterator[Path]:
    """`with atomic_dir(final) as folder:` fill `folder`; at the end it becomes `path` and replaces what was there.

    An exception inside leaves `path` as it was and removes what was written. With a world every rank must enter and
    may write files of its own.

    Raises:
        CheckpointError: it could not be written. With a world of several ranks only the rank that failed raises; it
            should exit, and the launcher ends the others.
    """
    world = world or World(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    temporary = path.with_name(f".{path.name}.tmp-{broadcast_object(os.getpid(), world)}")
    with _on_failure(path, remove=temporary if world.is_main else None):
        if world.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path.parent, glob.escape(path.name))
            temporary.mkdir()
        barrier(world)
        yield temporary
        barrier(world)
        if world.local_rank == 0:  # what this machine's ranks wrote waits in this machine's memory
            _flush(temporary)
        barrier(world)
        if world.is_main:
            _publish(temporary, path)
        barrier(world)


def _checkpoints(root: Path) -> dict[int, Path]:
    """Every finished folder by its step. A `.old` one counts only while the new one is not there."""
    found: dict[int, Path] = {}
    for path in sorted(root.glob("*step-*"), reverse=True):  # step-N after .step-N.old, and wins
        match = STEP.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.setdefault(int(match[1] or match[2]), path)
    return found


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            inside = (path / name).resolve().is_relative_to(path.resolve())
            if not inside or not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"bad entry {name!r}")
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None
    return files


def _write_manifest(folder: Path, step: int) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _hash_all(paths), strict=True)
    }
    text = json.dumps({"format": 1, "step": step, "files": files}, indent=1)
    atomic_write_text(folder / MANIFEST, text + "\n")


def _hash_all(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashlib lets other threads run
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """Every file and folder below `folder` onto the disk, and itself."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def _publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place. A folder in the way steps aside first: rename cannot replace it."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    _fsync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sweep(parent: Path, pattern: str) -> None:
    """Remove what killed processes left behind; put a folder back whose successor never came."""
    for old in parent.glob(f".{pattern}.old"):
        target = parent / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for stale in parent.glob(f".{pattern}.tmp-*"):
        _remove(stale)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _rotate(root: Path, step: int, keep: int, best: int | None) -> None:
    found = _checkpoints(root)
    kept = set(sorted(s for s in found if s <= step)[-keep:]) | {best}
    for old in found.keys() - kept:
        # Out of sight in one move: a kill in the middle of deleting leaves no half checkpoint.
        hidden = root / f".step-{old}.tmp-{os.getpid()}"
        found[old].rename(hidden)
        shutil.rmtree(hidden)


def _check_space(root: Path) -> None:
    """Better to fail before writing than at the end: the next checkpoint is about as large as the last one."""
    found = _checkpoints(root)
    if not found:
        return
    last = found[max(found)]
    needed = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    free = shutil.disk_usage(root).free
    if free < needed:
        raise CheckpointError(
            f"{root}: {_megabytes(free)} free, a checkpoint takes {_megabytes(needed)}; "
            "free some space or lower save_total_limit, then --resume"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


@contextlib.contextmanager
def _on_failure(path: Path, remove: Path | None = None) -> Iterator[None]:
    """Remove what was half written; say in plain words what the disk refused."""
    try:
        yield
    except BaseException as error:
        if remove is not None:
            with contextlib.suppress(OSError):
                _remove(remove)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif isinstance(error, SafetensorError):
            reason = str(error)
        elif isinstance(error, RuntimeError) and "inline_container" in str(
            error
        ):  # torch.save keeps the cause to itself
            reason = "writing failed half-way; is the disk full?"
        else:
            raise
        raise CheckpointError(f"{path} could not be written or read: {reason}{_free_space(path)}") from error


def _free_space(path: Path) -> str:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    return f" ({_megabytes(shutil.disk_usage(existing).free)} free in {existing})"
