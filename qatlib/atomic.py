"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _fresh_name(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; rename it to ``path`` if the block ends well."""
    path = Path(path)
    temporary = _fresh_name(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; put it in the place of ``path`` if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        if path.exists():
            old = temporary.with_suffix(".old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, document: Any, rows: str | None = None) -> None:
    """JSON with sorted keys, so that equal content gives equal bytes; NaN and infinity raise ValueError.

    The items of the list ``document[rows]`` take one line each, so that a long table reads, and differs, row by row.
    """
    items = [] if rows is None else [_json(item) for item in document.get(rows, ())]
    text = _json({**document, rows: []} if items else document, indent=2)
    if items:
        head = f'\n  "{rows}": ['  # two spaces: the outermost level
        text = text.replace(f"{head}]", f"{head}\n    " + ",\n    ".join(items) + "\n  ]")
    write_text(path, text + "\n")


def _json(document: Any, indent: int | None = None) -> str:
    return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)
