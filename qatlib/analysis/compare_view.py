"""A comparison of two runs for people: Markdown for a pull request, tables for the terminal, from the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.analysis.findings import PREDICTABLE
from qatlib.analysis.scored import STAGE_TITLES

SHOWN = 10
"""Ops that a table has; JSON has all."""
NONE = "not predicted"
_MINUS = "−"


@dataclass(frozen=True)
class Part:
    """One table with its title; ``note`` stands below it, or in its place. The columns ``left`` hold words."""

    title: str
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    note: str = ""
    left: int = 1


def parts(document: Mapping[str, Any]) -> list[Part]:
    """What :func:`qatlib.analysis.compare.compare` found, in the order in which one asks."""
    return [
        _metrics(document),
        _trials(document),
        _params(document),
        _findings(document),
        *_ops(document),
    ]


def markdown(document: Mapping[str, Any]) -> str:
    lines = [f"## Quantization: {_title(document)}", ""]
    if warning := _warning(document):
        lines += [f"> {warning}", ""]
    for part in parts(document):
        lines += [f"### {part.title}", ""]
        if part.rows:
            lines.append(_row(part.columns))
            lines.append("|" + "|".join("---" if i < part.left else "---:" for i in range(len(part.columns))) + "|")
            lines += [_row(row) for row in part.rows] + [""]
        lines += [part.note, ""] if part.note else []
    return "\n".join(lines).rstrip() + "\n"


def tables(document: Mapping[str, Any]) -> Group:
    """The same for ``rich.print``."""
    shown: list[Table | Text] = [Text(_title(document), style="bold")]
    if warning := _warning(document):
        shown.append(Text(warning, style="yellow"))
    for part in parts(document):
        shown.append(Text())
        if part.rows:
            table = Table(title=part.title, title_justify="left")
            for index, column in enumerate(part.columns):
                table.add_column(column, justify="left" if index < part.left else "right", overflow="fold")
            for row in part.rows:
                table.add_row(*map(Text, row))
            shown.append(table)
        else:
            shown.append(Text(part.title, style="italic"))
        shown += [Text(part.note)] if part.note else []
    return Group(*shown)


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _title(document: Mapping[str, Any]) -> str:
    return f"{document['base']} → {document['head']}"


def _warning(document: Mapping[str, Any]) -> str:
    if not document["outdated"]:
        return ""
    names = ", ".join(document["outdated"])
    return (
        f"These reports are of other parameters, code or data than those that are there now ({names}): run dvc repro."
    )


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def change(value: float | None, digits: int = 4, unit: str = "") -> str:
    """With its sign; what rounds to 0 has none."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "+" if value > 0 else _MINUS
    return f"{sign}{text}{unit}"


def _metrics(document: Mapping[str, Any]) -> Part:
    names = dict.fromkeys((document["base_metric"], document["metric"]))
    rows = []
    for row in document["metrics"]:
        marks = (" (stale)" if row["stale"][side] else "" for side in ("base", "head"))
        values = [number(row[side]) + mark for side, mark in zip(("base", "head"), marks, strict=True)]
        before, after = row["ratio"]["base"], row["ratio"]["head"]
        ratio = "" if before == after is None else f"{_percent(before)} → {_percent(after)}"
        rows.append((STAGE_TITLES[row["stage"]], *values, change(row["change"]), ratio))
    latencies = {"latency, µs": document["latency_us"]}
    latencies |= {f"latency on {row['name']}, µs": row["latency_us"] for row in document["targets"]}
    for title, latency in latencies.items():
        if latency["base"] is not None or latency["head"] is not None:
            values = ["–" if latency[side] is None else f"{latency[side]:g}" for side in ("base", "head")]
            rows.append((title, *values, change(latency["change"], 3), ""))
    for key in ("passed", "failed"):
        goals = [document["goals"][side] for side in ("base", "head")]
        counts = [None if goal is None else goal[key] for goal in goals]
        if any(counts):
            rows.append((f"goals {key}", *("–" if count is None else str(count) for count in counts), "", ""))
    columns = ("", document["base"], document["head"], "change", "ratio to float")
    return Part(" → ".join(names), columns, rows, "" if rows else "No stage was scored.")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def _trials(document: Mapping[str, Any]) -> Part:
    trials = document["trials"]
    rows = [
        (
            row["code"],
            row["module"] or "–",
            " ".join(row["edit"].split()),
            _gains(document, row["predicted"]) or NONE,
        )
        for row in trials["rows"]
    ]
    if not rows:
        return Part("Trials", note=f"No edit of a finding of {document['base']} was tried.")
    measured = trials["measured"]
    if document["outdated"]:
        note = "Not measured yet: run dvc repro."
    elif not measured:
        note = "Not measured: no number is in both runs."
    else:
        stage = f" ({STAGE_TITLES[measured['stage']]})" if "stage" in measured else ""
        count = len({row["edit"] for row in trials["rows"]})
        note = f"Measured{stage}: {_gains(document, measured)}{f', of all {count} together' if count > 1 else ''}."
        if trials["beside"]:
            note += f" Changed besides: {', '.join(trials['beside'])}."
    return Part("Trials", ("finding", "module", "edit", "predicted"), rows, note, left=4)


def _gains(document: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    shown = []
    for quantity, title in PREDICTABLE.items():
        if quantity in found:
            metric = quantity == "metric"
            name = document["metric"] if metric else title
            shown.append(f"{name} {change(found[quantity], 4 if metric else 1, '' if metric else ' dB')}")
    return ", ".join(shown)


def _params(document: Mapping[str, Any]) -> Part:
    rows = [(row["key"], value(row["base"]), value(row["head"])) for row in document["params"]]
    note = "" if rows else "None changed."
    return Part("Parameters", ("key", document["base"], document["head"]), rows, note, left=3)


def value(found: Any) -> str:
    """As it stands in a flow of YAML, without quotes where none are needed."""
    if isinstance(found, str):
        return found
    return json.dumps(found, ensure_ascii=False, default=str).replace('"', "")


def _findings(document: Mapping[str, Any]) -> Part:
    rows = [
        (how, f"{row['severity']} {row['code']}", row["module"] or "–", row["title"])
        for how, name in (("new", "new"), ("gone", "gone"), ("stayed", "stayed"))
        for row in document["findings"][name]
    ]
    columns = ("", "finding", "module", "what")
    return Part("Findings", columns, rows, "" if rows else "None in either.", left=4)


def _ops(document: Mapping[str, Any]) -> Iterator[Part]:
    title = "Ops whose error changed most"
    ops = document["ops"]
    if ops is None:
        yield Part(title, note="Not known: one of the two has no reports/analysis.json.")
        return
    rows = [
        (
            row["mode"],
            row["module"] + (f" (call {row['call']})" if row["call"] else ""),
            " → ".join(dict.fromkeys(row["dtype"].values())),
            *(_sqnr(row[f"{error}_sqnr_db"], row["identical"][error]) for error in ("same_input", "accumulated")),
        )
        for row in ops["changed"][:SHOWN]
    ]
    columns = ("", "module", "format", "own SQNR, dB", "accumulated, dB")
    more = len(ops["changed"]) - SHOWN
    notes = [f"{more} more changed: --json has all."] if more > 0 else []
    notes += [f"{how}: {_names(ops[how])}." for how in ("new", "gone") if ops[how]]
    yield Part(title, columns, rows, " ".join(notes) if rows or notes else "None changed.", left=3)


def _names(ops: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(op["module"] for op in ops))
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _sqnr(pair: Mapping[str, float | None], identical: Mapping[str, bool]) -> str:
    """Both values; "exact" where there is no error, a dash where it is not known."""
    before, after = ("exact" if identical[side] else number(pair[side], 1) for side in ("base", "head"))
    if before == after:
        return before
    return f"{before} → {after}" + ("" if pair["change"] is None else f" ({change(pair['change'], 1)})")
