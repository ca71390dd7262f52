"""What a search found: a table for the terminal, and files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qatlib.analysis.apply import Change
from qatlib.atomic import write_csv, write_text
from qatlib.compiler.perf import BASIS
from qatlib.tune.edit import command_of
from qatlib.tune.plot import draw
from qatlib.tune.result import Attempt, Result

HEADER = (
    "point", "latency_us_predicted", "latency_us", "dram_bytes", "sram_peak_bytes", "sqnr_db_predicted", "sqnr_db",
    "metric", "ratio", "pareto", "best", "choice",
)  # fmt: skip


def rows(result: Result) -> Iterator[tuple[str, Attempt]]:
    """The points of the front by number, and what ships now."""
    if result.present is not None:
        yield "now", result.present
    yield from ((str(number), attempt) for number, attempt in enumerate(result.attempts, 1))


def write(result: Result, folder: Path, change: Change | None, trials: list[str]) -> None:
    """``front.csv``, ``front.svg``, ``front.png``; ``params.diff`` of the best, ``trials.sh`` of experiments."""
    write_csv(folder / "front.csv", HEADER, [_cells(result, name, attempt) for name, attempt in rows(result)])
    draw(result, [folder / "front.svg", folder / "front.png"])
    if change is not None:
        write_text(folder / "params.diff", change.diff)
    if trials:
        write_text(folder / "trials.sh", "".join(f"{line}\n" for line in trials))


def trials(changes: list[Change]) -> list[str]:
    """Commands that try each change."""
    return [command_of(change) for change in changes if change.diff]


def _cells(result: Result, name: str, attempt: Attempt) -> tuple[object, ...]:
    predicted, cost, score = attempt.predicted, attempt.cost, attempt.score
    pareto, best = (None if score is None else int(x) for x in (attempt in result.pareto, attempt is result.best))
    return (
        name,
        predicted and predicted.latency_us,
        cost and cost.latency_us,
        cost and cost.dram_bytes,
        cost and cost.sram_peak_bytes,
        predicted and predicted.sqnr_db,
        None if score is None else _db(score.noise),
        score and score.metric,
        attempt.ratio,
        pareto,
        best,
        described(attempt),
    )


def described(attempt: Attempt) -> str:
    """Units that are not in their narrowest form, with what they have."""
    return "; ".join(f"{name}: {option}" for name, option in attempt.choice.items()) or "all int8"


def table(result: Result) -> Group:
    """For ``rich.print``."""
    shown = Table(title=f"Formats for {result.target}", title_justify="left")
    for heading in ("point", "latency, µs", "predicted", "SQNR, dB", "predicted", result.metric, "of float", "formats"):
        shown.add_column(heading, justify="left" if heading == "formats" else "right", overflow="fold")
    for name, attempt in rows(result):
        predicted, cost, score = attempt.predicted, attempt.cost, attempt.score
        best = attempt is result.best
        cells = (
            f"{name} *" if best else name,
            _text(cost.latency_us if cost else None, ".2f"),
            _text(predicted.latency_us if predicted else None, ".2f"),
            _text(None if score is None else _db(score.noise), ".1f"),
            _text(predicted.sqnr_db if predicted else None, ".1f"),
            _text(score.metric if score else None, ".4f"),
            _text(attempt.ratio, ".2%"),
            cost.refused if cost and cost.refused else _short(attempt),
        )
        shown.add_row(*map(Text, cells), style="bold" if best else "")
    lines = Text()
    if result.float_metric is not None:
        lines.append(f"float: {result.float_metric:.4f} {result.metric}; to keep: {result.min_ratio:.2%} of it\n")
    if result.refused:
        name, why = next(iter(result.refused.items()))
        lines.append(f"{len(result.refused)} options cannot be taken, such as {name}: {why}\n")
    if result.left:
        lines.append(f"the time is spent: {result.left} left; run it again to go on\n")
    if result.best is not None and (result.best.ratio or 0.0) < result.min_ratio:
        lines.append("no choice that was measured keeps that much; * is the most accurate\n")
    return Group(shown, lines.append(f"* best; latency: {BASIS}"))


def _short(attempt: Attempt) -> str:
    """At most six units, then their number."""
    parts = described(attempt).split("; ")
    return "; ".join(parts[:6]) + (f"; {len(parts) - 6} more" if len(parts) > 6 else "")


def _db(noise: float) -> float:
    return -10.0 * math.log10(noise) if noise > 0 else math.inf


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
