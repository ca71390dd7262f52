"""The ops of the page: which there are, which one a name means, and what stands for a composite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from qatlib.analysis.findings import Finding
from qatlib.analysis.records import Capture, OpRecord


@dataclass(frozen=True)
class Ops:
    """All ops of some captures by name, in forward order; ``records`` has those of each capture by its mode."""

    records: Mapping[str, Mapping[str, OpRecord]]
    first: Mapping[str, OpRecord]
    named: Mapping[str, Sequence[str]] = field(repr=False)

    def find(self, word: str) -> Sequence[str]:
        """Names of the ops that ``word``, of a finding or a table, means: an op, all calls of a module, a composite.

        A module that is called several times shares its name with its first call, which comes first.
        """
        return self.named.get(word, ())

    def link(self, word: str) -> str:
        """Address of the first op that ``word`` means; empty if there is none."""
        found = self.find(word)
        return address(found[0]) if found else ""

    def steps(self, composite: str) -> list[str]:
        return [name for name, record in self.first.items() if composite and record.composite == composite]


def anchor(name: str) -> str:
    """The id of an op in the page."""
    return f"op={name}"


def address(name: str) -> str:
    """What a link to an op holds."""
    return "#" + quote(anchor(name), safe="=")


def ops_of(captures: Sequence[Capture]) -> Ops:
    records: dict[str, Mapping[str, OpRecord]] = {
        capture.mode: {record.name: record for record in capture.records} for capture in captures
    }
    first = dict[str, OpRecord]()
    for capture in captures:
        for record in capture.records:
            first.setdefault(record.name, record)
    exact, wider = dict[str, list[str]](), dict[str, list[str]]()
    last = {record.composite: name for name, record in first.items() if record.composite}
    for name, record in first.items():
        for word in {name, record.match, record.title}:
            exact.setdefault(word, []).append(name)
        if record.composite and last[record.composite] == name:
            wider.setdefault(record.composite, []).append(name)
        if record.module and (not record.composite or last[record.composite] == name):
            wider.setdefault(record.module, []).append(name)
    named = {word: list(dict.fromkeys(exact.get(word, []) + wider.get(word, []))) for word in exact | wider}
    return Ops(records, first, named)


def finding_anchors(findings: Iterable[Finding]) -> list[str]:
    """The ids of the findings in the page: code and module, and a number from the second of a pair on."""
    seen, made = dict[str, int](), list[str]()
    for finding in findings:
        name = "-".join([finding.code, *finding.module.split()])
        seen[name] = seen.get(name, 0) + 1
        made.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return made
