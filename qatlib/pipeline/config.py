"""Schema of ``params.yaml``: strict, frozen, and every error reported together.

What each key does is written beside it in ``params.yaml``; here are the types and legal ranges.
"""

from __future__ import annotations

import datetime
import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qatlib.errors import ConfigError, QatError
from qatlib.tables import TableSpec

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A YAML list; a string is refused."""

_ENTRY = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
_OPTIMIZER = rf"^(sgd|adamw|adam|rmsprop)$|{_ENTRY}"
_DISTILL = rf"^(kl|mse)$|{_ENTRY}"
_METRIC = r"^\w+(\.\w+)+$"
_DEVICE = r"^(cpu|cuda(:\d+)?)$"
_FINDING = r"^QAT0\d\d$"
_SAYS_SOMETHING = r"\S"
_IN_WORDS = {
    _ENTRY: 'an entry point "module:callable"',
    _OPTIMIZER: 'sgd, adamw, adam, rmsprop or an entry point "module:callable"',
    _DISTILL: 'kl, mse or an entry point "module:callable"',
    _METRIC: "a dotted metric key such as ratio.integer",
    _DEVICE: "cpu, cuda or cuda:N",
    _FINDING: "the code of a finding, such as QAT012",
    _SAYS_SOMETHING: "a reason for people, not empty",
}

Entry = Annotated[str, Field(pattern=_ENTRY)]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Activation = Literal["int8", "int16"]
Observer = Literal["min_max", "percentile", "mse", "kl", "mix", "auto"]
Percentile = Annotated[float, Field(gt=0, le=100)]


class _Params(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _all_or_names(value: Any) -> Any:
    """``true`` and ``"*"`` stand for all, null and ``false`` for none."""
    return ["*"] if value is True or value == "*" else [] if value is None or value is False else value


class ModelParams(_Params):
    factory: Entry
    kwargs: dict[str, Any] = {}
    checkpoint: Name
    code: Name
    leaf: Many[Name] = ()
    wrap: Many[Entry] = ()
    unshare: Annotated[Many[Name], BeforeValidator(_all_or_names)] = ()
    unshare_tied: bool = True


class DataParams(_Params):
    factory: Entry
    kwargs: dict[str, Any] = {}
    code: Name
    batch_size: Count = 256


class MetricParams(_Params):
    factory: Entry = "qatlib.pipeline.metrics:Accuracy"
    kwargs: dict[str, Any] = {}


class DefaultFormat(_Params):
    activation: Activation = "int8"
    weight: Activation = "int8"


class Override(_Params):
    """Formats of the modules that ``match`` names; None leaves the default."""

    match: Name
    activation: Activation | None = None
    weight: Activation | None = None
    scale: Positive | None = None
    high_precision: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        if all(getattr(self, key) is None for key in ("activation", "weight", "scale", "high_precision")):
            raise ValueError("changes nothing; set activation, weight, scale or high_precision, or remove the record")
        return self


class InputFormat(_Params):
    """Format of the model inputs that ``match`` names; a scale of None is calibrated."""

    match: Name
    activation: Activation | None = None
    scale: Positive | None = None


class OutputFormat(_Params):
    high_precision: bool = True


class QConfigParams(_Params):
    default: DefaultFormat = DefaultFormat()
    overrides: Many[Override] = ()
    inputs: Many[InputFormat] = ()
    outputs: OutputFormat = OutputFormat()


class ComparedMethod(_Params):
    """A line of ``calibrate.compare``; a name alone is its method. A percentile of None is ``calibrate.percentile``."""

    method: Observer
    percentile: Percentile | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _percentile_has_a_use(self) -> ComparedMethod:
        if self.percentile is not None and self.method != "percentile":
            raise ValueError(f"method {self.method} takes no percentile; remove it, or set method: percentile")
        return self


class AdaRoundParams(_Params):
    """Learned rounding of weights; see :func:`qatlib.fake.ptq.rounding.adaround`."""

    steps: Count = 1000
    lr: Positive = 1e-2
    images: Count = 256
    batch_size: Count = 32
    regularization: Positive = 1.0
    beta: Many[Positive] = (20.0, 2.0)
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _beta_falls(self) -> AdaRoundParams:
        if len(self.beta) != 2 or self.beta[0] < self.beta[1]:
            raise ValueError(f"beta is {list(self.beta)}; give where it starts and, not above that, where it ends")
        return self


class CalibrateParams(_Params):
    method: Observer = "percentile"
    percentile: Percentile = 99.99
    bins: Annotated[int, Field(ge=128, le=65536, multiple_of=2)] = 2048
    weight_method: Literal["min_max", "mse"] = "min_max"
    batches: Count = 32
    batch_size: Count = 64
    compare: Many[ComparedMethod] = ()
    compare_images: Count | None = None
    equalize: bool = False
    adaround: AdaRoundParams | None = None
    bn_re_estimation: bool = False
    bias_correction: bool = False


class DistillParams(_Params):
    """Learning from the float model; see :class:`qatlib.fake.distill.Distillation`."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Positive = 4.0
    loss: Annotated[str, Field(pattern=_DISTILL)] = "kl"


class QatParams(_Params):
    epochs: Annotated[int, Field(ge=0)] = 2
    lr: Positive = 1e-3
    optimizer: Annotated[str, Field(pattern=_OPTIMIZER)] = "sgd"
    optimizer_kwargs: dict[str, Any] = {}
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 4e-5
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    milestones: Many[Annotated[float, Field(gt=0, lt=1)]] = (0.5, 0.8)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    clip_grad_norm: Positive | None = None
    fake_quant: Literal["moving_average", "lsq", "pact", "tqt"] = "moving_average"
    scale_lr_factor: Positive = 1.0
    averaging_constant: Annotated[float, Field(ge=0, le=1)] = 0.01
    batch_size: Count = 128
    data_kwargs: dict[str, Any] = {}
    loss: Entry = "torch.nn.functional:cross_entropy"
    loss_kwargs: dict[str, Any] = {}
    distill: DistillParams | None = None
    relu6: Many[Name] = ()
    batch_norm: Literal["fold", "keep"] = "fold"
    freeze_batch_norm: Count | None = None
    forward: Literal["fake_quant", "exact"] = "fake_quant"
    amp: Literal["bf16"] | None = None
    channels_last: bool = False
    on_nan: Literal["stop", "rewind"] = "stop"
    max_rewinds: Count = 3
    max_loss_ratio: Annotated[float, Field(gt=1)] = 5.0
    integer_eval_images: Count | None = 2000
    keep_epochs: Count = 2
    hybrid: Many[Name] = ()

    @model_validator(mode="after")
    def _optimizer_is_given_its_own_settings(self) -> QatParams:
        taken = sorted({"lr", "params", "weight_decay"} & set(self.optimizer_kwargs))
        if taken:
            fix = "; ".join(f"set qat.{name}" if name != "params" else "leave out params" for name in taken)
            raise ValueError(f"optimizer_kwargs has {', '.join(taken)}, which the training passes itself: {fix}")
        return self

    @model_validator(mode="after")
    def _batch_norm_is_one_that_forward_knows(self) -> QatParams:
        if self.freeze_batch_norm is not None and self.batch_norm == "fold":
            raise ValueError("freeze_batch_norm is set, but batch_norm is fold, which never has statistics of a batch")
        if self.forward == "exact" and self.batch_norm == "keep" and self.freeze_batch_norm != 1:
            fix = "set freeze_batch_norm: 1, or batch_norm: fold"
            raise ValueError(f"forward is exact, but integers have no statistics of a batch: {fix}")
        return self

    @model_validator(mode="after")
    def _milestones_increase(self) -> QatParams:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones are {list(self.milestones)}; they must increase")
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule is step but milestones is empty; give fractions such as [0.5, 0.8]")
        return self


class TableParams(_Params):
    """Settings of the tables that ``match`` names; see :class:`qatlib.tables.TableSpec`."""

    match: Name
    division: Any = "auto"
    segments: int = TableSpec.segments
    entries: int = TableSpec.entries
    range: Many[float] | None = None
    symmetry: Literal["none", "odd", "even", "auto"] = "auto"

    @model_validator(mode="after")
    def _is_legal(self) -> TableParams:
        try:
            _ = self.spec
        except QatError as error:
            raise ValueError(f"{error.seen}: {error.fix}") from None
        return self

    @property
    def spec(self) -> TableSpec:
        """Raises ProgramError QAT211."""
        points = self.division
        if isinstance(points, list) and all(isinstance(p, int | float) and not isinstance(p, bool) for p in points):
            points = tuple(float(point) for point in points)
        span: Any = self.range
        return TableSpec(points, self.segments, self.entries, span, self.symmetry)


class GoldenParams(_Params):
    items: Annotated[int, Field(ge=0)] = 0


class ConvertParams(_Params):
    preserve: Many[Name] = ()
    golden: GoldenParams = GoldenParams()
    tables: Many[TableParams] = ()


class CompileParams(_Params):
    target: Name = "qatlib/targets/bayes-like.yaml"
    check_images: Count = 64


class SensitivityParams(_Params):
    """What each op costs; see :func:`qatlib.analysis.study.study_of`."""

    images: Count = 64
    batch_size: Count = 32
    kinds: Many[Literal["on", "off", "int16"]] = ("on", "off", "int16")
    parts: bool = True
    groups: Many[Name] = ()
    top: Count | None = None
    metric: bool = False
    steps: bool = True
    conversion: bool = True
    bad_cases: Annotated[int, Field(ge=0)] = 5


class Ignore(_Params):
    """Findings of ``code`` in the modules that ``match`` covers, containers included, are known and left out."""

    code: Annotated[str, Field(pattern=_FINDING)]
    match: Name = "*"
    reason: Annotated[str, Field(pattern=_SAYS_SOMETHING)]

    @model_validator(mode="after")
    def _match_is_legal(self) -> Ignore:
        try:
            re.compile(self.match[3:] if self.match.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"match {self.match!r} is not a regular expression: {error}") from None
        return self


class AnalyzeParams(_Params):
    batches: Count = 4
    batch_size: Count = 64
    sensitivity: SensitivityParams | None = None
    ignore: Many[Ignore] = ()


class FloatCheckParams(_Params):
    floor: float | None = None
    max_train_val_gap: Annotated[float, Field(ge=0)] = 0.08
    gap_images: Count = 5000


class Goal(_Params):
    """Bounds of one metric of ``reports/summary.json``, both inclusive."""

    metric: Annotated[str, Field(pattern=_METRIC)]
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_bounds(self) -> Goal:
        if self.min is None and self.max is None:
            raise ValueError("has neither min nor max; give at least one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}, which nothing can meet")
        return self


class RuntimeParams(_Params):
    device: Annotated[str, Field(pattern=_DEVICE)] = "cpu"
    threads: Count = 1
    processes: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Config(_Params):
    """All of ``params.yaml``."""

    model: ModelParams
    data: DataParams
    metric: MetricParams = MetricParams()
    qconfig: QConfigParams = QConfigParams()
    calibrate: CalibrateParams = CalibrateParams()
    qat: QatParams = QatParams()
    convert: ConvertParams = ConvertParams()
    compile: CompileParams = CompileParams()
    analyze: AnalyzeParams = AnalyzeParams()
    float_check: FloatCheckParams = FloatCheckParams()
    goals: Many[Goal] = ()
    runtime: RuntimeParams = RuntimeParams()


def load_config(
    path: str | Path = "params.yaml", over: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Config:
    """Read and check ``path``; raise ConfigError QAT100 if it is not YAML, QAT101 with all wrong values together.

    ``over`` are values by section and key that take the place of those in the file, as ``dvc exp run -S`` does.
    """
    return check_config(_read(Path(path)), str(path), over)


def check_config(
    document: dict[str, Any], where: str, over: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Config:
    """The configuration of a ``document`` read from the file ``where``; raises ConfigError QAT101."""
    for section, values in over.items():
        if isinstance(found := document.get(section, {}), dict):
            document[section] = {**found, **values}
    problems = list(_dates(document, ""))
    dated = {key for key, _ in problems}
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        problems += [(key, text) for key, text in (_explain(item) for item in error.errors()) if key not in dated]
        config = None
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {key}: {text}" for key, text in problems)
        raise ConfigError("QAT101", where, f"{count}{lines}", "\nEach key is explained beside it in params.yaml")
    return config


def yaml_values(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml_values(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "QAT100", str(path), f"cannot be read ({error.strerror})", "Run in the project root"
        ) from None
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError("QAT100", where, f"is not valid YAML: {what.strip()}", "Correct that line") from None
    if not isinstance(document, dict):
        seen = "is empty" if document is None else f"holds a {type(document).__name__}, not sections with keys"
        raise ConfigError("QAT100", str(path), seen, "Start from the params.yaml of the repository")
    return document


def _dates(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _dates(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _dates(item, f"{key}[{index}]")
    elif isinstance(value, datetime.date):
        yield key, f'{value} is read as a date, which DVC cannot carry; quote it: "{value}"'


def _dotted(loc: tuple[int | str, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _explain(item: Any) -> tuple[str, str]:
    """One pydantic error as (dotted key, what was seen and what is legal)."""
    loc, kind, context = item["loc"], item["type"], item.get("ctx", {})
    key, seen = _dotted(loc), reprlib.repr(item["input"])
    if kind == "extra_forbidden":
        legal = list(_section(loc[:-1]).model_fields)
        return key, f"is an unknown key{_meant(str(loc[-1]), legal)}; legal are {', '.join(legal)}"
    if kind == "missing":
        return key, "is missing and has no default"
    if kind == "value_error":
        return key, str(context["error"])
    if kind == "literal_error":
        options = context["expected"].replace("'", "")
        return key, f"{seen} must be {options}{_meant(str(item['input']), options.replace(' or ', ', ').split(', '))}"
    if kind in ("tuple_type", "model_type", "model_attributes_type", "dict_type"):
        expected = "a list" if kind == "tuple_type" else "a mapping of keys to values"
        return key, f"{seen} must be {expected}{_override_form(loc, item['input']) if kind == 'tuple_type' else ''}"
    if kind == "string_pattern_mismatch":
        words = _IN_WORDS[context["pattern"]]
        options = words.split(" or ")[0].split(", ") if context["pattern"] in (_OPTIMIZER, _DISTILL) else []
        return key, f"{seen} must be {words}{_meant(item['input'], options)}"
    return key, f"{seen} must be {item['msg'].removeprefix('Input should be ').removeprefix('String should ')}"


def _section(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that holds the keys at ``loc``."""
    model: type[BaseModel] = Config
    for part in loc:
        if isinstance(part, str):
            model = _inner_model(model.model_fields[part].annotation)
    return model


def _inner_model(annotation: Any) -> type[BaseModel]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(part for part in get_args(annotation) if isinstance(part, type) and issubclass(part, BaseModel))


def _meant(word: str, legal: list[str]) -> str:
    close = difflib.get_close_matches(word, legal, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _override_form(loc: tuple[int | str, ...], seen: Any) -> str:
    """The ``-S`` argument that passes what was meant as a list."""
    record = {"overrides": "{{match: '{}', activation: int16}}", "inputs": "{{match: '{}', scale: 0.0078125}}"}
    form = record.get(str(loc[-1]), "{{metric: {}, min: 0.99}}" if loc == ("goals",) else "'{}'")
    if not isinstance(seen, str):
        form = "{}"
    return f'; on the command line: -S "{_dotted(loc)}=[{form.format(seen)}]"'
