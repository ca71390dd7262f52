"""What a run left behind, as it lies in the working copy or in a git revision. This module imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatlib.analysis.findings import FINDINGS, Found, parse_findings
from qatlib.analysis.targets import read_targets
from qatlib.errors import StageError

WORKSPACE = "workspace"
"""Stands for the working copy, as in DVC."""
PARAMS, SUMMARY, ANALYSIS = "params.yaml", "reports/summary.json", "reports/analysis.json"


@dataclass(frozen=True)
class Revision:
    """``params`` is the text of params.yaml; ``analysis`` is None where a run wrote none. ``targets`` are those of
    :func:`qatlib.analysis.targets.read_targets`.
    """

    name: str
    summary: dict[str, Any]
    found: Found
    params: str
    analysis: dict[str, Any] | None
    targets: dict[str, dict[str, float | None]] = field(default_factory=dict)


def load_revision(name: str) -> Revision:
    """Parameters and reports of the project in the working directory, at a git revision, branch, tag or experiment.

    Raises StageError QAT219 for a revision that there is none or that has no reports, QAT195 for reports that cannot be
    read.
    """
    read = workspace if name == WORKSPACE else _reader(name)
    texts = {path: read(path) for path in (PARAMS, SUMMARY, FINDINGS, ANALYSIS)}
    missing = [path for path in (PARAMS, SUMMARY, FINDINGS) if texts[path] is None]
    if missing:
        fix = "Run dvc repro first" if name == WORKSPACE else "Name one whose results were committed"
        raise StageError("QAT219", f"revision {name}", f"has no {missing[0]} in this folder", fix)
    where = "" if name == WORKSPACE else f"{name}:"
    analysis = texts[ANALYSIS]
    try:
        return Revision(
            name=name,
            summary=_object(texts[SUMMARY] or "", where + SUMMARY),
            found=parse_findings(texts[FINDINGS] or "", where + FINDINGS),
            params=texts[PARAMS] or "",
            analysis=None if analysis is None else _object(analysis, where + ANALYSIS),
            targets=read_targets(texts[PARAMS] or "", read),
        )
    except StageError as error:
        if name == WORKSPACE:
            raise
        fix = "Another version of qatlib wrote it: name a later revision"
        raise StageError(error.code, error.where, error.seen, fix) from None


def workspace(path: str) -> str | None:
    """The text of a file of the working copy, None if it is not there."""
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _reader(name: str) -> Callable[[str], str | None]:
    """Reads files of a revision: DVC knows its experiments by name, git has what they left."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import resolve_rev

    try:
        with Repo() as repo:
            files = repo.scm.get_fs(resolve_rev(repo.scm, name))
            folder = Path.cwd().resolve().relative_to(Path(repo.scm.root_dir).resolve())
    except (DvcException, NotImplementedError, ValueError) as error:
        seen = f"cannot be resolved here ({error})" if str(error) else "cannot be resolved here"
        fix = "Use a commit, branch, tag or experiment: git log, dvc exp list"
        raise StageError("QAT219", f"revision {name}", seen, fix) from None

    def read(path: str) -> str | None:
        inside = (folder / path).as_posix()
        return files.cat_file(inside).decode() if files.isfile(inside) else None

    return read


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise StageError("QAT195", where, f"cannot be read ({error})", "Run dvc repro first") from None
    if not isinstance(document, dict):
        raise StageError("QAT195", where, "holds no mapping", "Run dvc repro first")
    return document
