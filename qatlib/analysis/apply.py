"""The edit of a finding, written into ``params.yaml`` with its comments and layout kept."""

from __future__ import annotations

import difflib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import CommentMark, YAMLError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.tokens import CommentToken

from qatlib.analysis.findings import FINDINGS, Finding, Found, of_code
from qatlib.atomic import write_text
from qatlib.errors import ConfigError
from qatlib.pipeline.config import Config, check_config, load_config, yaml_values

PARAMS = "params.yaml"
STYLES = ((2, 4, 2), (2, 2, 0), (4, 6, 4), (4, 4, 2))
"""Indentation of mappings, of the items of lists, and of their dashes."""


@dataclass(frozen=True)
class Change:
    """The text of ``params.yaml`` before and after an edit; the same where the edit is there already."""

    path: Path
    before: str
    after: str

    @property
    def diff(self) -> str:
        """Unified, empty where nothing changes."""
        before, after = (text.splitlines(keepends=True) for text in (self.before, self.after))
        return "".join(difflib.unified_diff(before, after, str(self.path), str(self.path)))

    def write(self) -> None:
        """Replace the file, or what it links to, whole."""
        write_text(os.path.realpath(self.path), self.after)


def finding_of(found: Found, code: str, module: str | None = None) -> Finding:
    """The finding of ``code``, in ``module`` if one is given.

    Raises ConfigError QAT229 if there is none, or several with other edits.
    """
    findings = of_code(found, code).findings
    modules = ", ".join(dict.fromkeys(finding.module or "''" for finding in findings))
    chosen = [finding for finding in findings if module in (None, finding.module)]
    if not findings:
        codes = ", ".join(dict.fromkeys(finding.code for finding in found.findings)) or "none"
        ignored = ": it is in analyze.ignore" if of_code(found, code).ignored else ""
        raise ConfigError("QAT229", code, f"is no finding of {FINDINGS}{ignored}", f"Its findings are {codes}")
    if not chosen:
        raise ConfigError("QAT229", code, f"is not found in {module!r}", f"Give --module as one of {modules}")
    if len({finding.edit for finding in chosen}) > 1:
        raise ConfigError("QAT229", code, f"has {len(chosen)} findings", f"Give --module as one of {modules}")
    return chosen[0]


def first_change(found: Found, path: str | Path = PARAMS) -> tuple[Finding, Change]:
    """The first finding whose edit ``params.yaml`` can take and does not hold yet, and what it makes of the file.

    Raises ConfigError QAT229 if there is none, QAT100 or QAT101 if the file does not load.
    """
    load_config(path)
    for finding in found.findings:
        try:
            change = plan(finding, path)
        except ConfigError:
            continue  # a cure that is no parameter, or that this file cannot take
        if change.diff:
            return finding, change
    seen = f"has no finding, of {len(found.findings)}, with an edit that {path} lacks"
    raise ConfigError("QAT229", FINDINGS, seen, "See reports/profiler.html for what is no parameter")


def plan(finding: Finding, path: str | Path = PARAMS) -> Change:
    """What the edit of ``finding`` makes of the file ``path``, which stays as it is.

    Raises as :func:`edited`, and ConfigError QAT100 or QAT101 if the file does not load.
    """
    path = Path(path)
    load_config(path)
    before = path.read_text(encoding="utf-8")
    return Change(path, before, edited(finding, before, str(path)))


def edited(finding: Finding, before: str, where: str = PARAMS) -> str:
    """The text ``before`` of a legal params.yaml with the edit of ``finding``; the same if it holds that already.

    Of a list of records, one of the same ``match`` is updated; else the new one comes first, where it wins. Names are
    added to a list of names that lacks them; an empty list empties. Raises ConfigError QAT230 if the edit is not one of
    ``params.yaml``, QAT231 if the result would not load.
    """
    edit = edit_of(finding)
    yaml = _yaml(before)
    document = yaml.load(before)
    for section, values in edit.items():
        _merge(document.setdefault(section, CommentedMap()), values)
    after = _text(yaml, document)
    if after == _text(yaml, yaml.load(before)):
        return before
    try:
        check_config(yaml_values(after), where)
    except ConfigError as error:
        seen = f"would not be legal with the edit of {finding.code}: {error.seen}"
        raise ConfigError("QAT231", where, seen, "Make the change by hand") from None
    return after


def with_records(
    before: str,
    added: Mapping[str, Sequence[Mapping[str, Any]]],
    removed: Mapping[str, Sequence[int]],
    where: str = PARAMS,
) -> str:
    """The text ``before`` with records before, and without some of, those of lists in ``qconfig``, by their keys.

    Raises ConfigError QAT231 if the result would not load.
    """
    yaml = _yaml(before)
    document = yaml.load(before)
    section = document.setdefault("qconfig", CommentedMap())
    for key in dict.fromkeys((*removed, *added)):
        for index in sorted(removed.get(key, ()), reverse=True):
            del section[key][index]
        if not section.get(key):
            section[key] = CommentedSeq() if key not in section or removed.get(key) else section[key]
        if records := added.get(key):
            _merge(section, CommentedMap({key: CommentedSeq(map(CommentedMap, records))}))
        elif not section[key]:
            section[key].fa.set_flow_style()
    after = _text(yaml, document)
    try:
        check_config(yaml_values(after), where)
    except ConfigError as error:
        fix = "Make the change by hand"
        raise ConfigError("QAT231", where, f"would not be legal with that change: {error.seen}", fix) from None
    return after


def edit_of(finding: Finding) -> CommentedMap:
    """The edit as sections of ``params.yaml``; raises ConfigError QAT230 if it is a sentence."""
    try:
        edit = _indented(STYLES[0]).load(finding.edit)
    except YAMLError:
        edit = None
    if not isinstance(edit, CommentedMap) or not all(
        section in Config.model_fields and isinstance(values, CommentedMap) for section, values in edit.items()
    ):
        seen = f"is not cured in params.yaml but so: {finding.edit}" if finding.edit else "has no edit"
        raise ConfigError("QAT230", " ".join(filter(None, (finding.code, finding.module))), seen, "Do that by hand")
    return edit


def _merge(old: CommentedMap, new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        current = old.get(key)
        if isinstance(value, CommentedMap) and isinstance(current, CommentedMap):
            _merge(current, value)
        elif isinstance(value, CommentedSeq) and value and isinstance(current, CommentedSeq) and _by_name(value):
            empty = not current
            _put_first(current, value)
            if empty and isinstance(current[0], CommentedMap):
                _keep_the_gap(old, key, current)
            elif empty:
                current.fa.set_flow_style()
        elif key not in old:
            old.insert(max(len(old) - 1, 0), key, value)  # behind the last, it would stand behind the gap below it
        elif not _same(current, value):
            old[key] = value


def _by_name(items: Sequence[Any]) -> bool:
    """Whether these are names, or records with a ``match``."""
    return all(isinstance(item, str) or (isinstance(item, CommentedMap) and "match" in item) for item in items)


def _put_first(current: CommentedSeq, items: Sequence[Any]) -> None:
    for item in reversed(items):
        if isinstance(item, str):
            if item not in current:
                current.insert(0, item)
            continue
        known = next(
            (one for one in current if isinstance(one, CommentedMap) and one.get("match") == item["match"]), None
        )
        if known is None:
            current.insert(0, item)
        else:
            _merge(known, item)


def _same(old: Any, new: Any) -> bool:
    """Equal, and not merely 1 for true."""
    return old == new and isinstance(old, bool) == isinstance(new, bool)


def _keep_the_gap(old: CommentedMap, key: str, records: CommentedSeq) -> None:
    """What stood below an empty list from a blank line on goes below its records, not between it and them."""
    comments = old.ca.items.get(key)
    if not comments or comments[2] is None:
        return
    head, gap, rest = comments[2].value.partition("\n\n")
    if gap:
        comments[2].value = f"{head}\n" if head else ""
        last = records[-1]
        last.ca.items[list(last)[-1]] = [None, None, CommentToken(f"{gap}{rest}", CommentMark(0), None), None]


class _Representer(RoundTripRepresenter):
    """Writes null as it stands in params.yaml."""


_Representer.add_representer(type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null"))


def _yaml(text: str) -> YAML:
    """A parser that writes ``text`` back with the fewest changes."""

    def changed(yaml: YAML) -> int:
        return sum(a != b for a, b in zip_longest(text.splitlines(), _text(yaml, yaml.load(text)).splitlines()))

    tried = {}
    for style in STYLES:
        tried[style] = changed(_indented(style))
        if not tried[style]:
            break
    return _indented(min(tried, key=lambda style: tried[style]))


def _indented(style: tuple[int, int, int]) -> YAML:
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.preserve_quotes = True
    yaml.width = 2**20
    yaml.indent(*style)
    return yaml


def _text(yaml: YAML, document: Any) -> str:
    text = io.StringIO()
    yaml.dump(document, text)
    return text.getvalue()
