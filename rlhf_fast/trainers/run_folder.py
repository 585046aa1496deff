"""A run's folder: made ready, held by one process at a time, marked when its run is finished."""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO

from rlhf_fast.checkpoint import latest_checkpoint, sweep_checkpoints
from rlhf_fast.config import TrainerConfig
from rlhf_fast.config_loading import check_resume, config_differences, load_config, save_config
from rlhf_fast.distributed import World, broadcast_object
from rlhf_fast.errors import ConfigError

LOCK = ".lock"  # names the process that writes here
FINISHED = "finished"  # holds the number of steps

_held: dict[Path, IO[str]] = {}  # this process's locks; a later run of its own in the same folder takes over


def open_run_folder(config: TrainerConfig, world: World, *, resume: bool) -> Path | None:
    """Make the run's folder ready and return the checkpoint to resume from, or None to start at step 1.

    A run that is already there and is not resumed, for want of `resume` or of a checkpoint, is moved aside (to
    NAME.1, NAME.2, ...): nothing that was trained is ever overwritten. With `resume`, a configuration that cannot
    go on from the old one is refused (ConfigError), and so is a folder whose checkpoints are all damaged
    (CheckpointError). So is a folder in which another process's run is under way (ConfigError); the first rank holds
    it for all of them, until release_run_folder or the end of the process.
    """
    folder = Path(config.output_dir)
    checkpoint: Path | None = None
    if world.is_main:
        _hold(folder)
        try:
            checkpoint = _prepare(folder, config, resume)
        except BaseException:
            release_run_folder(folder)
            raise
    return broadcast_object(checkpoint, world)


def release_run_folder(folder: Path) -> None:
    """Let other processes run here. Nothing happens if this one does not hold the folder."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def mark_finished(folder: Path, steps: int) -> None:
    """Say that all steps of the folder's run are done and final/ is theirs."""
    (folder / FINISHED).write_text(f"{steps}\n", encoding="utf-8")


def is_finished(config: TrainerConfig) -> bool:
    """Whether output_dir holds a finished run of this very config, so that a resumed one has nothing left to do."""
    folder = Path(config.output_dir)
    if not (folder / FINISHED).exists():
        return False
    try:
        old = load_config(type(config), folder / "config.yaml")
    except ConfigError:  # of another trainer or version: check_resume has the message for it
        return False
    return not config_differences(asdict(old), asdict(config) | {"output_dir": old.output_dir})


def _prepare(folder: Path, config: TrainerConfig, resume: bool) -> Path | None:
    checkpoint: Path | None = None
    if resume:
        if (folder / "config.yaml").exists():
            check_resume(folder / "config.yaml", config)
        sweep_checkpoints(folder / "checkpoints")
        checkpoint = latest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            print(f"no checkpoint in {folder / 'checkpoints'}: starting at step 1", file=sys.stderr)
    if checkpoint is None and any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "final")):
        aside = _free_name(folder)
        folder.rename(aside)
        (aside / LOCK).unlink()
        _hold(folder)
        print(f"{folder} held a run; it is now {aside}", file=sys.stderr)
    (folder / FINISHED).unlink(missing_ok=True)
    save_config(config, folder / "config.yaml")
    return checkpoint


def _hold(folder: Path) -> None:
    """Make the folder and lock it. The operating system frees the lock when the process ends, however it ends."""
    old = _held.pop(folder.resolve(), None)
    if old is not None:
        old.close()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"output_dir: {folder} cannot be made: {error.strerror}; choose another") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "that is just starting"
            raise ConfigError(
                f"output_dir: another run is under way in {folder} (process {holder}); stop it first, or choose "
                "another output_dir"
            ) from None
        except OSError:  # a filesystem without locks; there is nothing to ask
            pass
        if _is_at(file, folder / LOCK):
            break
        file.close()  # released or moved aside between open and lock
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[folder.resolve()] = file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _free_name(folder: Path) -> Path:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.{n}")).exists():
        n += 1
    return aside
