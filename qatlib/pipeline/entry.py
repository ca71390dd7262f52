"""Entry points: ``"module:callable"`` names of the user's model, data, metric and loss."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qatlib.errors import ConfigError, QatError


def load_entry(entry: str, key: str = "entry") -> Callable[..., Any]:
    """Import ``"module:callable"`` and return the callable; the current folder is importable.

    ``key`` is where the entry stands in ``params.yaml``. Raises ConfigError QAT103 if there is no such module or
    callable, QAT104 if importing the module raises.
    """
    module_name, _, attribute = entry.partition(":")
    if not module_name or not attribute:
        raise ConfigError("QAT103", key, f"{entry!r} is not an entry point", 'Write "package.module:callable"')
    value = _import(module_name, key)
    where = module_name
    for part in attribute.split("."):
        if not hasattr(value, part):
            close = difflib.get_close_matches(part, dir(value), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_public(value)}"
            raise ConfigError("QAT103", key, f"{where} has no {part!r}; {hint}", "Correct the name after the colon")
        value = getattr(value, part)
        where = f"{where}.{part}"
    if not callable(value):
        raise ConfigError(
            "QAT103", key, f"{entry!r} is a {type(value).__name__}, which cannot be called", "Name a function or class"
        )
    result: Callable[..., Any] = value
    return result


def call_entry(entry: str, kwargs: Mapping[str, Any], *args: Any, key: str = "entry") -> Any:
    """Load ``entry`` and call it with ``*args, **kwargs``.

    ``key`` is the section of ``params.yaml`` that holds ``factory`` and ``kwargs``. Raises ConfigError QAT105 if the
    arguments do not fit the signature, QAT104 if the call raises.
    """
    function = load_entry(entry, f"{key}.factory")
    _check_arguments(function, entry, args, kwargs, key)
    try:
        return function(*args, **kwargs)
    except QatError:
        raise
    except Exception as error:
        called = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        raise ConfigError(
            "QAT104",
            f"{key}.factory",
            f"{entry}({called}) raised {describe(error)}",
            f"Correct that code, or {key}.kwargs",
        ) from error


def raised_at(error: BaseException) -> str:
    """``file:line`` where ``error`` was raised: the innermost line of the project, else the innermost line."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown line"
    ours = [frame for frame in frames if _is_project(frame.filename)]
    frame = ours[-1] if ours else frames[-1]
    return f"{_short(frame.filename)}:{frame.lineno}"


def describe(error: BaseException) -> str:
    """``error`` on one line: type, first line of its message, place."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__} at {raised_at(error)}" + (f": {message}" if message else "")


def _import(name: str, key: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _broken_import(name, key, error) from error
        raise ConfigError(
            "QAT103",
            key,
            f"module {error.name!r} is not found{_similar(error.name)}",
            "Run in the project root, or correct the name before the colon",
        ) from None
    except QatError:
        raise
    except (Exception, SystemExit) as error:
        raise _broken_import(name, key, error) from error


def _broken_import(name: str, key: str, error: BaseException) -> ConfigError:
    fix = "Correct that line, or install what it imports"
    if isinstance(error, SystemExit):
        fix = 'Put what the script runs under if __name__ == "__main__"'
    return ConfigError("QAT104", key, f"importing {name} raised {describe(error)}", fix)


def _similar(name: str) -> str:
    parent, _, last = name.rpartition(".")
    paths = list(getattr(sys.modules.get(parent), "__path__", [])) if parent else [str(Path.cwd())]
    close = difflib.get_close_matches(last, [module.name for module in pkgutil.iter_modules(paths)], n=1)
    return f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else ""


def _public(value: Any) -> str:
    names = [name for name in vars(value) if not name.startswith("_") and callable(getattr(value, name))]
    return ", ".join(names[:8]) or "nothing that can be called"


def _check_arguments(
    function: Callable[..., Any], entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], key: str
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        legal = [
            name
            for name, item in signature.parameters.items()
            if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)
        ]
        legal = legal[len(args) :]
        unknown = [name for name in kwargs if name not in legal]
        close = difflib.get_close_matches(unknown[0], legal, n=1) if unknown else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            "QAT105",
            f"{key}.kwargs",
            f"{entry}{signature}: {error}{hint}",
            f"Pass what the signature names: {', '.join(legal) or 'no keyword arguments'}",
        ) from None


def _is_project(filename: str) -> bool:
    path = Path(filename)
    inside = path.is_absolute() and path.is_relative_to(Path.cwd())
    return inside and "site-packages" not in path.parts and not _is_library(path)


def _is_library(path: Path) -> bool:
    return path.name == "entry.py" and path.parent.name == "pipeline"


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else filename
