"""``qatlib init``: the pipeline laid out in a repository of the user's.

``params.yaml`` and ``dvc.yaml`` are made of those at the root of this repository, to which links in this folder lead (a
wheel holds the files), so that there is one list of keys and one of stages. That to ``dvc.yaml`` has another name, for
DVC takes every file of that name for a pipeline. This module imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qatlib.atomic import write_text
from qatlib.errors import ConfigError, OutputError, StageError
from qatlib.pipeline.config import check_config, yaml_values

TEMPLATES = Path(__file__).parent
ENTRIES = "qat_entries"
"""Module of the entry points that are not named."""
LOCKS = ("uv.lock", "poetry.lock", "pdm.lock", "constraints.txt", "requirements.txt")
"""Files that pin the environment: the first that is there becomes a dependency of every stage."""
IGNORED = {
    ".gitignore": (".qatlib/", "__pycache__/", "/profile/", "/tune/"),
    ".dvcignore": (".qatlib", ".venv", "__pycache__", "*.pyc"),
}
_COMMENTS = 28
"""Their column in params.yaml."""
OURS = ("qatlib", "stages")
"""Packages that the stages run."""


@dataclass(frozen=True)
class Entries:
    """``module:callable`` names; None for one that is still to be written, or of metric and loss the default."""

    model: str | None = None
    data: str | None = None
    metric: str | None = None
    loss: str | None = None
    checkpoint: str = "float.safetensors"


def init(folder: str | Path = ".", entries: Entries | None = None, target: str = "bayes-like") -> list[Path]:
    """Write dvc.yaml, params.yaml, target.yaml and, unless model and data are named, a module to fill in.

    Lines are added to .gitignore and .dvcignore; DVC is initialized where it is not. Returns the files written. Raises
    before anything is: OutputError QAT225 if one of the files is there; ConfigError QAT103 for a model or data whose
    source is not in the folder, QAT101 for an entry point that is none; CompileError QAT183 for an unknown target;
    StageError QAT219 if the folder is in no git repository.
    """
    folder, entries = Path(folder), entries or Entries()
    named = [_source(folder, entry) for entry in (entries.model, entries.data) if entry]
    scored = [_source(folder, entry) for entry in (entries.metric, entries.loss) if entry]
    more = [path for path in dict.fromkeys(scored) if path and path not in named]
    files = {
        "params.yaml": params_text(folder, entries),
        "dvc.yaml": pipeline_text(next((name for name in LOCKS if (folder / name).is_file()), None), more),
        "target.yaml": _target(target),
    }
    if entries.model is None or entries.data is None:
        files[f"{ENTRIES}.py"] = (TEMPLATES / "entries.py").read_text(encoding="utf-8")
    _refuse_what_is_there(folder, files)
    _init_dvc(folder)
    for name, lines in IGNORED.items():
        _add_lines(folder / name, lines)
    for name, text in files.items():
        write_text(folder / name, text)
    return [folder / name for name in files]


def params_text(folder: Path, entries: Entries) -> str:
    """The params.yaml of a project in ``folder``, every key with its comment."""
    text = (TEMPLATES / "params.yaml").read_text(encoding="utf-8")
    text = text.replace(" (the example: root, seed, limit)", "")
    model, data = entries.model or f"{ENTRIES}:build_model", entries.data or f"{ENTRIES}:build_data"
    values = {
        "model.factory": model,
        "model.kwargs": "{}",
        "model.checkpoint": entries.checkpoint,
        "model.code": _watched(folder, model, "--model"),
        "data.factory": data,
        "data.kwargs": "{}",
        "data.code": _watched(folder, data, "--data"),
        "compile.target": "target.yaml",
        "float_check.floor": "null",
    }
    values |= {"metric.factory": entries.metric} if entries.metric else {}
    values |= {"qat.loss": entries.loss} if entries.loss else {}
    text = _with_values(text, values)
    check_config(yaml_values(text), "params.yaml")
    return text


def pipeline_text(lock: str | None, more: Sequence[str] = ()) -> str:
    """The dvc.yaml that runs the stages of the installed package.

    ``lock`` pins the environment, if anything does; ``more`` are files, beside those of model and data, that every
    stage watches.
    """
    lines = (TEMPLATES / "pipeline.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index("stages:")
    head = ["# float_check → calibrate → qat → convert → compile_sim → analyze, run by the installed qatlib."]
    head += ["# Every knob is in params.yaml."]
    if lock is None:
        head.append("# The version of qatlib is no dependency: after an upgrade run dvc repro --force.")
    body = []
    for line in lines[start:]:
        if line == "      - constraints.txt":
            body += [f"      - {lock}"] if lock else []
        elif not re.match(r"      - (qatlib|stages)/", line):
            body.append(line)
        if line == "      - ${data.code}":
            body += [f"      - {path}" for path in more]
    return "\n".join([*head, *body]) + "\n"


def _with_values(text: str, values: Mapping[str, str]) -> str:
    """``section.key: value`` put in the place of what stands there; comments stay."""
    lines, section = text.splitlines(), ""
    left = dict(values)
    for index, line in enumerate(lines):
        if top := re.match(r"(\w+):", line):
            section = top[1]
        found = re.match(r"  (\w+): +(\S+)( *)(#.*)?$", line)
        if found and (new := left.pop(f"{section}.{found[1]}", None)) is not None:
            head = f"  {found[1]}: {new}"
            lines[index] = f"{head.ljust(max(_COMMENTS, len(head) + 3))}{found[4]}" if found[4] else head
    if left:
        raise AssertionError(f"params.yaml has no line for {sorted(left)}")
    return "\n".join(lines) + "\n"


def _watched(folder: Path, entry: str, option: str) -> str:
    """The file of an entry point, which DVC watches."""
    path = _source(folder, entry)
    if path is None:
        seen = f"module {entry.partition(':')[0]!r} has no source file in {folder} or {folder / 'src'}"
        raise ConfigError("QAT103", option, seen, "Name one of this project: a function there may call any library")
    return path


def _source(folder: Path, entry: str) -> str | None:
    """The file of a module in ``folder``, or in ``src`` there; None for one that is elsewhere, as in a library."""
    module = entry.partition(":")[0]
    if module == ENTRIES:
        return f"{ENTRIES}.py"
    for root in (folder, folder / "src"):
        path = root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file.relative_to(folder).as_posix()
    return None


def _target(name: str) -> str:
    from qatlib.compiler.target import SHIPPED, load_target

    load_target(name)
    path = SHIPPED / f"{name}.yaml"
    return (path if path.is_file() else Path(name)).read_text(encoding="utf-8")


def _refuse_what_is_there(folder: Path, files: Mapping[str, str]) -> None:
    there = [name for name in files if (folder / name).exists()]
    if there:
        seen = f"holds {', '.join(there)}, which would be overwritten"
        raise OutputError("QAT225", str(folder), seen, "Move that away, or name another folder")
    for name in OURS:
        if (folder / f"{name}.py").exists() or (folder / name / "__init__.py").exists():
            seen = f"holds a package {name!r}, which hides that of this library"
            raise OutputError("QAT225", str(folder), seen, "Name another folder, such as one below it")


def _init_dvc(folder: Path) -> None:
    """`dvc init` where no folder above is a DVC repository."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCM, SCMError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        Repo.find_root(str(folder))
        return
    except NotDvcRepoError:
        pass
    try:
        root = Path(SCM(str(folder)).root_dir).resolve()
        Repo.init(str(folder), subdir=root != folder.resolve()).close()
    except (DvcException, SCMError) as error:
        raise StageError("QAT219", str(folder), f"is in no git repository ({error})", "Run git init first") from None


def _add_lines(path: Path, lines: tuple[str, ...]) -> None:
    """Those that are not there yet, at the end."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in lines if line not in text.splitlines()]
    if missing:
        gap = "" if not text or text.endswith("\n") else "\n"
        write_text(path, text + gap + "\n".join(missing) + "\n")
