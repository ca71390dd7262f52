"""Pairs of English sentences that mean related things, from the docstrings of a package."""

from __future__ import annotations

import ast
import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

Pair = tuple[str, str]
"""What a function does, and the first sentence of its description."""

_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;()'\"-]{25,}\.")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?]) ")


def read_pairs(wheel: Path) -> list[Pair]:
    """The pairs in the docstrings of the public functions and classes of a wheel.

    Both are plain prose without markup, and no sentence is in two pairs. The order is that of the SHA-256 of the first
    sentence, so that neighbours come from all over the package. The code is parsed, never run.
    """
    answers: dict[str, str] = {}
    for docstring in _docstrings(wheel):
        paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n")]
        if len(paragraphs) < 2:
            continue
        question, answer = paragraphs[0], _END_OF_SENTENCE.split(paragraphs[1])[0]
        prose = _SENTENCE.fullmatch(question) and _SENTENCE.fullmatch(answer)
        if prose and question not in answers and answer not in answers.values():
            answers[question] = answer
    return sorted(answers.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def _docstrings(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or "/tests/" in name:
                continue
            for node in ast.walk(ast.parse(archive.read(name))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield ast.get_docstring(node) or ""
