"""Finds a reward function: "file.py:name" or "package.module:name". Every failure says where and why."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_fast.errors import RewardError


def find_function(spec: str, folder: Path) -> tuple[Callable[..., Any], Path | None]:
    """The function and the file that it was read from. Relative paths and packages are looked for in `folder`.

    Code of the user runs here (the file is imported). Raises RewardError.
    """
    source, _, name = spec.rpartition(":")
    if not name.isidentifier():
        raise RewardError(f"reward {spec}: {name!r} is not a function's name. Write file.py:name.")
    module = _read_file(spec, source, folder) if source.endswith(".py") else _import_package(spec, source, folder)
    file = Path(module.__file__) if module.__file__ else None
    if not hasattr(module, name):
        names = _functions(module)
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names) or 'no functions'}."
        raise RewardError(f"reward {spec}: {source} has no function {name!r}; {hint}")
    function = getattr(module, name)
    if inspect.isclass(function):
        raise RewardError(f"reward {spec}: {name} is a class; make an instance in {source} and name that.")
    if not callable(function):
        raise RewardError(f"reward {spec}: {name} is a {type(function).__name__}, which cannot be called.")
    return function, file


def _read_file(spec: str, source: str, folder: Path) -> ModuleType:
    file = folder / Path(source).expanduser()
    if not file.is_file():
        near = get_close_matches(file.name, [other.name for other in file.parent.glob("*.py")], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RewardError(f"reward {spec}: no file {file.name} in {file.parent.resolve()}.{hint}")
    try:
        code = file.read_bytes()
    except OSError as error:
        raise RewardError(f"reward {spec}: {file} cannot be read: {error.strerror}.") from error
    # The name holds path and content: files of the same name do not meet, functions of one file share its state, and an
    # edited file is read again.
    key = hashlib.sha256(str(file.resolve()).encode() + b"\0" + code).hexdigest()[:16]
    module_name = f"rlhf_fast_reward_{file.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    _search_in(file.parent)
    import_spec = importlib.util.spec_from_file_location(module_name, file.resolve())
    assert import_spec is not None
    assert import_spec.loader is not None
    module = importlib.util.module_from_spec(import_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up
    try:
        import_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        _raise_unless_interrupt(spec, file, error)
    return module


def _import_package(spec: str, source: str, folder: Path) -> ModuleType:
    if not all(part.isidentifier() for part in source.split(".")):
        raise RewardError(f"reward {spec}: {source!r} is neither a .py file nor a module such as package.module.")
    _search_in(folder)
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            _raise_unless_interrupt(spec, None, error)  # the module is there, something that it imports is not
        raise RewardError(
            f"reward {spec}: no module {error.name!r} in {folder.resolve()} or among the installed packages."
        ) from error
    except BaseException as error:
        _raise_unless_interrupt(spec, None, error)
        raise


def _raise_unless_interrupt(spec: str, file: Path | None, error: BaseException) -> None:
    """RewardError with the file and line of what went wrong while importing."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    if isinstance(error, SyntaxError):
        raise RewardError(f"reward {spec}: {error.filename}:{error.lineno}: {error.msg}.") from error
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen importlib") and frame.filename not in (__file__, importlib.__file__)
    ]
    own = [frame for frame in frames if file is not None and frame.filename == str(file.resolve())] or frames
    where = f"{own[-1].filename}:{own[-1].lineno}" if own else str(file)
    raise RewardError(f"reward {spec}: {where}: {type(error).__name__}: {error}") from error


def _search_in(folder: Path) -> None:
    """Let imports look in the folder too, after everything else, so that nothing installed is hidden by it."""
    path = str(folder.resolve())
    if path not in sys.path and not (path == str(Path.cwd()) and "" in sys.path):
        sys.path.append(path)


def _functions(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if inspect.isroutine(value) and not name.startswith("_")]
