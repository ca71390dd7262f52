"""What ``dvc repro`` would run, and why: parameters with old and new value, changed files, stages before it.

This module imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlib.errors import StageError

PIPELINE = "dvc.yaml"
MISSING = "missing"
"""Stands for the value of a key that is not there."""


@dataclass(frozen=True)
class ParamChange:
    """A dotted key of ``file`` and its values at the last run and now, :data:`MISSING` where it was or is not there."""

    file: str
    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Why:
    """One stage. ``inputs`` are sentences on its files and command, ``outputs`` on what it makes.

    ``after`` are stages that rerun and make what it reads: it runs if that changes. ``frozen`` stages never run.
    """

    stage: str
    params: tuple[ParamChange, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def runs(self) -> bool:
        return not self.frozen and bool(self.params or self.inputs or self.outputs or self.after)

    def document(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "stage": self.stage,
            "runs": self.runs,
            "params": [{"file": p.file, "key": p.key, "old": p.old, "new": p.new} for p in self.params],
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "after": list(self.after),
            "frozen": self.frozen,
        }


def why(stage: str | None = None) -> list[Why]:
    """Every stage that ``dvc repro``, or ``dvc repro STAGE``, in this folder looks at, in the order in which they run.

    Raises StageError QAT219 where there is no DVC project here, or no such stage.
    """
    with _stages(stage) as stages:
        found: list[Why] = []
        for one in stages:
            status = one.status(check_updates=False).get(one.addressing, [])
            made = {str(dep) for dep in _files(one) if any(_reads(dep, other) for other in stages)}
            before = [other for other, done in zip(stages, found, strict=False) if done.runs and _feeds(other, one)]
            found.append(
                Why(
                    stage=one.addressing,
                    params=tuple(_params(one)),
                    inputs=tuple(_inputs(one, status, made)),
                    outputs=tuple(_outputs(status)),
                    after=tuple(other.addressing for other in before),
                    frozen=one.frozen,
                )
            )
        return found


def outdated(stages: Sequence[Why]) -> list[str]:
    """Those whose reports are of other parameters, code or data, and what follows them; a missing file is none."""
    found: list[str] = []
    for one in stages:
        if not one.frozen and (one.params or one.inputs or set(one.after) & set(found)):
            found.append(one.stage)
    return found


@contextmanager
def _stages(name: str | None) -> Iterator[list[Any]]:
    """DVC's stages of the pipeline in this folder, each after those that it reads of, while its lock is held."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    fix = "Run in a folder with dvc.yaml, and name a stage of it: dvc stage list"
    try:
        with Repo() as repo, lock_repo(repo):
            asked = list(repo.stage.collect(name or PIPELINE))
            before = [one for one in repo.stage.collect(name or PIPELINE, with_deps=True) if one not in asked]
            yield _ordered([*asked, *before])
    except DvcException as error:
        where = f"stage {name}" if name else PIPELINE
        raise StageError("QAT219", where, f"cannot be looked at: {error}", fix) from None


def _ordered(stages: list[Any]) -> list[Any]:
    """Each stage behind those whose outputs it reads; else as they stand in the file."""
    done: list[Any] = []

    def visit(stage: Any) -> None:
        if stage not in done:
            for other in stages:
                if other is not stage and _feeds(other, stage):
                    visit(other)
            done.append(stage)

    for stage in stages:
        visit(stage)
    return done


def _feeds(first: Any, second: Any) -> bool:
    """Whether ``second`` reads an output of ``first``, or something in it."""
    return any(_reads(dep, first) for dep in _files(second))


def _reads(dep: Any, maker: Any) -> bool:
    return any(Path(dep.fs_path).is_relative_to(out.fs_path) for out in maker.outs)


def _files(stage: Any) -> list[Any]:
    return [dep for dep in stage.deps if not _is_params(dep)]


def _is_params(dep: Any) -> bool:
    from dvc.dependency.param import ParamsDependency

    return isinstance(dep, ParamsDependency)


def _params(stage: Any) -> Iterator[ParamChange]:
    """By dotted key, down to the value that changed; of a stage that never ran there is none to compare with."""
    for dep in filter(_is_params, stage.deps):
        locked = dep.hash_info.value
        if locked is None:
            continue
        old, new = flat(locked), flat(dep.read_params())
        for key in dict.fromkeys((*new, *old)):
            before, after = old.get(key, MISSING), new.get(key, MISSING)
            if before != after:
                yield ParamChange(_shown(dep.fs_path), key, before, after)


def _inputs(stage: Any, status: Sequence[Any], made: Collection[str]) -> Iterator[str]:
    """What DVC says of command and files, in words. Of files that are ``made`` but missing their stage tells."""
    if status and not any(dep.hash_info for dep in stage.deps) and not any(out.hash_info for out in stage.outs):
        yield "it never ran"
        return
    for entry in status:
        if entry == "always changed":
            yield "it always runs"
        elif entry == "changed command":
            yield f"its command changed: {stage.cmd}"
        elif not isinstance(entry, Mapping):
            yield str(entry)
        else:
            for name, how in entry.get("changed deps", {}).items():
                if isinstance(how, str) and not (how == "deleted" and name in made):
                    yield f"{name} {_DEPS.get(how, f'is {how}')}"


def _outputs(status: Sequence[Any]) -> Iterator[str]:
    for entry in status:
        if isinstance(entry, Mapping):
            for name, how in entry.get("changed outs", {}).items():
                yield f"{name}, which it makes, {_OUTS.get(how, f'is {how}')}"


_DEPS = {"modified": "changed", "new": "is new to it", "deleted": "is missing"}
_OUTS = {
    "modified": "was changed by something else",
    "new": "is not of its making",
    "deleted": "is missing",
    "not in cache": "is not in the cache of DVC",
}


def flat(document: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key; lists and empty mappings are values."""
    if not isinstance(document, Mapping) or not document:
        return {key: document} if key else {}
    found: dict[str, Any] = {}
    for name, item in document.items():
        found |= flat(item, f"{key}.{name}" if key else str(name))
    return found


def _shown(path: str) -> str:
    return Path(os.path.relpath(path)).as_posix()
