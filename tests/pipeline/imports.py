"""Which files of the project running a module can import, read from the source: nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("examples", "qatlib", "stages")
SCANS = (ROOT / "qatlib" / "ops", ROOT / "qatlib" / "analysis" / "rules")
"""Packages that import whatever lies in their folder."""
LAZY = ROOT / "qatlib" / "__init__.py"
"""Holds names, no code that anything runs."""


def closure(modules: Iterable[str]) -> set[Path]:
    """Source files of ``modules`` and of all that they import, the packages around each included.

    Left out are files that hold a docstring and no code, as most ``__init__.py`` do, and :data:`LAZY`.
    """
    todo = [path for module in modules for path in sources(module)]
    seen: set[Path] = set()
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += [source for name in imports(current) for source in sources(name)]
            if current.name == "__init__.py" and current.parent in SCANS:
                todo += current.parent.glob("*.py")
    return {path for path in seen - {LAZY} if has_code(path)}


def has_code(file: Path) -> bool:
    body = ast.parse(file.read_text()).body
    is_docstring = len(body) == 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return bool(body) and not is_docstring


def sources(module: str) -> list[Path]:
    """The file of a module of the project, and the ``__init__.py`` of the packages around it."""
    path = ROOT.joinpath(*module.split("."))
    files = [p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()]
    above = [p / "__init__.py" for p in path.parents if p.is_relative_to(ROOT) and p != ROOT]
    return files + [p for p in above if p.is_file()]


@cache
def imports(file: Path) -> frozenset[str]:
    """Names that ``file`` imports from the project, wherever in it; those only for type checking left out."""
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
    return frozenset(name for name in found if name.split(".")[0] in PACKAGES)
