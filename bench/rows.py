"""The table of ``bench/reference.py``: a CSV with a row per model and metric, and the same as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean
from typing import Literal, get_args

from qatlib.atomic import write_text
from qatlib.errors import StageError
from qatlib.pipeline.config import Observer

Form = Literal["float", "ptq", "qat"]
METHODS: tuple[str, ...] = get_args(Observer)
NOT_RUN = "not run"


@dataclass(frozen=True)
class Row:
    """What one metric gives over ``items`` of the test split; None where a column has no meaning.

    ``ptq`` is calibrated by ``method``; ``qat`` trained from the model that ``method`` calibrated, with ``seed``:
    ``train_items`` items in each of ``epochs``, of which ``best_epoch`` ships. ``in_float`` is for ``form`` float.
    """

    example: str
    metric: str
    items: int
    form: Form
    method: str = ""
    seed: int | None = None
    epochs: int | None = None
    best_epoch: int | None = None
    lr: float | None = None
    train_items: int | None = None
    in_float: float | None = None
    fake_quant: float | None = None
    integer: float | None = None

    @property
    def model(self) -> tuple[str, Form, str, int | None]:
        """Which model the row is of; of QAT the seed alone tells them apart."""
        return self.example, self.form, self.method if self.form == "ptq" else "", self.seed


_NUMBERS: dict[str, Callable[[str], int | float]] = {
    **dict.fromkeys(("items", "seed", "epochs", "best_epoch", "train_items"), int),
    **dict.fromkeys(("lr", "in_float", "fake_quant", "integer"), float),
}
_COLUMNS = {field.name: field.name.removeprefix("in_") for field in fields(Row)}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """CSV, whole or not at all: 6 significant digits, an empty field for None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS.values())
    writer.writerows([_cell(value) for value in asdict(row).values()] for row in rows)
    write_text(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote, nothing if there is no file; raises StageError QAT195 for another content."""
    if not path.exists():
        return []
    try:
        head, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")), strict=True)
        if head != list(_COLUMNS.values()):
            raise ValueError(f"its columns are {', '.join(head)}")
        return [Row(**{name: _value(name, cell) for name, cell in zip(_COLUMNS, line, strict=True)}) for line in lines]  # type: ignore[arg-type]
    except (csv.Error, ValueError) as error:
        seen = f"is not a table of reference models ({error})"
        raise StageError("QAT195", str(path), seen, "Restore the file, or remove it and measure again") from None


def _cell(value: str | float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(name: str, cell: str) -> str | float | None:
    return cell if name not in _NUMBERS else _NUMBERS[name](cell) if cell else None


# -- Markdown --------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], names: Iterable[str]) -> str:
    """Two tables: every method, and QAT seed by seed; a cell of what was not measured says so."""
    chosen = {name: [row for row in rows if row.example == name] for name in names}
    return f"{_methods(chosen)}\n\n{_seeds(chosen)}"


def _methods(chosen: dict[str, list[Row]]) -> str:
    lines = [["example", "metric, items", "form", "float", *METHODS, "QAT, mean of seeds"]]
    for name, metric, rows in _by_metric(chosen):
        of = [[row for row in rows if row.form == "ptq" and row.method == method] for method in METHODS]
        of.append([row for row in rows if row.form == "qat"])
        known = f"{metric}, {rows[0].items:,}" if rows else NOT_RUN
        in_float = _shown(metric, [row.in_float for row in rows if row.form == "float"])
        lines.append([name, known, "fake-quant", in_float, *(_shown(metric, [r.fake_quant for r in x]) for x in of)])
        lines.append(["", "", "integer", "", *(_shown(metric, [r.integer for r in x]) for x in of)])
    return _lines(lines)


def _seeds(chosen: dict[str, list[Row]]) -> str:
    trained = {name: [row for row in rows if row.form == "qat"] for name, rows in chosen.items()}
    seeds = sorted({row.seed for rows in trained.values() for row in rows if row.seed is not None})
    lines = [
        ["example", "metric", "from", "epochs", "lr", "train items", "best epochs", *(f"seed {seed}" for seed in seeds)]
    ]
    for name, metric, rows in _by_metric(trained):
        first = rows[0] if rows else None
        best = ", ".join(_cell(row.best_epoch) for row in rows)
        settings = [first.method, first.epochs, first.lr, f"{first.train_items:,}", best] if first else [NOT_RUN] * 5
        scores = [[(r.fake_quant, r.integer) for r in rows if r.seed == seed] for seed in seeds]
        cells = [" / ".join(_shown(metric, [v]) for v in x[0]) if x else NOT_RUN for x in scores]
        lines.append([name, metric, *(_cell(value) for value in settings), *cells])
    return _lines(lines)


def _by_metric(chosen: dict[str, list[Row]]) -> Iterable[tuple[str, str, list[Row]]]:
    """(example, metric, its rows); an example without rows comes once."""
    for name, rows in chosen.items():
        for metric in dict.fromkeys(row.metric for row in rows) or {NOT_RUN: None}:
            yield name, metric, [row for row in rows if row.metric == metric]


def _shown(metric: str, values: Sequence[float | None]) -> str:
    """The mean, in the digits of the docs."""
    known = [value for value in values if value is not None]
    return NOT_RUN if not known else f"{mean(known):.1f} dB" if metric.endswith("_db") else f"{mean(known):.4f}"


def _lines(cells: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([head, "|" + "---|" * len(cells[0]), *body])
