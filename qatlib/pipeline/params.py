"""Sections of ``params.yaml``: types and legal ranges. What each key does is written beside it there.

Sections of the stages that train are in :mod:`qatlib.pipeline.training_params`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qatlib.errors import QatError
from qatlib.tables import TableSpec

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A YAML list; a string is refused."""

ENTRY = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
OPTIMIZER = rf"^(sgd|adamw|adam|rmsprop)$|{ENTRY}"
DISTILL = rf"^(kl|mse)$|{ENTRY}"
METRIC = r"^\w+(\.\w+)+$"
DEVICE = r"^(cpu|cuda(:\d+)?)$"
FINDING = r"^QAT0\d\d$"
SAYS_SOMETHING = r"\S"
FOLDER = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
IN_WORDS = {
    ENTRY: 'an entry point "module:callable"',
    OPTIMIZER: 'sgd, adamw, adam, rmsprop or an entry point "module:callable"',
    DISTILL: 'kl, mse or an entry point "module:callable"',
    METRIC: "a dotted metric key such as ratio.integer",
    DEVICE: "cpu, cuda or cuda:N",
    FINDING: "the code of a finding, such as QAT012",
    FOLDER: "letters, digits, _ and -, at most 64",
    SAYS_SOMETHING: "a reason for people, not empty",
}
"""What the patterns ask for, for messages."""

Entry = Annotated[str, Field(pattern=ENTRY)]
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Activation = Literal["int8", "int16"]
Observer = Literal["min_max", "percentile", "mse", "kl", "mix", "auto"]
Percentile = Annotated[float, Field(gt=0, le=100)]


class Params(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _all_or_names(value: Any) -> Any:
    """``true`` and ``"*"`` stand for all, null and ``false`` for none."""
    return ["*"] if value is True or value == "*" else [] if value is None or value is False else value


class ModelParams(Params):
    factory: Entry
    kwargs: dict[str, Any] = {}
    checkpoint: Name
    code: Name
    leaf: Many[Name] = ()
    wrap: Many[Entry] = ()
    unshare: Annotated[Many[Name], BeforeValidator(_all_or_names)] = ()
    unshare_tied: bool = True


class DataParams(Params):
    factory: Entry
    kwargs: dict[str, Any] = {}
    code: Name
    batch_size: Count = 256


class MetricParams(Params):
    factory: Entry = "qatlib.pipeline.metrics:Accuracy"
    kwargs: dict[str, Any] = {}


class DefaultFormat(Params):
    activation: Activation = "int8"
    weight: Activation = "int8"


class Override(Params):
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


class InputFormat(Params):
    """Format of the model inputs that ``match`` names; a scale of None is calibrated."""

    match: Name
    activation: Activation | None = None
    scale: Positive | None = None


class OutputFormat(Params):
    high_precision: bool = True


class QConfigParams(Params):
    default: DefaultFormat = DefaultFormat()
    overrides: Many[Override] = ()
    inputs: Many[InputFormat] = ()
    outputs: OutputFormat = OutputFormat()


class TableParams(Params):
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


class GoldenParams(Params):
    items: Annotated[int, Field(ge=0)] = 0


class ConvertParams(Params):
    preserve: Many[Name] = ()
    golden: GoldenParams = GoldenParams()
    tables: Many[TableParams] = ()


class OtherTarget(Params):
    """A target besides ``compile.target``, under a name that files and metrics have."""

    name: Annotated[str, Field(pattern=FOLDER)]
    file: Name


class CompileParams(Params):
    """The target, and others for what-if; the rest, but for ``check_images``, are the options of
    :class:`qatlib.compiler.CompileOptions`.
    """

    target: Name = "qatlib/targets/bayes-like.yaml"
    targets: Many[OtherTarget] = ()
    opt: Literal["O0", "O1", "O2", "O3"] = "O2"
    objective: Literal["latency", "bandwidth", "balance"] = "latency"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    time_limit_s: Annotated[float, Field(gt=0, le=86400)] = 60.0
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    input_source: Literal["auto", "ddr", "sram"] = "auto"
    check_images: Count = 64

    @property
    def options(self) -> dict[str, Any]:
        """What ``compile_model`` takes as its options."""
        return self.model_dump(exclude={"target", "targets", "check_images"})

    @model_validator(mode="after")
    def _names_differ(self) -> CompileParams:
        names = [other.name.lower() for other in self.targets]  # folders, which some systems have in one case
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"targets: {', '.join(twice)} is there more than once; give each a name of its own")
        return self


class SensitivityParams(Params):
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


class Ignore(Params):
    """Findings of ``code`` in the modules that ``match`` covers, containers included, are known and left out."""

    code: Annotated[str, Field(pattern=FINDING)]
    match: Name = "*"
    reason: Annotated[str, Field(pattern=SAYS_SOMETHING)]

    @model_validator(mode="after")
    def _match_is_legal(self) -> Ignore:
        try:
            re.compile(self.match[3:] if self.match.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"match {self.match!r} is not a regular expression: {error}") from None
        return self


class AnalyzeParams(Params):
    batches: Count = 4
    batch_size: Count = 64
    sensitivity: SensitivityParams | None = None
    ignore: Many[Ignore] = ()


class FloatCheckParams(Params):
    floor: float | None = None
    max_train_val_gap: Annotated[float, Field(ge=0)] = 0.08
    gap_images: Count = 5000


class Goal(Params):
    """Bounds of one metric of ``reports/summary.json``, both inclusive."""

    metric: Annotated[str, Field(pattern=METRIC)]
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_bounds(self) -> Goal:
        if self.min is None and self.max is None:
            raise ValueError("has neither min nor max; give at least one")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}, which nothing can meet")
        return self


class RuntimeParams(Params):
    device: Annotated[str, Field(pattern=DEVICE)] = "cpu"
    threads: Count = 1
    processes: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
