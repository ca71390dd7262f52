"""Entry points: what goes wrong is told with the key, the file and line of the user's code, and the fix."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qatlib.errors import ConfigError, DataError
from qatlib.pipeline.entry import call_entry, load_entry


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable current folder; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("user_"):
            del sys.modules[name]


def failure(entry: str, kwargs: dict[str, object] | None = None, *args: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call_entry(entry, kwargs or {}, *args, key="model")
    return caught.value


def test_current_folder_is_importable(project: Path) -> None:
    (project / "user_a.py").write_text("class Box:\n    @staticmethod\n    def make(): return 7\n")
    assert load_entry("user_a:Box.make")() == 7


def test_missing_module_with_a_near_name(project: Path) -> None:
    (project / "user_model.py").write_text("")
    error = failure("user_modle:build")
    assert (error.code, error.where) == ("QAT103", "model.factory")
    assert "module 'user_modle' is not found; did you mean user_model?" in str(error)


def test_missing_module_inside_a_package(project: Path) -> None:
    (project / "user_pkg").mkdir()
    (project / "user_pkg" / "__init__.py").write_text("")
    (project / "user_pkg" / "model.py").write_text("")
    assert "did you mean user_pkg.model?" in str(failure("user_pkg.modle:build"))


def test_missing_callable_with_a_near_name(project: Path) -> None:
    (project / "user_b.py").write_text("def build(): pass\n")
    error = failure("user_b:biuld")
    assert error.code == "QAT103"
    assert "user_b has no 'biuld'; did you mean 'build'?" in str(error)


def test_not_callable(project: Path) -> None:
    (project / "user_c.py").write_text("build = 3\n")
    assert "'user_c:build' is a int, which cannot be called" in str(failure("user_c:build"))


@pytest.mark.parametrize("entry", ["module", ":x", "m:"])
def test_not_an_entry_point(entry: str) -> None:
    assert failure(entry).code == "QAT103"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\nraise ValueError('broken')\n", "ValueError at user_d.py:2: broken"),
        ("import not_there_at_all\n", "ModuleNotFoundError at user_d.py:1: No module named 'not_there_at_all'"),
        ("def f(:\n", "SyntaxError at user_d.py:1"),
        ("import sys\nsys.exit(2)\n", "SystemExit at user_d.py:2: 2"),
    ],
)
def test_import_that_raises_names_the_line(project: Path, source: str, expected: str) -> None:
    (project / "user_d.py").write_text(source)
    error = failure("user_d:build")
    assert error.code == "QAT104"
    assert f"importing user_d raised {expected}" in str(error)
    assert error.__cause__ is not None


def test_kwargs_that_do_not_fit(project: Path) -> None:
    (project / "user_e.py").write_text("def build(split, width=1, *, depth=2): pass\n")
    error = failure("user_e:build", {"widht": 3}, "train")
    assert (error.code, error.where) == ("QAT105", "model.kwargs")
    assert "'widht'; did you mean 'width'?" in str(error)
    assert error.fix.endswith("width, depth")


def test_missing_argument(project: Path) -> None:
    (project / "user_f.py").write_text("def build(width): pass\n")
    assert "missing a required argument: 'width'" in str(failure("user_f:build"))


def test_call_that_raises_names_the_line(project: Path) -> None:
    (project / "user_g.py").write_text("def build(width):\n    return 1 / width\n")
    error = failure("user_g:build", {"width": 0})
    assert error.code == "QAT104"
    assert "user_g:build(width=0) raised ZeroDivisionError at user_g.py:2: division by zero" in str(error)


def test_errors_with_a_code_pass_through(project: Path) -> None:
    (project / "user_h.py").write_text(
        "from qatlib.errors import DataError\ndef build(): raise DataError('QAT110', 'a', 'b', 'c')\n"
    )
    with pytest.raises(DataError, match=r"QAT110"):
        call_entry("user_h:build", {})
