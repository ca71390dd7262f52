"""qatlib init: what it writes is the pipeline of this repository, for a project that is none of it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ruamel.yaml import YAML

from qatlib.analysis.check import check
from qatlib.cli import main
from qatlib.compiler.target import load_target
from qatlib.errors import ConfigError, OutputError, StageError
from qatlib.pipeline.checkpoint import save_tensors
from qatlib.pipeline.config import Config, load_config
from qatlib.pipeline.project import Project
from qatlib.scaffold import ENTRIES, Entries, init, pipeline_text
from tests.pipeline import tiny
from tests.pipeline.conftest import Repository
from tests.pipeline.imports import ROOT
from tests.pipeline.test_config import PARAMS, keys_of

NAMED = Entries("tiny:build_model", "tiny:build_data")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a model in it."""
    monkeypatch.chdir(tmp_path)
    Repository(tmp_path).run("git", "init", "-q")
    shutil.copy(Path(tiny.__file__), tmp_path / "tiny.py")
    return tmp_path


def load(path: Path) -> dict[str, object]:
    document: dict[str, object] = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return document


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["init", *arguments])


def test_params_have_every_key_of_the_schema_with_its_comment(folder: Path) -> None:
    init(folder, NAMED)

    def same(schema: dict[str, object], document: object) -> None:
        assert isinstance(document, dict)
        assert set(schema) == set(document)
        for name, inner in schema.items():
            if isinstance(inner, dict):
                same(inner, document[name])

    same(keys_of(Config), load(folder / "params.yaml"))
    config = load_config(folder / "params.yaml")
    assert (config.model.factory, config.model.code) == ("tiny:build_model", "tiny.py")
    assert (config.data.factory, config.data.code) == ("tiny:build_data", "tiny.py")
    written, root = ((path / "params.yaml").read_text(encoding="utf-8") for path in (folder, PARAMS.parent))
    assert len(written.splitlines()) == len(root.splitlines())
    assert written.count("#") == root.count("#")
    assert "examples" not in written.replace("make examples", "")


def test_the_pipeline_is_that_of_this_repository_without_its_code(folder: Path) -> None:
    init(folder, NAMED)
    written, root = load(folder / "dvc.yaml"), load(ROOT / "dvc.yaml")
    assert list(written["stages"]) == list(root["stages"])  # type: ignore[call-overload]
    for name, stage in written["stages"].items():  # type: ignore[attr-defined]
        original = root["stages"][name]  # type: ignore[index]
        assert {key: value for key, value in stage.items() if key != "deps"} == {
            key: value for key, value in original.items() if key != "deps"
        }
        code = re.compile(r"(qatlib|stages)/|constraints\.txt$")
        assert stage["deps"] == [dep for dep in original["deps"] if not code.match(dep)]


@pytest.mark.parametrize(("there", "dep"), [((), None), (("requirements.txt", "uv.lock"), "uv.lock")])
def test_what_pins_the_environment_is_watched(folder: Path, there: tuple[str, ...], dep: str | None) -> None:
    for name in there:
        (folder / name).touch()
    init(folder, NAMED)
    stages = load(folder / "dvc.yaml")["stages"]
    assert all((dep in stage["deps"]) == (dep is not None) for stage in stages.values())  # type: ignore[attr-defined]
    assert ("dvc repro --force" in (folder / "dvc.yaml").read_text()) == (dep is None)


def test_metric_and_loss_of_the_project_are_watched_those_of_a_library_not(folder: Path) -> None:
    (folder / "src" / "net").mkdir(parents=True)
    (folder / "src" / "net" / "__init__.py").touch()
    (folder / "score.py").touch()
    init(folder, Entries("net:build", "tiny:build_data", "score:Score", "torch.nn.functional:mse_loss"))
    config = load_config(folder / "params.yaml")
    assert config.model.code == "src/net/__init__.py"
    assert (config.metric.factory, config.qat.loss) == ("score:Score", "torch.nn.functional:mse_loss")
    stages = load(folder / "dvc.yaml")["stages"]
    assert all("score.py" in stage["deps"] for stage in stages.values())  # type: ignore[attr-defined]
    assert pipeline_text(None).count("score.py") == 0


@pytest.mark.parametrize("name", ["dvc.yaml", "params.yaml", "target.yaml", f"{ENTRIES}.py"])
def test_nothing_is_overwritten_and_nothing_written_beside_it(folder: Path, name: str) -> None:
    (folder / name).write_text("precious")
    before = sorted(path.name for path in folder.iterdir())
    done = command()
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith(f"QAT225 .: holds {name}, which would be overwritten")
    assert (folder / name).read_text() == "precious"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_package_of_the_same_name_would_hide_the_stages(folder: Path) -> None:
    (folder / "stages.py").touch()
    with pytest.raises(OutputError, match=r"^QAT225"):
        init(folder, NAMED)


def test_what_cannot_be_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ConfigError, match=r"^QAT103 --model: module 'torch\.nn' has no source file"):
        init(folder, Entries("torch.nn:Identity", "tiny:build_data"))
    with pytest.raises(ConfigError, match=r"^QAT101 params\.yaml"):
        init(folder, Entries("tiny:build_model", "tiny:build_data", loss="cross_entropy"))
    assert command("--target", "nothing").stderr.startswith("QAT183 ")
    shutil.rmtree(folder / ".git")
    with pytest.raises(StageError, match=r"^QAT219 .*git init"):
        init(folder, NAMED)
    assert sorted(path.name for path in folder.iterdir()) == [name for name in before if name != ".git"]


def test_lines_are_added_to_ignore_files_once(folder: Path) -> None:
    (folder / ".gitignore").write_text("mine\n__pycache__/")
    init(folder, NAMED)
    assert (folder / ".gitignore").read_text() == "mine\n__pycache__/\n.qatlib/\n/profile/\n/tune/\n"
    assert {".qatlib", "__pycache__"} <= set((folder / ".dvcignore").read_text().splitlines())


def test_a_folder_below_joins_the_dvc_of_the_repository(folder: Path) -> None:
    Repository(folder).run("dvc", "init", "-q")
    init(folder / "net")
    assert not (folder / "net" / ".dvc").exists()
    assert load_target(folder / "net" / "target.yaml") == load_target("bayes-like")
    init(folder / "other")


def test_a_folder_below_a_repository_without_dvc_gets_its_own(folder: Path) -> None:
    init(folder / "net")
    assert (folder / "net" / ".dvc" / "config").is_file()


def looked_at(part: str | None = None) -> list[str]:
    """Errors of `qatlib check`, of the entry points as they are now."""
    sys.modules.pop(ENTRIES, None)
    return [error for section in check(Project(load_config()), part) for error in section.errors]


def test_check_says_what_is_still_to_be_written_and_passes_when_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(folder)
    done = command()
    assert done.exit_code == 0, done.stderr
    assert f"1. fill in {ENTRIES}.py" in done.output
    (error,) = looked_at("entries")[:1]
    assert error.startswith("QAT104 model.factory: ")
    assert "return your float model from build_model" in error
    (folder / f"{ENTRIES}.py").write_text(FILLED)
    save_tensors(folder / "float.safetensors", tiny.train())
    assert looked_at() == []


FILLED = "from tiny import build_data, build_model  # noqa: F401\n"


@pytest.mark.slow
def test_the_pipeline_runs_in_the_project_of_a_user(folder: Path) -> None:
    repository = Repository(folder)
    repository.run("qatlib", "init")
    (folder / f"{ENTRIES}.py").write_text(FILLED)
    save_tensors(folder / "float.safetensors", tiny.train())
    repository.run("dvc", "add", "-q", "float.safetensors")
    assert "0 errors" in repository.run("qatlib", "check").stdout
    repository.run("dvc", "repro")
    assert "goal passed: ratio.integer" in repository.run("qatlib", "summary").stdout
    assert "runs 0 of" in repository.run("qatlib", "why").stdout
