"""compile.targets: a stage for each, what it leaves, and who shows it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qatlib.analysis.revision import load_revision
from qatlib.analysis.targets import NUMBERS, markdown, read_targets, rows
from qatlib.compiler import compile_model
from qatlib.errors import ConfigError, StageError
from qatlib.pipeline.config import check_config, load_config, yaml_values
from qatlib.program import Program
from tests.pipeline.conftest import ROOT, Repository, lay_out

OTHERS = [
    {"name": "nash", "file": "qatlib/targets/nash-like.yaml"},
    {"name": "small", "file": "qatlib/targets/bernoulli-like.yaml"},
]
PARAMS = "compile:\n  targets:\n  - {name: nash, file: n.yaml}\n  - {name: small, file: s.yaml}\n"


def test_reports_of_the_targets_that_are_named() -> None:
    files = {
        "reports/targets/nash/metrics.json": json.dumps(
            {"nash": dict(zip(NUMBERS, (2.5, 2048, 1024, 0), strict=True))}
        ),
        "reports/targets/gone/metrics.json": '{"gone": {"latency_us": 1.0}}',
    }
    found = read_targets(PARAMS, files.get)
    assert found == {
        "nash": {"latency_us": 2.5, "dram_bytes": 2048.0, "sram_peak_bytes": 1024.0, "refused_ops": 0.0},
        "small": dict.fromkeys(NUMBERS),
    }
    assert rows(found) == [("nash", "2.5", "2.0", "1.0", "0"), ("small", "–", "–", "–", "–")]
    assert "| nash | 2.5 | 2.0 | 1.0 | 0 |" in markdown(found)
    assert read_targets("compile: {target: a.yaml}", files.get) == {}
    assert markdown({}) == ""


@pytest.mark.parametrize("text", ["[", "{}", '{"nash": 3}', '{"nash": {"latency_us": "fast"}}'])
def test_a_report_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(StageError, match=r"^QAT195 reports/targets/nash/metrics\.json: cannot be read"):
        read_targets(PARAMS, lambda path: text)


@pytest.mark.parametrize(
    ("targets", "seen"),
    [
        ([{"name": "a", "file": "x.yaml"}, {"name": "A", "file": "y.yaml"}], "targets: a is there more than once"),
        ([{"name": "a/b", "file": "x.yaml"}], "compile.targets[0].name: 'a/b'"),
        (["nash-like"], "compile.targets[0]: 'nash-like' must be a mapping"),
    ],
)
def test_what_params_yaml_may_not_say(targets: list[Any], seen: str) -> None:
    document = yaml_values((ROOT / "params.yaml").read_text())
    document["compile"]["targets"] = targets
    with pytest.raises(ConfigError, match=r"^QAT101") as error:
        check_config(document, "params.yaml")
    assert seen in str(error.value)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    project = lay_out(tmp_path_factory.mktemp("converted") / "project")
    project.set(qat={"epochs": 0}, compile={"targets": OTHERS})
    for stage in ("calibrate", "qat", "convert"):
        project.stage(stage)
    return project


def test_a_stage_leaves_what_the_compiler_says(converted: Repository) -> None:
    for other in OTHERS:
        converted.run("python", "-m", "stages.targets", other["name"])
    executable = compile_model(Program.load(converted.folder / "artifacts/program"), "nash-like")
    found = read(converted, "nash", "metrics")["nash"]
    assert found["latency_us"] == pytest.approx(executable.performance.latency_us, rel=1e-5)
    assert found["sram_peak_bytes"] == executable.memory.sram.peak_bytes
    assert (found["differing_elements"], found["check_images"], found["refused_ops"]) == (0, 16, 0)
    assert read(converted, "nash", "performance")["target"] == "nash-like"
    assert read(converted, "small", "refusals")["target"] == "bernoulli-like"


def test_a_refusal_is_a_result(converted: Repository) -> None:
    refusing = Repository(converted.folder)
    text = (ROOT / "qatlib/targets/nash-like.yaml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith("  linear:")]
    (converted.folder / "narrow.yaml").write_text("\n".join(kept).replace("nash-like", "narrow"))
    refusing.set(compile={"targets": [{"name": "narrow", "file": "narrow.yaml"}]})
    refusing.run("python", "-m", "stages.targets", "narrow")
    assert read(refusing, "narrow", "metrics") == {"narrow": {"refused_ops": 1}}
    assert [one["code"] for one in read(refusing, "narrow", "refusals")["refusals"]] == ["QAT184"]
    unknown = refusing.run("python", "-m", "stages.targets", "nash", check=False)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1)
    assert unknown.stderr.startswith("QAT102 compile.targets: names no 'nash'; it has narrow")
    refusing.set(compile={"targets": OTHERS})


def read(project: Repository, name: str, what: str) -> Any:
    return json.loads((project.folder / f"reports/targets/{name}/{what}.json").read_text())


@pytest.mark.slow
def test_a_matrix_of_stages(finished: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = finished.copy(tmp_path / "project")
    project.set(compile={"targets": OTHERS})
    done = project.run("dvc", "repro").stdout
    ran = {name for name in ("qat", "convert", "targets@target0", "targets@target1", "analyze") if f"'{name}'" in done}
    assert {"targets@target0", "targets@target1"} <= ran
    assert "Running stage 'qat'" not in done
    assert "Running stage 'convert'" not in done
    assert "didn't change" in project.run("dvc", "repro").stdout
    shown = project.run("qatlib", "summary").stdout
    assert "nash" in shown
    assert "small" in shown
    document = json.loads(project.run("qatlib", "report", "--base", "HEAD", "--json").stdout)
    assert [(row["name"], row["latency_us"]["base"]) for row in document["targets"]] == [
        ("nash", None),
        ("small", None),
    ]
    assert document["targets"][0]["latency_us"]["head"] == read(project, "nash", "metrics")["nash"]["latency_us"]
    assert "latency on nash, µs" in project.run("qatlib", "report", "--base", "HEAD", "--md").stdout
    project.set(compile={"targets": OTHERS[:1]})
    project.run("dvc", "repro")
    assert "small" not in project.run("qatlib", "summary").stdout, "what is left in the folder is not shown"
    monkeypatch.chdir(project.folder)
    assert set(load_revision("workspace").targets) == {"nash"}
    assert load_config().compile.targets[0].name == "nash"
    shutil.rmtree(project.folder / "reports/targets")
    assert read_targets((project.folder / "params.yaml").read_text(), lambda path: None)["nash"]["latency_us"] is None
