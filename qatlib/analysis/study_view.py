"""A study in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from qatlib.analysis.sensitivity import Trial
from qatlib.analysis.study import Study

SHOWN = 10


def show(study: Study) -> None:
    """Print the costliest ops, the steepest step, what explains conversion, and the worst samples."""
    console, seen = Console(), study.sensitivity
    table = Table(title=f"{seen.samples} samples; all rounded: {seen.whole.sqnr_db:.1f} dB", title_justify="left")
    for heading in ("op", "type", "alone, dB", "off", "int16 output", "int16 weights"):
        table.add_column(heading, overflow="fold", justify="left" if heading in ("op", "type") else "right")
    for trial in (seen.ranked("off") or seen.ranked("on"))[:SHOWN]:
        name = trial.unit.name
        on, off = seen.find(name, "on"), seen.find(name, "off")
        wide = [_share(seen.find(name, "int16", part)) for part in ("activation", "weight")]
        table.add_row(name, trial.unit.type, f"{on.distance.sqnr_db:.1f}" if on else "", _share(off), *wide)
    console.print(table)
    console.print("off, int16: share of the error power at the output that goes", highlight=False)
    if seen.correlation is not None:
        console.print(f"gradient scores and measured ranks correlate by {seen.correlation:.2f}", highlight=False)
    if study.steps is not None and (step := study.steps.steepest()):
        console.print(f"steepest step: {step.unit.name}, {step.first.sqnr_db:.1f} dB behind it", highlight=False)
    if (lost := study.conversion) is not None:
        names = ", ".join(unit.name for unit in lost.smallest) or "none"
        console.print(f"conversion: {lost.whole.sqnr_db:.1f} dB; explained by {names}", highlight=False)
    for mode, cases in study.bad_cases:
        rows = ", ".join(f"{case.index} ({case.sqnr_db:.1f} dB)" for case in cases.worst)
        console.print(f"worst samples, {mode}: {rows}", highlight=False)
    for note in study.notes:
        console.print(note, highlight=False)


def _share(trial: Trial | None) -> str:
    return f"{trial.share:.1%}" if trial else ""
