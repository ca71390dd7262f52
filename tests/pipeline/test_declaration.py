"""Every dvc.yaml says everything that its stages depend on: imports, entry points, files, parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.pipeline.imports import PACKAGES, ROOT, closure

PIPELINES = [ROOT / "dvc.yaml", *sorted(ROOT.glob("examples/*/dvc.yaml"))]
FILLED = ("${model.checkpoint}", "${compile.target}", "${item.target.file}")
REFERENCE_MODELS = ("detector", "efficientnet_lite0", "hard_case", "recurrent", "sentence_encoder", "warp")


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = YAML(typ="safe").load(path.read_text())
    return document


@dataclass(frozen=True)
class Stage:
    """One stage; paths come out absolute."""

    file: Path
    name: str
    body: dict[str, Any]

    @property
    def base(self) -> Path:
        return (self.file.parent / self.body.get("wdir", ".")).resolve()

    @cached_property
    def config(self) -> dict[str, Any]:
        """``params.yaml`` beside the pipeline: of an example that only trains, no pipeline parameters."""
        path = self.file.with_name("params.yaml")
        return load(path) if path.is_file() else {}

    @property
    def commands(self) -> list[str]:
        cmd = self.body["cmd"]
        return [cmd] if isinstance(cmd, str) else cmd

    @property
    def params(self) -> dict[Path, list[str]]:
        """Parameters by file; an empty list is the whole file."""
        found: dict[Path, list[str]] = {}
        for entry in self.body.get("params", ()):
            if isinstance(entry, str):
                found.setdefault(self.base / "params.yaml", []).append(entry)
            else:
                found |= {self.base / path: keys or [] for path, keys in entry.items()}
        return found

    def reads(self, key: str) -> bool:
        keys = self.params.get(self.file.with_name("params.yaml"), [])
        return any(key == param or key.startswith(f"{param}.") for param in keys)

    def paths(self, *kinds: str) -> list[Path]:
        """Declared paths, ``${…}`` filled in."""
        entries = [entry for kind in kinds for entry in self.body.get(kind, ())]
        names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]
        fixed = [name for name in names if "${item." not in name]
        varied = [
            re.sub(r"\$\{item\.target\.(\w+)\}", lambda match, item=item: item[match[1]], name)
            for item in (self.config["compile"]["targets"] if "matrix" in self.body else ())
            for name in names
            if name not in fixed
        ]
        return [(self.base / re.sub(r"\$\{([\w.]+)\}", self._value, name)).resolve() for name in (*fixed, *varied)]

    def _value(self, match: re.Match[str]) -> str:
        value: Any = self.config
        for key in match[1].split("."):
            value = value[key]
        return str(value)

    @property
    def code(self) -> list[Path]:
        """Dependencies on code of the project, named in the file itself: what ``${…}`` brings in is the user's."""
        named = [entry for entry in self.body["deps"] if "${" not in entry]
        paths = [(self.base / entry).resolve() for entry in named]
        sources = [p for p in paths if p.suffix == ".py" or (p / "__init__.py").is_file()]
        return [p for p in sources if p.relative_to(ROOT).parts[0] in PACKAGES]

    @property
    def modules(self) -> list[str]:
        """What the stage runs: the modules of its commands, and the entry points that it reads from ``params.yaml``.

        ``python -m examples.compare NAME`` also imports ``examples.NAME.metric``.
        """
        found = [re.search(r"python -m (\S+)", command)[1] for command in self.commands]  # type: ignore[index]
        found += [
            f"examples.{name}.metric" for name in re.findall(r"-m examples\.compare (\w+)", " ".join(self.commands))
        ]
        if self.file.parent != ROOT:  # its entry points are the user's, watched by model.code and data.code
            found += [
                self.config[key]["factory"].split(":")[0] for key in ("model", "data", "metric") if self.reads(key)
            ]
            found += [self.config["qat"]["loss"].split(":")[0]] if self.reads("qat.loss") else []
        return found


STAGES = [Stage(path, name, body) for path in PIPELINES for name, body in load(path)["stages"].items()]
ROOTS = {stage.name: stage for stage in STAGES if stage.file == ROOT / "dvc.yaml"}
COPIES = [stage for stage in STAGES if stage.file.parent.name in REFERENCE_MODELS and stage.name in ROOTS]


def name(stage: Stage) -> str:
    return f"{stage.file.parent.relative_to(ROOT)}:{stage.name}"


def covers(dep: Path, file: Path) -> bool:
    return file == dep or file.is_relative_to(dep)


def shown(paths: set[Path] | list[Path]) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_the_code_it_depends_on_is_the_code_it_imports(stage: Stage) -> None:
    needed = closure(stage.modules)
    missing = [file for file in needed if not any(covers(dep, file) for dep in stage.code)]
    assert not missing, f"{name(stage)} misses {shown(missing)}"
    packages = {dep: {file.parent for file in dep.rglob("*.py")} for dep in stage.code if dep.is_dir()}
    unused = [dep for dep in stage.code if not any(covers(dep, file) for file in needed)]
    unused += [p for inside in packages.values() for p in inside if not any(file.parent == p for file in needed)]
    assert not unused, f"a change of {shown(unused)} reruns {name(stage)} for nothing"


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_what_else_it_depends_on_is_in_git_or_made_by_a_stage(stage: Stage) -> None:
    made = {path for other in STAGES for path in other.paths("outs", "metrics", "plots")}
    unknown = [path for path in stage.paths("deps") if path not in made and not path.exists()]
    assert not unknown, shown(unknown)
    assert len(set(stage.paths("deps"))) == len(stage.paths("deps"))


@pytest.mark.parametrize("stage", STAGES, ids=name)
def test_it_says_what_it_does_and_tracks_its_environment(stage: Stage) -> None:
    assert stage.body["desc"]
    assert (ROOT / "constraints.txt" in stage.paths("deps")) or stage.name == "fetch"


# -- the examples run the same pipeline ----------------------------------------------------------------------------


def test_the_stages_of_the_examples() -> None:
    first = {"efficientnet_lite0": ["fetch", "prepare"], "sentence_encoder": ["fetch", "prepare"]}
    for example in REFERENCE_MODELS:
        stages = [stage.name for stage in STAGES if stage.file.parent.name == example]
        assert stages == [*first.get(example, ["train"]), *ROOTS, "compare"], example
    assert {path.parent.name for path in PIPELINES} == {ROOT.name, "fashion_mnist", *REFERENCE_MODELS}


@pytest.mark.parametrize("stage", COPIES, ids=name)
def test_a_stage_of_an_example_reads_and_writes_what_that_of_the_project_does(stage: Stage) -> None:
    original, folder = ROOTS[stage.name], stage.file.parent
    assert stage.body["cmd"] == f"PYTHONPATH=../.. {original.body['cmd']}"
    assert stage.body["params"] == original.body["params"]
    assert stage.body.get("matrix") == original.body.get("matrix")
    for kind in ("outs", "metrics", "plots"):
        assert stage.body.get(kind) == original.body.get(kind)
    files = {path for path in original.paths("deps") if path.relative_to(ROOT).parts[0] in ("artifacts", "reports")}
    assert {folder / path.relative_to(ROOT) for path in files} <= set(stage.paths("deps"))
    filled = [entry for entry in original.body["deps"] if entry in FILLED]
    assert set(filled) <= set(stage.body["deps"])


# -- what a parameter reruns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ROOTS.values(), ids=name)
def test_a_stage_of_the_project_runs_its_module(stage: Stage) -> None:
    item = " ${item.target.name}" if "matrix" in stage.body else ""
    assert stage.body["cmd"] == f"python -m stages.{stage.name}{item}"


def test_changing_a_goal_reruns_analyze_alone() -> None:
    assert [stage.name for stage in ROOTS.values() if stage.reads("goals")] == ["analyze"]


def test_the_learning_rate_never_recalibrates() -> None:
    assert [stage.name for stage in ROOTS.values() if stage.reads("qat.lr")] == ["qat"]
    assert next(stage.name for stage in ROOTS.values() if stage.reads("qat.hybrid")) == "calibrate"
