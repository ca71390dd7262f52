"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlib.errors import OutputError


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


@dataclass(frozen=True)
class Contents:
    """What lies in a folder of one kind: one of the files ``marks`` at least, and nothing that is not named here."""

    marks: tuple[str, ...]
    others: tuple[str, ...] = ()


@contextmanager
def atomic_folder(path: str | Path, contents: Contents) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; put it in the place of ``path`` if the block ends well.

    Replaced is only a folder that is empty or of the same kind, ``contents``; of a link, what it points to. Raises
    OutputError: QAT225 where anything else is in the way, QAT226 where the operating system refuses.
    """
    try:
        target = Path(os.path.realpath(path))
        if seen := _in_the_way(target, contents):
            raise OutputError("QAT225", str(path), f"{seen} and is not replaced", "Name another folder, or empty it")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        try:
            temporary.chmod(0o755)
            yield temporary
            _replace(target, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OutputError:
        raise
    except OSError as error:
        at = "" if error.filename is None else f", {error.filename}"
        seen = f"cannot be written ({error.strerror or error}{at})"
        raise OutputError("QAT226", str(path), seen, "Name a folder that can be written") from None


def _in_the_way(folder: Path, contents: Contents) -> str | None:
    """What keeps ``folder`` from being replaced; None if nothing does."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return "is a file"
    if Path.cwd().is_relative_to(folder):
        return "is the working directory, or holds it,"
    names = sorted(entry.name for entry in folder.iterdir())
    foreign = [name for name in names if name not in contents.marks + contents.others]
    if foreign:
        return f"holds {foreign[0]!r}, which is not of what is written here,"
    if names and not set(names) & set(contents.marks):
        return f"holds {names[0]!r} and no {contents.marks[0]}"
    return None


def _replace(folder: Path, new: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = new.with_suffix(".old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_csv(path: str | Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """What :func:`csv_text` gives."""
    write_text(path, csv_text(header, rows))


def csv_text(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Comma-separated text: floats have 6 significant digits, None and NaN are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else str(value)


def write_json(path: str | Path, document: Any, rows: str | Sequence[str] = ()) -> None:
    """JSON with sorted keys, so that equal content gives equal bytes; NaN and infinity raise ValueError.

    The items of the list ``document[rows]``, or of several lists, take one line each, so that a long table reads, and
    differs, row by row.
    """
    keys = [rows] if isinstance(rows, str) else rows
    tables = {key: items for key in keys if (items := [_json(item) for item in document.get(key, ())])}
    text = _json({**document, **{key: [] for key in tables}} if tables else document, indent=2)
    for key, items in tables.items():
        head = f'\n  "{key}": ['  # two spaces: the outermost level
        text = text.replace(f"{head}]", f"{head}\n    " + ",\n    ".join(items) + "\n  ]")
    write_text(path, text + "\n")


def _json(document: Any, indent: int | None = None) -> str:
    return json.dumps(document, indent=indent, sort_keys=True, allow_nan=False)
