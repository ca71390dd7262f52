"""``params.yaml`` read and checked: strict, frozen, and every error reported together.

Its sections are in :mod:`qatlib.pipeline.params` and :mod:`qatlib.pipeline.training_params`; what other code needs of
them can be imported here.
"""

from __future__ import annotations

import datetime
import difflib
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from qatlib.errors import ConfigError
from qatlib.pipeline.params import (
    DISTILL,
    IN_WORDS,
    OPTIMIZER,
    AnalyzeParams,
    CompileParams,
    ConvertParams,
    DataParams,
    Entry,
    FloatCheckParams,
    Goal,
    Ignore,
    InputFormat,
    Many,
    MetricParams,
    ModelParams,
    Observer,
    Override,
    Params,
    QConfigParams,
    RuntimeParams,
    SensitivityParams,
    TableParams,
)
from qatlib.pipeline.training_params import (
    AdaRoundParams,
    CalibrateParams,
    DistillParams,
    QatParams,
)

__all__ = [
    "AdaRoundParams",
    "CalibrateParams",
    "Config",
    "DistillParams",
    "Entry",
    "Goal",
    "Ignore",
    "InputFormat",
    "Many",
    "Observer",
    "Override",
    "QatParams",
    "RuntimeParams",
    "SensitivityParams",
    "TableParams",
    "check_config",
    "load_config",
    "yaml_values",
]


# Far more than any configuration has; without limits a small file can take all memory.
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 20, 100_000, 64


class Config(Params):
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
        with path.open("rb") as file:
            blob = file.read(_MAX_BYTES + 1)
        if len(blob) > _MAX_BYTES:
            raise ConfigError("QAT100", str(path), f"is larger than {_MAX_BYTES} bytes", "Name a params.yaml")
        text = blob.decode()
        if _too_deep(text):
            raise ConfigError("QAT100", str(path), f"is nested deeper than {_MAX_DEPTH} levels", "Write fewer levels")
        document = yaml_values(text)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(
            "QAT100", str(path), f"cannot be read ({error.strerror})", "Run in the project root"
        ) from None
    except (YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError("QAT100", where, f"is not valid YAML: {what.strip()}", "Correct that line") from None
    if not _bounded(document, {}, 0):
        seen = f"refers to itself, or its aliases stand for more than {_MAX_VALUES} values or {_MAX_DEPTH} levels"
        raise ConfigError("QAT100", str(path), seen, "Spell the values out")
    if not isinstance(document, dict):
        seen = "is empty" if document is None else f"holds a {type(document).__name__}, not sections with keys"
        raise ConfigError("QAT100", str(path), seen, "Start from the params.yaml of the repository")
    return document


def _too_deep(text: str) -> bool:
    """Whether ``text`` nests too deep, found before anything is built from it."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MAX_DEPTH:
            return True
    return False


def _bounded(value: Any, sizes: dict[int, int], depth: int) -> bool:
    """Whether ``value`` with all that its aliases stand for is small; ``sizes`` by identity, 0 while being counted."""
    if not isinstance(value, dict | list):
        return True
    if id(value) not in sizes:
        sizes[id(value)] = 0
        children = list(value.values()) if isinstance(value, dict) else value
        if depth >= _MAX_DEPTH or not all(_bounded(child, sizes, depth + 1) for child in children):
            return False
        sizes[id(value)] = 1 + sum(sizes.get(id(child), 1) for child in children)
    return 0 < sizes[id(value)] <= _MAX_VALUES


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
        words = IN_WORDS[context["pattern"]]
        options = words.split(" or ")[0].split(", ") if context["pattern"] in (OPTIMIZER, DISTILL) else []
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
