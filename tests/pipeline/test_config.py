"""params.yaml: every mistake is named with its key, what was seen and what is legal, all together."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from qatlib.errors import ConfigError
from qatlib.pipeline import config
from qatlib.pipeline.config import Config, load_config

PARAMS = Path(__file__).parents[2] / "params.yaml"
MINIMAL = 'model: {factory: "m:build", checkpoint: w.pt, code: m.py}\ndata: {factory: "d:build", code: d.py}\n'


def parse(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_config(path)


def failure(tmp_path: Path, text: str, code: str = "QAT101") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(tmp_path, text)
    assert caught.value.code == code
    return str(caught.value)


def test_params_yaml_of_the_repository_is_legal() -> None:
    assert load_config(PARAMS).goals[0].metric == "ratio.calib"


def keys_of(model: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        found[name] = keys_of(inner) if nested and inner is not None else None
    return found


def test_params_yaml_shows_every_key_and_no_default_hides() -> None:
    def assert_same(schema: dict[str, Any], document: Any) -> None:
        assert set(schema) == set(document)
        for name, inner in schema.items():
            if inner:
                assert_same(inner, document[name])

    assert_same(keys_of(Config), YAML(typ="safe", pure=True).load(PARAMS))


def test_every_key_is_read_by_the_code() -> None:
    """A key that nothing reads is a promise that is not kept."""
    root = Path(__file__).parents[2]
    files = [file for folder in ("qatlib", "stages") for file in (root / folder).rglob("*.py")]
    read = {
        node.attr
        for file in files
        if file.name != "config.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    sections = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    assert len(sections) > 15
    assert {f"{kind.__name__}.{key}" for kind in sections for key in kind.model_fields if key not in read} == set()


def test_every_line_of_params_yaml_is_commented() -> None:
    sections = {*Config.model_fields, "default", "outputs"}
    for line in PARAMS.read_text().splitlines():
        key, _, rest = line.strip().removeprefix("- ").partition(":")
        if not line.strip() or line.strip().startswith("#") or key in sections or key in ("min", "max"):
            continue
        assert "#" in rest, line


def test_defaults_fill_what_is_left_out(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL)
    assert (config.qat.weight_decay, config.calibrate.bins, config.metric.factory) == (
        4e-5,
        2048,
        "qatlib.pipeline.metrics:Accuracy",
    )


def test_config_is_frozen(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL)
    with pytest.raises(ValidationError):
        config.qat.lr = 1.0  # type: ignore[misc]


def test_yaml_1_2_numbers(tmp_path: Path) -> None:
    assert parse(tmp_path, MINIMAL + "qat: {lr: 1e-3, warmup_steps: 010}\n").qat.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qat: {epochs: -1}", "qat.epochs: -1 must be greater than or equal to 0"),
        ("qat: {epochs: 1.5}", "qat.epochs: 1.5 must be a valid integer"),
        ("qat: {epochs: true}", "qat.epochs: True must be a valid integer"),
        ("qat: {lr: 0}", "qat.lr: 0 must be greater than 0"),
        ("qat: {lr: '1e-3'}", "qat.lr: '1e-3' must be a valid number"),
        ("qat: {lr: .nan}", "qat.lr: nan must be a finite number"),
        ("qat: {lrr: 1}", "qat.lrr: is an unknown key; did you mean 'lr'?"),
        ("qatt: {}", "qatt: is an unknown key; did you mean 'qat'?"),
        (
            "qat: {optimizer: adamm}",
            "qat.optimizer: 'adamm' must be sgd, adamw, adam, rmsprop or an entry point \"module:callable\";"
            " did you mean 'adam'?",
        ),
        ("qat: {optimizer_kwargs: {lr: 1}}", "qat: optimizer_kwargs has lr, which the training passes itself"),
        ("qat: {distill: {wieght: 1}}", "qat.distill.wieght: is an unknown key; did you mean 'weight'?"),
        ("qat: {distill: {weight: 1.5}}", "qat.distill.weight: 1.5 must be less than or equal to 1"),
        ("qat: {distill: {temperature: 0}}", "qat.distill.temperature: 0 must be greater than 0"),
        ("qat: {distill: {loss: mae}}", "qat.distill.loss: 'mae' must be kl, mse or an entry point"),
        ("qat: {on_nan: go}", "qat.on_nan: 'go' must be stop or rewind"),
        ("qat: {relu6: stem}", "-S \"qat.relu6=['stem']\""),
        ("qat: {amp: fp16}", "qat.amp: 'fp16' must be bf16"),
        (
            "calibrate: {method: minmax}",
            "must be min_max, percentile, mse, kl, mix or auto; did you mean 'min_max'?",
        ),
        ("calibrate: {adaround: {beta: [2.0, 20.0]}}", "calibrate.adaround: beta is [2.0, 20.0]; give where it starts"),
        ("calibrate: {adaround: {step: 5}}", "calibrate.adaround.step: is an unknown key; did you mean 'steps'?"),
        ("calibrate: {percentile: 0}", "calibrate.percentile: 0 must be greater than 0"),
        ("calibrate: {percentile: 100.1}", "calibrate.percentile: 100.1 must be less than or equal to 100"),
        ("calibrate: {bins: 2047}", "calibrate.bins: 2047 must be a multiple of 2"),
        ("calibrate: {compare: mse}", "-S \"calibrate.compare=['mse']\""),
        ("calibrate: {compare: [mse, lk]}", "calibrate.compare[1].method: 'lk' must be min_max, percentile, mse, kl"),
        ("calibrate: {compare: [3]}", "calibrate.compare[0]: 3 must be a mapping"),
        (
            "calibrate: {compare: [{method: mse, percentile: 99.0}]}",
            "calibrate.compare[0]: method mse takes no percentile",
        ),
        (
            "calibrate: {compare: [{method: percentile, percentile: 0}]}",
            "calibrate.compare[0].percentile: 0 must be greater than 0",
        ),
        ("qat: {averaging_constant: 2}", "qat.averaging_constant: 2 must be less than or equal to 1"),
        ("qat: {milestones: [0.8, 0.5]}", "qat: milestones are [0.8, 0.5]; they must increase"),
        ("qat: {schedule: step, milestones: []}", "schedule is step but milestones is empty"),
        ("qat: {hybrid: features.0}", "-S \"qat.hybrid=['features.0']\""),
        ("qconfig: {overrides: head}", "-S \"qconfig.overrides=[{match: 'head', activation: int16}]\""),
        ("goals: ratio.qat", '-S "goals=[{metric: ratio.qat, min: 0.99}]"'),
        ("goals: [{metric: ratio.qat}]", "goals[0]: has neither min nor max"),
        ("goals: [{metric: ratio.qat, min: 2, max: 1}]", "goals[0]: min 2 is above max 1"),
        ("goals: [{metric: ratio, min: 1}]", "goals[0].metric: 'ratio' must be a dotted metric key"),
        ("qconfig: {overrides: [{match: a}]}", "qconfig.overrides[0]: changes nothing"),
        ("qconfig: {overrides: [{activation: int8}]}", "qconfig.overrides[0].match: is missing"),
        ("qconfig: {overrides: [{match: a, scale: 0}]}", "qconfig.overrides[0].scale: 0 must be greater than 0"),
        ("qconfig: {default: {weight: int4}}", "qconfig.default.weight: 'int4' must be int8 or int16"),
        ("convert:", "convert: None must be a mapping"),
        ("qat: {loss: cross_entropy}", "qat.loss: 'cross_entropy' must be an entry point"),
        ("qat: {loss_kwargs: {since: 2024-01-01}}", "qat.loss_kwargs.since: 2024-01-01 is read as a date"),
        ("runtime: {device: gpu}", "runtime.device: 'gpu' must be cpu, cuda or cuda:N"),
        ("runtime: {threads: 0}", "runtime.threads: 0 must be greater than or equal to 1"),
    ],
)
def test_wrong_value_names_key_seen_and_legal(tmp_path: Path, text: str, expected: str) -> None:
    message = failure(tmp_path, MINIMAL + text + "\n")
    assert expected in message
    assert "1 problem\n" in message


def test_date_in_a_typed_field_is_reported_once(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL + "qat: {hybrid: [2024-01-01]}\n")
    assert "qat.hybrid[0]: 2024-01-01 is read as a date" in message
    assert "1 problem\n" in message


def test_all_errors_come_together(tmp_path: Path) -> None:
    message = failure(tmp_path, "qat: {epochs: -1, lrr: 1}\ngoals: x\nruntime: {device: gpu}\n")
    for part in (
        "6 problems",
        "model: is missing",
        "data: is missing",
        "qat.epochs",
        "qat.lrr",
        "goals",
        "runtime.dev",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qat: {lr: 1}\nqat: {lr: 2}\n", "params.yaml:2:1: is not valid YAML: found duplicate key"),
        ("qat: [1\n", "is not valid YAML"),
        ("qat: !run x\n", "is not valid YAML"),
        ("", "is empty"),
        ("- a\n", "holds a list"),
    ],
)
def test_what_is_no_yaml_mapping(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in failure(tmp_path, text, "QAT100")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"QAT100 .*cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"QAT100"):
        load_config(tmp_path / "binary.yaml")


def test_suggested_override_form_is_what_dvc_accepts(tmp_path: Path) -> None:
    from dvc.utils.hydra import apply_overrides

    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.read_text())
    for key, value in (("qat.hybrid", "features.0"), ("qconfig.overrides", "head.*"), ("goals", "ratio.qat")):
        message = _message_for(tmp_path, key, value)
        argument = message.split('-S "', 1)[1].split('"', 1)[0]
        apply_overrides(path, [argument])
    config = load_config(path)
    assert config.qat.hybrid == ("features.0",)
    assert config.qconfig.overrides[0].match == "head.*"
    assert config.goals[0].metric == "ratio.qat"


def _message_for(tmp_path: Path, key: str, value: str) -> str:
    section, _, name = key.partition(".")
    folder = tmp_path / key
    folder.mkdir()
    return failure(folder, MINIMAL + (f"{section}: {{{name}: {value}}}\n" if name else f"{section}: {value}\n"))


def test_values_over_those_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL + "qat: {epochs: 3, lr: 0.1}\n")
    config = load_config(path, {"qat": {"lr": 0.5}, "runtime": {"seed": 7}})
    assert (config.qat.epochs, config.qat.lr, config.runtime.seed) == (3, 0.5, 7)
    with pytest.raises(ConfigError, match=r"qat\.lr: -1"):
        load_config(path, {"qat": {"lr": -1.0}})
    path.write_text(MINIMAL + "qat: 5\n")
    with pytest.raises(ConfigError, match=r"qat: 5 must be a mapping"):
        load_config(path, {"qat": {"lr": 0.5}})


@pytest.mark.parametrize(
    ("record", "key", "seen"),
    [
        ("{code: QAT012, reason: ''}", "analyze.ignore[0].reason", "'' must be a reason for people, not empty"),
        ("{code: QAT012, reason: '  '}", "analyze.ignore[0].reason", "must be a reason"),
        ("{code: QAT012}", "analyze.ignore[0].reason", "is missing"),
        ("{code: QAT147, reason: r}", "analyze.ignore[0].code", "must be the code of a finding"),
        ("{code: QAT012, match: 're:(', reason: r}", "analyze.ignore[0]", "is not a regular expression"),
        ("{code: QAT012, module: a, reason: r}", "analyze.ignore[0].module", "legal are code, match, reason"),
    ],
)
def test_a_finding_is_ignored_only_with_code_and_reason(tmp_path: Path, record: str, key: str, seen: str) -> None:
    message = failure(tmp_path, MINIMAL + f"analyze: {{ignore: [{record}]}}\n")
    assert f"{key}: " in message
    assert seen in message


def test_ignored_findings_may_be_of_the_whole_model(tmp_path: Path) -> None:
    (record,) = parse(tmp_path, MINIMAL + "analyze: {ignore: [{code: QAT012, reason: old weights}]}\n").analyze.ignore
    assert (record.match, record.reason) == ("*", "old weights")
