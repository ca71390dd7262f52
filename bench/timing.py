"""Interleaved runs, and their table. Nothing is imported here that only one bench needs."""

from __future__ import annotations

import time
from collections.abc import Callable

import click


def interleaved(
    sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run of every side, after one run that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            start = clock()
            run()
            if number:
                times[name].append(clock() - start)
    return times


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """One row a side, one column a net, as Markdown."""
    sides = list(dict.fromkeys(side for row in rows.values() for side in row))
    click.echo(f"\n{title}\n\n| | {' | '.join(rows)} |\n|---|{'---|' * len(rows)}")
    for side in sides:
        cells = (f"{row[side]:.3g}" if side in row else "" for row in rows.values())
        click.echo(f"| {side} | {' | '.join(cells)} |")
