"""Methods of a user's own: from a file or a module that the user names, and that is then executed.

Nothing else is: the folder of a run says with which files it was run, and whoever goes on with it names them again.
"""

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fedjax_lora.config import values
from fedjax_lora.core.errors import ConfigError, reason_of
from fedjax_lora.core.methods import Method


class UserMethods(NamedTuple):
    """Methods, and where they are from.

    methods: in the order in which they were found.
    files: absolute path or module -> SHA-256 of its text; what a run's folder holds.
    """

    methods: tuple[Method, ...]
    files: dict[str, str]


NO_METHODS = UserMethods((), {})
"""What a user has who names none."""


def load(named: Iterable[str]) -> UserMethods:
    """The methods of files and modules.

    Args:
      named: each the path of a Python file, or a module as `import` finds it. It holds METHOD, a Method, or METHODS, a
        sequence of them, or both.

    Raises:
      ConfigError: one cannot be read, does not run, or holds no methods; names it and the line.
    """
    methods: list[Method] = []
    files: dict[str, str] = {}
    for name in named:
        is_file = name.endswith(".py") or "/" in name or Path(name).is_file()
        module, path = _run_file(name) if is_file else _import(name)
        source = str(path) if is_file else name
        if source not in files:
            files[source] = _sha256(path)
            methods += _methods(module, f"methods {name}")
    return UserMethods(tuple(methods), files)


_LOADED: dict[tuple[str, str], ModuleType] = {}
"""Path and hash -> module: a file that is named twice is run once, so that its classes are the same."""


def _run_file(name: str) -> tuple[ModuleType, Path]:
    path = Path(name).expanduser().resolve()
    try:
        digest = _sha256(path)
    except OSError as error:
        raise ConfigError(f"methods {name} must be a Python file that can be read, got {reason_of(error)}") from error
    if (str(path), digest) not in _LOADED:
        module_name = f"fedjax_lora_methods_{digest[:16]}_{len(_LOADED)}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"methods {name} must be a file that ends in .py, got {path.name}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where dataclasses look up the types of their fields
        try:
            _guarded(lambda: spec.loader.exec_module(module), name, path)  # pyright: ignore[reportOptionalMemberAccess]
        except ConfigError:
            del sys.modules[module_name]
            raise
        _LOADED[str(path), digest] = module
    return _LOADED[str(path), digest], path


def _import(name: str) -> tuple[ModuleType, Path]:
    module = _guarded(lambda: importlib.import_module(name), name, None)
    if module.__file__ is None:
        raise ConfigError(f"methods {name} must be a module of one file, got a namespace")
    return module, Path(module.__file__)


def _guarded(run: Callable[[], Any], name: str, path: Path | None) -> Any:
    """What `run` returns; an error of the user's code is one line with its place."""
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise ConfigError(f"methods {name}{_line(error, path)} must run, got {_said(error)}") from error


def _line(error: BaseException, path: Path | None) -> str:
    """Where an error came up: the line of the file of methods, else the last file and line outside of Python's own."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or "", error.lineno))
    inside = [line for file, line in frames if path is not None and file == str(path)]
    outside = [place for place in frames if "importlib" not in place[0] and place[0] != __file__]
    if inside:
        return f" line {inside[-1]}"
    return f" ({outside[-1][0]} line {outside[-1][1]})" if outside else ""


def _said(error: BaseException) -> str:
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _methods(module: ModuleType, what: str) -> list[Method]:
    held = [(name, getattr(module, name)) for name in ("METHOD", "METHODS") if hasattr(module, name)]
    if not held:
        allowed = "METHOD, a fedjax_lora.methods.Method, or METHODS, a sequence of them"
        raise ConfigError(f"{what} must hold {allowed}, got neither")
    found: list[Method] = []
    for name, value in held:
        listed = [value] if isinstance(value, Method) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(method, Method) for method in listed):
            raise ConfigError(f"{name} of {what} must hold fedjax_lora.methods.Method alone, got {values.short(value)}")
        found += [method for method in listed if method not in found]
    return found


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
