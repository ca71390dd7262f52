"""Reading a small YAML file that somebody else may have written: plain data only, bounded in size and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent

from qatlib.errors import CompileError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8


def read_yaml(path: Path) -> Any:
    """Content of ``path``; CompileError (QAT183) for anything but one plain YAML document.

    Refused are files over 64 KiB, nesting deeper than 8, aliases and anchors (they can expand without bound), tags,
    repeated keys and text that is not UTF-8.
    """

    def refuse(seen: str) -> CompileError:
        return CompileError("QAT183", str(path), seen, "Write plain YAML as in docs/targets.md")

    try:
        with path.open("rb") as file:
            blob = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    if len(blob) > MAX_BYTES:
        raise refuse(f"is larger than {MAX_BYTES} bytes")
    try:
        text = blob.decode()
        unsafe = _first_unsafe(text)
        if unsafe:
            raise refuse(unsafe)
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise refuse(f"is not valid YAML ({_one_line(error)})") from None
    except UnicodeDecodeError:
        raise refuse("is not UTF-8 text") from None
    except CompileError:
        raise
    except ValueError as error:
        raise refuse(f"holds a value that YAML cannot express ({_one_line(error)})") from None


def _first_unsafe(text: str) -> str:
    """What makes ``text`` more than plain data, from its events, before anything is constructed; "" if nothing."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return f"is nested deeper than {MAX_DEPTH} levels"
        if isinstance(event, AliasEvent) or (isinstance(event, NodeEvent) and event.anchor):
            return f"uses the anchor or alias {str(event.anchor)[:40]!r}; spell the value out"
        tag = getattr(event, "tag", None)
        if tag:
            return f"uses the tag {str(tag)[:60]!r}; only plain values are read"
    return ""


def _one_line(error: Exception) -> str:
    parts = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    problem = ", ".join(parts) or str(error) or type(error).__name__
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}" if mark is not None else ""
    return " ".join(f"{problem}{at}".split())[:200]
