"""``make check`` in a bare clone: two pipelines, of which one takes what the other makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.pipeline.conftest import ROOT, Repository

PIPELINES = {
    "dvc.yaml": "stages: {first: {cmd: cp one.txt first.bin, deps: [one.txt], outs: [first.bin]}}",
    "examples/second/dvc.yaml": "stages:\n"
    "  middle: {cmd: cp ../../first.bin m.bin, deps: [../../first.bin, two.txt], outs: [m.bin]}\n"
    "  last: {cmd: cp m.bin last.txt, deps: [m.bin], params: [x], outs: [{last.txt: {cache: false}}]}\n",
}
FILES = {
    "one.txt": "1",
    "examples/second/two.txt": "2",
    "examples/second/params.yaml": "x: 1\n",
    ".gitignore": "*.bin\n",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A clone of a project whose pipelines have run; it has no output that is not in git, and no cache."""
    origin = Repository(tmp_path_factory.mktemp("origin"))
    for name, text in {**PIPELINES, **FILES}.items():
        (origin.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (origin.folder / name).write_text(text)
    (origin.folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "locks", origin.folder / ".ci")
    origin.run("git", "init", "-q")
    origin.run("dvc", "init", "-q")
    origin.run("dvc", "repro", "--all-pipelines")
    origin.run("git", "add", "-A")
    origin.run("git", "commit", "-qm", "results")
    folder = tmp_path_factory.mktemp("clone") / "project"
    origin.run("git", "clone", "-q", str(origin.folder), str(folder))
    assert not list(folder.rglob("*.bin"))
    return Repository(folder)


@pytest.mark.slow
def test_what_is_recorded_passes(clone: Repository) -> None:
    done = clone.run(".ci/locks")
    assert done.stdout.count("didn't change, skipping") == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("one.txt", "first"),
        ("examples/second/two.txt", "examples/second/dvc.yaml:middle"),  # its other input is not there
        ("examples/second/params.yaml", "examples/second/dvc.yaml:last"),
        ("examples/second/last.txt", "examples/second/dvc.yaml:last"),
    ],
)
def test_a_change_fails_and_names_its_stage(clone: Repository, tmp_path: Path, file: str, stage: str) -> None:
    repository = clone.copy(tmp_path / "p")
    (repository.folder / file).write_text("x: 3\n")
    done = repository.run(".ci/locks", check=False)
    assert done.returncode == 1
    assert stage in done.stdout.replace(f"Stage '{stage}' didn't change", "")
    assert "dvc status" in done.stderr
    assert repository.run("git", "status", "--porcelain").stdout == f" M {file}\n"
