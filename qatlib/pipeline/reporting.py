"""What a stage shows while it runs, and the small text files it leaves for plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qatlib.atomic import write_csv
from qatlib.fake.distributed import rank
from qatlib.fake.epochs import Epoch


@dataclass(frozen=True)
class Shown:
    """``on_step(step, total, loss)`` moves the bar; ``note(text)`` prints a line above it."""

    on_step: Callable[[int, int, float], None]
    note: Callable[[str], None]


@contextmanager
def step_bar(title: str) -> Iterator[Shown]:
    """A progress bar on stderr; of several processes the first shows it."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, quiet=rank() > 0), transient=True) as bar:
        task = bar.add_task(title, total=None, loss=math.nan)
        yield Shown(
            lambda step, total, loss: bar.update(task, completed=step, total=total, loss=loss),
            lambda text: bar.console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True),
        )


def write_history(path: str, epochs: Sequence[Epoch]) -> None:
    """One line per epoch, 6 significant digits; an empty field where there is no number."""
    header = (name.removeprefix("in_") for name in asdict(epochs[0]))
    write_csv(path, header, (asdict(epoch).values() for epoch in epochs))
