"""What a stage shows while it runs, and the small text files it leaves for plots."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qatlib.atomic import write_text
from qatlib.fake.train import Epoch


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A progress bar on stderr, and the ``on_step(step, total, loss)`` that moves it."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, loss=math.nan)
        yield lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss)


def write_history(path: str, epochs: Sequence[Epoch]) -> None:
    """One line per epoch, 6 significant digits; an empty field where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(epochs[0])), lineterminator="\n")
    writer.writeheader()
    for epoch in epochs:
        writer.writerow({key: _cell(value) for key, value in asdict(epoch).items()})
    write_text(path, text.getvalue())


def _cell(value: float | int) -> str:
    return str(value) if isinstance(value, int) else "" if math.isnan(value) else f"{value:.6g}"
