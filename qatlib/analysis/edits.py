"""The edit to params.yaml that a finding proposes: YAML for people, and the ``dvc exp run`` command that tries it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Scalar = str | int | float | bool
Value = Scalar | Sequence[Scalar]
Record = Mapping[str, Value]
"""One record of a list in params.yaml, such as ``{"match": "conv1", "activation": "int16"}``."""


@dataclass(frozen=True)
class Edit:
    """``yaml`` is the part of params.yaml to change, ``command`` the same change as an experiment."""

    yaml: str
    command: str


def set_values(values: Mapping[str, Scalar]) -> Edit:
    """Set dotted keys of one or more sections, e.g. ``{"calibrate.method": "mse", "calibrate.batches": 64}``."""
    sections: dict[str, list[str]] = {}
    for key, value in values.items():
        section, name = key.split(".", 1)
        sections.setdefault(section, []).append(f"  {name}: {_scalar(value)}")
    yaml = "\n".join("\n".join([f"{section}:", *lines]) for section, lines in sections.items())
    return Edit(yaml, " ".join(["dvc exp run --temp", *(f"-S {key}={_scalar(v)}" for key, v in values.items())]))


def override(match: str, existing: Sequence[Record] = (), **settings: Scalar) -> Edit:
    """Put a record for the module named ``match`` before the ``existing`` ones of ``qconfig.overrides``."""
    return _record("overrides", {"match": match, **settings}, existing)


def input_format(match: str, existing: Sequence[Record] = (), **settings: Scalar) -> Edit:
    """Put a record for the model input named ``match`` before the ``existing`` ones of ``qconfig.inputs``."""
    return _record("inputs", {"match": match, **settings}, existing)


def table(match: str, existing: Sequence[Record] = (), **settings: Scalar) -> Edit:
    """Put a record for the table of the op named ``match`` before the ``existing`` ones of ``convert.tables``."""
    return _record("tables", {"match": match, **settings}, existing, "convert")


def named(key: str, names: Sequence[str], existing: Sequence[str] = ()) -> Edit:
    """Add ``names`` to the list of match strings at the dotted ``key``, such as ``qat.hybrid``."""
    section, name = key.split(".", 1)
    whole = "[" + ", ".join(f"'{each}'" for each in dict.fromkeys((*existing, *names))) + "]"
    return Edit(f"{section}:\n  {name}: {whole}", f'dvc exp run --temp -S "{key}={whole}"')


def high_precision_outputs() -> Edit:
    return Edit(
        "qconfig:\n  outputs:\n    high_precision: true", "dvc exp run --temp -S qconfig.outputs.high_precision=true"
    )


def _record(name: str, record: Record, existing: Sequence[Record], section: str = "qconfig") -> Edit:
    """The YAML shows the new record, the command the whole list: lists are passed whole, and the first match wins."""
    pairs = [f"{key}: {_scalar(value)}" for key, value in record.items()]
    lines = [f"    {'  ' if i else '- '}{pair}" for i, pair in enumerate(pairs)]
    yaml = "\n".join([f"{section}:", f"  {name}:", *lines])
    return Edit(yaml, experiment({f"{section}.{name}": (record, *existing)}))


def experiment(lists: Mapping[str, Sequence[Record]]) -> str:
    """The ``dvc exp run`` command that sets whole lists of records, by dotted key."""
    changes = (f'-S "{key}=[{", ".join(map(_flow, records))}]"' for key, records in lists.items())
    return " ".join(["dvc exp run --temp", *changes])


def _flow(record: Record) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in record.items()) + "}"


def _scalar(value: Value) -> str:
    """``value`` as YAML 1.2 and as a Hydra override; strings that are not a plain word are quoted."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text or "e" not in text else text.replace("e", ".0e")
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_]\w*", value):
        return "'" + value.replace("'", "''") + "'"
    return str(value)
