"""A choice of formats as a change of ``params.yaml``, and as an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qatlib.analysis.apply import PARAMS, Change, with_records
from qatlib.analysis.edits import experiment
from qatlib.errors import ConfigError
from qatlib.fake.op import FakeOp
from qatlib.pipeline.config import InputFormat, Override, check_config, yaml_values
from qatlib.pipeline.formats import owners_of
from qatlib.pipeline.match import Pattern
from qatlib.pipeline.project import Project
from qatlib.tune.space import HIGH, Choice, Space

Records = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Formats:
    """What one op writes and multiplies with: dtypes, ``HIGH`` for the accumulator, empty for nothing of its own."""

    activation: str
    weight: str


def change_of(space: Space, choice: Choice, path: str | Path = PARAMS) -> Change:
    """What ``choice`` makes of ``params.yaml``: records for the ops whose format changes, before those that are there.

    Records without effect from then on go. Raises ConfigError QAT259 if the file would not give these formats, QAT100
    or QAT101 if it does not load, QAT231.
    """
    path = Path(path)
    before = path.read_text(encoding="utf-8")
    added = _records(space, choice)
    if not any(added.values()):
        return Change(path, before, before)
    after = with_records(before, added, _removed(space, added), str(path))
    _check(space, choice, after, str(path))
    return Change(path, before, after)


def command_of(change: Change, stage: str = "compile_sim") -> str:
    """The ``dvc exp run`` command that tries the same, up to ``stage``."""
    before, after = (yaml_values(text).get("qconfig", {}) for text in (change.before, change.after))
    lists = {
        f"qconfig.{key}": after.get(key) or []
        for key in ("overrides", "inputs")
        if (after.get(key) or []) != (before.get(key) or [])
    }
    return f"{experiment(lists)} {stage}"


def wanted(space: Space, choice: Choice) -> dict[str, Formats]:
    """Formats of every op that the search may change, under ``choice``."""
    forms = space.forms(choice)
    free = [name for unit in space.units if unit.name in space.options for name in unit.ops]
    return {name: Formats(forms[name].activation or HIGH, forms[name].weight or "") for name in free}


def _records(space: Space, choice: Choice) -> Records:
    """New records for what differs from the formats now, by the list that they go to."""
    found: Records = {"overrides": [], "inputs": []}
    section = space.project.config.qconfig
    for name, asked in wanted(space, choice).items():
        op, unit = space.shipped.op(name), space.names[name]
        now = _formats(op)
        if op.activation_post_process is None and not _has_accumulator(op):
            asked = Formats(now.activation, asked.weight)
        if asked == now:
            continue
        key = "inputs" if unit.is_input else "overrides"
        old: Sequence[Override | InputFormat] = section.inputs if unit.is_input else section.overrides
        owner = op.node.inputs[0] if unit.is_input else name
        names = {owner: (owner,)} if unit.is_input else _names(space, name)
        settings = _settings(old, names)
        if asked.weight != now.weight:
            settings["weight"] = asked.weight
        if asked.activation == HIGH:
            settings.pop("activation", None)
            settings["high_precision"] = True
        elif asked.activation != now.activation:
            settings["activation"] = asked.activation
            settings.pop("high_precision", None)
        record = {"match": unit.name, **settings}
        if record not in found[key]:
            found[key].append(record)
    return found


def _formats(op: FakeOp) -> Formats:
    fake, weights = op.activation_post_process, op.weight_fake_quant
    return Formats(HIGH if fake is None else fake.spec.dtype, weights.spec.dtype if weights else "")


def _has_accumulator(op: FakeOp) -> bool:
    return op.qconfig is not None and op.qconfig.activation is None


def _names(space: Space, op: str) -> dict[str, tuple[str, ...]]:
    """Names by which a record means ``op``."""
    return {name: owned for name, owned in owners_of(space.shipped.graph).items() if op in owned}


def _settings(records: Sequence[Override | InputFormat], names: Mapping[str, Any]) -> dict[str, Any]:
    """What the first record for one of ``names`` sets."""
    for record in records:
        if any(Pattern(record.match).matches(name) for name in names):
            return record.model_dump(exclude_none=True, exclude={"match"})
    return {}


def _removed(space: Space, added: Records) -> dict[str, list[int]]:
    """Positions of the records that new ones leave nothing to decide."""
    section, graph = space.project.config.qconfig, space.shipped.graph
    owners: dict[str, dict[str, tuple[str, ...]]] = {
        "overrides": owners_of(graph),
        "inputs": {name: (name,) for name in graph.inputs},
    }
    lists: dict[str, Sequence[Override | InputFormat]] = {"overrides": section.overrides, "inputs": section.inputs}
    found: dict[str, list[int]] = {}
    for key, records in lists.items():
        taken = {op for record in added[key] for op in _meant(record["match"], owners[key])}
        for index, record in enumerate(records):
            meant = _meant(record.match, owners[key])
            if meant <= taken:
                found.setdefault(key, []).append(index)
            taken |= meant
    return found


def _meant(match: str, owners: Mapping[str, tuple[str, ...]]) -> set[str]:
    pattern = Pattern(match)
    return {op for name, owned in owners.items() if pattern.matches(name) for op in owned}


def _check(space: Space, choice: Choice, after: str, where: str) -> None:
    """Prepare the network from the text ``after`` and compare its formats with those chosen."""
    config = check_config(yaml_values(after), where)
    model = Project(config).fake_quant_model()
    for name, asked in wanted(space, choice).items():
        made, op = _formats(model.op(name)), model.op(name)
        if op.activation_post_process is None and not _has_accumulator(op):
            made = Formats(asked.activation, made.weight)
        if made != asked:
            seen = f"gives {name} {made.activation} {made.weight} instead of {asked.activation} {asked.weight}"
            raise ConfigError("QAT259", where, f"with the records of the search {seen}", "Make the change by hand")
