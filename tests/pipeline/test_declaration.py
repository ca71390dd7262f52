"""dvc.yaml says everything a stage depends on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


def imports(file: Path) -> set[str]:
    """Modules of the project that running ``file`` can import, those only for type checking left out."""
    found: set[str] = set()

    class Walk(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            if node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)

    Walk().visit(ast.parse(file.read_text()))
    return {name for name in found if name.startswith("qatlib")}


def sources(module: str) -> list[Path]:
    """Its file, and the ``__init__.py`` of the packages it lies in below qatlib."""
    path = ROOT.joinpath(*module.split("."))
    files = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()]
    parents = [p / "__init__.py" for p in path.parents if p.is_relative_to(ROOT / "qatlib") and p != ROOT / "qatlib"]
    return files + [p for p in parents if p.exists()]


def closure(file: Path) -> set[Path]:
    seen: set[Path] = set()
    todo = [file]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += [source for name in imports(current) for source in sources(name)]
            if current.name == "__init__.py" and current.parent.name in ("ops", "rules"):
                todo += current.parent.glob("*.py")  # they import whatever lies in their folder
    return seen - {ROOT / "qatlib" / "__init__.py"}  # lazy: it holds names, no code that a stage runs


@pytest.mark.parametrize("stage", STAGES)
def test_deps_cover_every_import(stage: str) -> None:
    deps = [ROOT / dep for dep in STAGES[stage]["deps"] if not dep.startswith("${")]
    needed = closure(ROOT / "stages" / f"{stage}.py")
    missing = [f for f in needed if not any(f == dep or f.is_relative_to(dep) for dep in deps)]
    assert not missing, sorted(str(f.relative_to(ROOT)) for f in missing)
    unused = [d for d in deps if d.suffix != ".txt" and d.is_relative_to(ROOT / "qatlib")
              and not any(f == d or f.is_relative_to(d) for f in needed)]  # fmt: skip
    assert not unused, f"a change of {unused} reruns {stage} for nothing"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_says_what_it_does_and_tracks_its_environment(stage: str) -> None:
    assert STAGES[stage]["desc"]
    assert "constraints.txt" in STAGES[stage]["deps"]
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


def test_changing_a_goal_reruns_analyze_alone() -> None:
    assert [name for name, stage in STAGES.items() if "goals" in stage["params"]] == ["analyze"]


def test_the_learning_rate_never_recalibrates() -> None:
    def reads(stage: str, key: str) -> bool:
        return any(key == param or key.startswith(f"{param}.") for param in STAGES[stage]["params"])

    assert [name for name in STAGES if reads(name, "qat.lr")] == ["qat"]
    assert next(name for name in STAGES if reads(name, "qat.hybrid")) == "calibrate"
